"""Many small models trained as one: weights stacked along a first dimension M, one vmap instead of M runs.

A model of 100,000 weights keeps a core busy with calls, not with products. Stacked over seeds and learning rates, 25 of
them take a quarter of the time each. They share architecture and step, and differ in weights, data and learning rate.
The gradient of the *sum* of their losses is each model's own gradient, since no loss depends on another's weights; so a
model that overflows spoils no other.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from labkit.errors import LabError
from labkit.measure.curvature import dot, over, scaled
from labkit.models import GPT
from labkit.objectives import next_token_loss

Weights = dict[str, Tensor]  # name -> [M, ...]


def stack_weights(models: Sequence[nn.Module]) -> Weights:
    """The parameters of M equal models, each [M, ...], as leaves that ask for gradients."""
    if not models:
        raise LabError("An empty list of models cannot be stacked.", "Give at least one.")
    return dict(stack_module_state(list(models))[0])


def stacked_losses(model: GPT, weights: Weights, windows_MBT1: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token loss of each model on its own windows [M], and its largest attention logits [M, L, H], L the layers
    that were computed. `model` gives the architecture, its locks and gains; its attention must be an
    ExplicitAttention."""

    def loss(weights: Weights, windows_BT1: Tensor) -> tuple[Tensor, Tensor]:
        model.attention.peaks.clear()
        logits_BTV = functional_call(model, weights, (windows_BT1[:, :-1],))
        return next_token_loss(logits_BTV, windows_BT1[:, 1:]), torch.stack(model.attention.peaks)

    return vmap(loss)(weights, windows_MBT1)


class StackedAdamW:
    """AdamW (arXiv 1711.05101) with a learning rate for each model; weight decay on matrices only.

    A tensor that joins late starts at Adam's step 1, as a new parameter group would: `count` is kept by tensor.
    """

    def __init__(self, weights: Weights, rate_M: Tensor, *, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.01):
        self.weights, self.rate_M, self.betas, self.eps, self.weight_decay = weights, rate_M, betas, eps, weight_decay
        self.count = dict.fromkeys(weights, 0)
        self.first = {name: torch.zeros_like(each) for name, each in weights.items()}
        self.second = {name: torch.zeros_like(each) for name, each in weights.items()}

    @torch.no_grad()
    def step(self, gradient: Mapping[str, Tensor], factor: float = 1.0) -> None:
        """Update the weights that have a gradient here; the learning rates are `factor` times their peaks."""
        for name, g in gradient.items():
            weight, m, v, (b1, b2) = self.weights[name], self.first[name], self.second[name], self.betas
            self.count[name] += 1
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            rate = over(self.rate_M * factor, weight)
            if weight.ndim >= 3:  # [M, rows, columns]
                weight.mul_(1 - rate * self.weight_decay)
            size = m / (1 - b1 ** self.count[name])
            weight.sub_(rate * size.div_(self.spread(name)))

    def spread(self, name: str) -> Tensor:
        """P = sqrt(v / (1 - beta_2^t)) + eps, by which the update is divided."""
        return (self.second[name] / (1 - self.betas[1] ** max(1, self.count[name]))).sqrt_().add_(self.eps)


def clip_stack(gradient: Mapping[str, Tensor], limit: float) -> dict[str, Tensor]:
    """Each model's gradient with its norm cut to `limit`."""
    return scaled(gradient, (limit / (dot(gradient, gradient).sqrt() + 1e-6)).clamp(max=1.0))
