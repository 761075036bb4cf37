"""Training on weights that lack the last k updates, beside ordinary training: what RoundPipe's asynchronous mode does.

    G_T = grad L_T(U_max(0, T - k)),    U_(T+1) = U_T - eta_T Adam(G_T)         U_v: the weights after v updates

k = 0 is ordinary training. With k = 1 iteration T reads W_T = U_(T-1), so W_(T+2) = W_(T+1) - eta Adam(G_T): each
gradient is applied, in order, to weights exactly one update newer than those that it was computed on. The optimizer's
state belongs to the updates and is never late.
Every seed with every learning rate is one model of a stack (labkit.trainers.stack); all delays see the same batches
from the same initial weights. Source: arXiv 2604.27085, which cites convergence and measures none; the event protocol
that leads to this rule is in labkit.pipeline.staleness.
Letters: M models, N steps, E evaluations, B batch, T tokens.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from labkit.errors import LabError
from labkit.trainers.schedule import learning_rate_factor
from labkit.trainers.stack import StackedAdamW, Weights, clip_stack, stack_weights, stacked_losses


@dataclass(frozen=True)
class LateHistory:
    """What happened to each model of the stack; a loss that overflowed is not finite."""

    models: tuple[tuple[float, int], ...]  # (learning rate, seed)
    loss_NM: np.ndarray  # of each step's batch, on the weights that the step read
    evaluated: tuple[int, ...]  # updates done at each evaluation
    held_out_EM: np.ndarray  # on the newest weights

    def losses(self, learning_rate: float, seed: int) -> np.ndarray:
        """One model's training losses by step."""
        return self.loss_NM[:, self.models.index((learning_rate, seed))]

    def end(self, learning_rate: float) -> dict[int, float]:
        """{seed: held-out loss after the last step} at one learning rate."""
        return {seed: float(loss) for (rate, seed), loss in zip(self.models, self.held_out_EM[-1], strict=True)
                if rate == learning_rate}


def train_late(model_of_seed: Callable[[int], nn.Module], batches: Callable[[int, int], Tensor], *, staleness: int,
               learning_rate: float | Sequence[float], steps: int, seeds: Sequence[int] = (0,),
               held_out_BT1: Tensor | None = None, evaluate_every: int = 0, warmup: int = 0, schedule: str = "constant",
               decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
               weight_decay: float = 0.0, clip: float | None = None, losses: Callable = stacked_losses) -> LateHistory:
    """Train a stack of models on late weights.

    Args:
        model_of_seed: a new model; a GPT needs an ExplicitAttention.
        batches: (seed, step) -> windows [B, T + 1]; must depend on nothing else.
        staleness: k, how many updates the weights of a gradient lack.
        learning_rate: the peak, or several; each with each seed is a model.
        held_out_BT1: windows for evaluation, every `evaluate_every` steps and after the last.
        warmup, schedule, decay: of the learning rate (labkit.trainers.schedule).
        weight_decay: on matrices only, and on the newest weights.
        clip: largest gradient norm of a model.
        losses: (model, weights, [M, B, T + 1]) -> (loss of each model, anything).
    Raises:
        LabError: a negative delay, or nothing to train.
    """
    rates = (learning_rate,) if isinstance(learning_rate, int | float) else tuple(learning_rate)
    if staleness < 0 or steps < 1 or not rates or not seeds:
        raise LabError(f"staleness={staleness}, steps={steps}, {len(rates)} learning rates and {len(seeds)} seeds "
                       "train nothing.", "Use 0 or more updates of delay, and at least one of the others.")
    models = tuple((rate, seed) for rate in rates for seed in seeds)
    model, drawn = model_of_seed(seeds[0]), {seed: model_of_seed(seed) for seed in seeds}
    newest = stack_weights([drawn[seed] for _, seed in models])
    rate_M = torch.tensor([rate for rate, _ in models], dtype=next(iter(newest.values())).dtype)
    optimizer = StackedAdamW(newest, rate_M, betas=betas, eps=eps, weight_decay=weight_decay)
    versions = deque([copied(newest)], maxlen=staleness + 1)  # U_max(0, T - k) ... U_T
    rows, evaluated, held_out = [], [], []
    for step in range(steps):
        windows = {seed: batches(seed, step) for seed in seeds}
        loss_M = losses(model, versions[0], torch.stack([windows[seed] for _, seed in models]))[0]
        gradient = dict(zip(newest, torch.autograd.grad(loss_M.sum(), list(versions[0].values())), strict=True))
        factor = learning_rate_factor(step, steps, warmup=warmup, kind=schedule, decay=decay)
        optimizer.step(gradient if clip is None else clip_stack(gradient, clip), factor)
        versions.append(copied(newest))
        rows.append(loss_M.detach())
        due = step + 1 == steps or (evaluate_every and (step + 1) % evaluate_every == 0)
        if held_out_BT1 is not None and due:
            with torch.no_grad():
                held_out.append(losses(model, newest, held_out_BT1.expand(len(models), *held_out_BT1.shape))[0])
            evaluated.append(step + 1)
    return LateHistory(models, torch.stack(rows).numpy(), tuple(evaluated),
                       torch.stack(held_out).numpy() if held_out else np.zeros((0, len(models))))


def copied(weights: Weights) -> Weights:
    """A version that later updates leave alone."""
    return {name: each.detach().clone().requires_grad_() for name, each in weights.items()}
