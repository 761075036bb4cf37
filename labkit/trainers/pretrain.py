"""Pre-training: predict the next token of random windows of one long text.

    L = mean over windows and positions of  -log p(x_{t+1} | x_0 .. x_t)
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from labkit.data import random_windows
from labkit.models import GPT
from labkit.objectives import next_token_loss
from labkit.trainers.loop import History, TrainSettings, train

EVALUATION_SEED = 2**31  # no training run uses it, so held-out windows are the same for every arm and seed


def window_loss(model: GPT, windows_BT1: Tensor) -> Tensor:
    """Next-token loss on windows of T + 1 tokens."""
    return next_token_loss(model(windows_BT1[:, :-1]), windows_BT1[:, 1:])


@torch.no_grad()
def held_out_loss(model: GPT, tokens_M: Tensor, *, context: int, windows: int = 256, batch: int = 32) -> float:
    """Mean next-token loss in nats on fixed random windows of a held-out text."""
    drawn_NT = random_windows(tokens_M, batch=windows, length=context + 1, seed=EVALUATION_SEED, step=0)
    device = model.embedding.weight.device
    losses = [window_loss(model, part.to(device)) * len(part) for part in drawn_NT.split(batch)]
    return float(torch.stack(losses).sum() / windows)


def evaluation_on(held_out_M: Tensor | None, settings: TrainSettings) -> Callable[[GPT], float] | None:
    """What `train` calls to measure a model on a held-out text; None without one."""
    if held_out_M is None:
        return None
    return lambda model: held_out_loss(model, held_out_M, context=settings.context, windows=settings.evaluation_windows)


def text_identity(model: GPT, tokens_M: Tensor) -> str:
    """Shape and text of a run, for its checkpoint."""
    return f"{model.config} {len(tokens_M)} tokens with sum {int(tokens_M.sum())}"


def pretrain(model: GPT, tokens_M: Tensor, settings: TrainSettings, *, held_out_M: Tensor | None = None,
             checkpoint: Path | None = None, label: str = "pre-training") -> History:
    """Train on windows of `tokens_M`; measure on `held_out_M` where it is given."""

    def loss_at(model: GPT, step: int) -> Tensor:
        length = settings.context + 1
        windows_BT1 = random_windows(tokens_M, batch=settings.batch, length=length, seed=settings.seed, step=step)
        return window_loss(model, windows_BT1.to(model.embedding.weight.device))

    return train(model, loss_at, settings, evaluate=evaluation_on(held_out_M, settings), label=label,
                 checkpoint=checkpoint,
                 identity=text_identity(model, tokens_M) if checkpoint else "")
