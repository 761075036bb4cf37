"""Token-superposition training: begin on bags of tokens, end on tokens (Peng, Gigant and Quesnelle, arXiv 2605.06546).

Phase 1, the first `share` of the steps, with bags of S tokens:
    h_i = (1/S) sum_j E[x_{iS+j}]                        read the mean of a bag's embeddings (float32)
    L   = logsumexp(z_i) - (1/S) sum_j z_i[x_{(i+1)S+j}]      predict the next bag with the ordinary head
Phase 2: plain next-token training, same weights, same head, same optimizer, same learning-rate schedule.
Both phases have B sequences of N positions, so a step costs the same FLOPs; in phase 1 it reads S times the text:
    tokens read = steps * B * N * (1 + share * (S - 1))
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from labkit.data import random_windows
from labkit.errors import LabError
from labkit.kernels.bag_embedding import bag_embedding
from labkit.kernels.dispatch import choose
from labkit.models import GPT
from labkit.objectives import bag_cross_entropy, next_token_loss, split_into_bags
from labkit.trainers.loop import History, TrainSettings, train
from labkit.trainers.pretrain import evaluation_on, text_identity, window_loss

BagLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Superposition:
    """Which part of training runs on bags, and how. `read` and `predict` switch off one half of the method."""

    bag_size: int  # S
    share: float  # the paper's r: phase 1 is the first round(share * steps) steps
    read: bool = True  # read bags; False reads single tokens and predicts the S that follow each
    predict: bool = True  # predict bags; False reads bags and predicts the one token that follows each
    redraw_vocabulary: bool = False  # draw embedding and head afresh at the switch (an ablation)
    bag_loss: BagLoss = bag_cross_entropy

    def __post_init__(self):
        if self.bag_size < 1 or not 0 <= self.share <= 1:
            raise LabError(f"A bag of {self.bag_size} for a share of {self.share} of the steps is no schedule.",
                           "Use a bag size of 1 or more and a share from 0 to 1.")

    def describe(self) -> str:
        """The method as text, the loss by its name."""
        fields = {**vars(self), "bag_loss": getattr(self.bag_loss, "__qualname__", type(self.bag_loss).__name__)}
        return f"Superposition {fields}"

    def steps_on_bags(self, steps: int) -> int:
        """How many of `steps` belong to phase 1."""
        return round(self.share * steps)

    def tokens_read(self, settings: TrainSettings) -> int:
        """Text that the input positions of a whole run cover, in tokens."""
        positions = settings.batch * settings.context
        on_bags = self.steps_on_bags(settings.steps)
        return positions * (settings.steps + on_bags * (self.bag_size - 1) * self.read)


def superpose(model: GPT, bag_BNS: Tensor) -> Tensor:
    """Mean of the embeddings of each bag, [B, N, D], in float32; on a GPU without the gathered [B, N, S, D]."""
    if choose("auto", model.embedding.weight):
        return bag_embedding(bag_BNS, model.embedding.weight)
    return model.embed(bag_BNS).mean(2)  # of bf16 embeddings too torch takes the mean in float32


def superposed_loss(model: GPT, text_BL: Tensor, bag_size: int, bag_loss: BagLoss = bag_cross_entropy) -> Tensor:
    """Phase 1 in full: read bags, predict the next bag. `text_BL` holds (N + 1) * S tokens."""
    read_BNS, target_BNS = split_into_bags(text_BL, bag_size)
    return bag_loss(model.head(model.trunk(superpose(model, read_BNS))), target_BNS)


def bags_in_only_loss(model: GPT, text_BL: Tensor, bag_size: int) -> Tensor:
    """Read bags, predict the one token that follows each: half of the method."""
    read_BNS, target_BNS = split_into_bags(text_BL, bag_size)
    return next_token_loss(model.head(model.trunk(superpose(model, read_BNS))), target_BNS[:, :, 0])


def bags_out_only_loss(model: GPT, text_BL: Tensor, bag_size: int, bag_loss: BagLoss = bag_cross_entropy) -> Tensor:
    """Read single tokens, predict the bag of S that follows each: the other half; it needs no more text."""
    positions = text_BL.shape[1] - bag_size
    following_BNS = text_BL[:, 1:].unfold(1, bag_size, 1)
    return bag_loss(model(text_BL[:, :positions]), following_BNS[:, :positions])


def window_length(method: Superposition, context: int) -> int:
    """Tokens that a window of phase 1 needs so that every position has a whole target."""
    return (context + 1) * method.bag_size if method.read else context + method.bag_size


def phase_one_loss(model: GPT, text_BL: Tensor, method: Superposition) -> Tensor:
    """The loss of phase 1 for whichever halves of the method are on."""
    if method.read and method.predict:
        return superposed_loss(model, text_BL, method.bag_size, method.bag_loss)
    if method.read:
        return bags_in_only_loss(model, text_BL, method.bag_size)
    return bags_out_only_loss(model, text_BL, method.bag_size, method.bag_loss)


def pretrain_superposed(model: GPT, tokens_M: Tensor, settings: TrainSettings, method: Superposition, *,
                        held_out_M: Tensor | None = None, checkpoint: Path | None = None,
                        label: str = "superposition") -> History:
    """Both phases. The held-out loss is the *next-token* loss in phase 1 too, so that the curve has one ruler."""
    switch = method.steps_on_bags(settings.steps)

    def loss_at(model: GPT, step: int) -> Tensor:
        on_bags = step < switch
        length = window_length(method, settings.context) if on_bags else settings.context + 1
        text_BL = random_windows(tokens_M, batch=settings.batch, length=length, seed=settings.seed, step=step)
        text_BL = text_BL.to(model.embedding.weight.device)
        return phase_one_loss(model, text_BL, method) if on_bags else window_loss(model, text_BL)

    def redraw(model: GPT) -> None:
        device = model.embedding.weight.device
        model.initialise_vocabulary(torch.Generator(device).manual_seed(settings.seed + 1))

    return train(model, loss_at, settings, evaluate=evaluation_on(held_out_M, settings), label=label,
                 checkpoint=checkpoint,
                 identity=f"{method.describe()} {text_identity(model, tokens_M)}" if checkpoint else "",
                 before_step={switch: redraw} if method.redraw_vocabulary else None)
