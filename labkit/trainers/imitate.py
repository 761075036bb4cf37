"""Imitation: supervised training on solutions that worlds write, fresh ones at every step.

    L = - sum over answer tokens of log p(y_t | prompt, y_<t) / number of answer tokens in the batch

A `Lesson` says which world, in which dialect, and how much of each batch. Several lessons make a base model that can do
several things; one lesson in another dialect is supervised fine-tuning on a new task. Batches are drawn from
(seed, step), so a run can be resumed at any step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from labkit.data import generator_for
from labkit.errors import LabError
from labkit.models import GPT
from labkit.objectives import next_token_loss
from labkit.tasks import World, answer_mask
from labkit.tasks.alphabet import END
from labkit.trainers.checkpoint import fingerprint
from labkit.trainers.loop import History, TrainSettings, train


@dataclass(frozen=True)
class Lesson:
    """A part of every batch: problems of a world from the training side, answered in one dialect."""

    world: World
    dialect: str
    share: float = 1.0  # of the batch, relative to the other lessons

    def __post_init__(self):
        self.world.check_dialect(self.dialect)
        if not self.share > 0:
            raise LabError(f"A lesson with a share of {self.share} teaches nothing.", "Use a share above 0.")


def rows_of(lessons: Sequence[Lesson], batch: int) -> list[int]:
    """How many rows of a batch each lesson has: its share, by largest remainders, so that they sum to the batch."""
    total = sum(lesson.share for lesson in lessons)
    exact = [batch * lesson.share / total for lesson in lessons]
    rows = [int(part) for part in exact]
    for i in sorted(range(len(rows)), key=lambda i: rows[i] - exact[i])[: batch - sum(rows)]:
        rows[i] += 1
    return rows


def lesson_batch(lessons: Sequence[Lesson], batch: int, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] and a mask [B, T] that is True on answers, END included; shorter rows are filled with END."""
    parts = []
    for place, (lesson, rows) in enumerate(zip(lessons, rows_of(lessons, batch), strict=True)):
        prompt_NT = lesson.world.problems(rows, seed=seed, step=step)
        answer_NA = lesson.world.solve(prompt_NT, lesson.dialect, generator_for(seed, step, place, 1))
        parts.append((prompt_NT, answer_NA))
    longest = max(prompt_NT.shape[1] + answer_NA.shape[1] for prompt_NT, answer_NA in parts)
    tokens_BT = torch.full((batch, longest), END)
    mask_BT = torch.zeros(batch, longest, dtype=torch.bool)
    row = 0
    for prompt_NT, answer_NA in parts:
        N, P, end = len(prompt_NT), prompt_NT.shape[1], prompt_NT.shape[1] + answer_NA.shape[1]
        tokens_BT[row : row + N, :P], tokens_BT[row : row + N, P:end] = prompt_NT, answer_NA
        mask_BT[row : row + N, P:end] = answer_mask(answer_NA)
        row += N
    return tokens_BT, mask_BT


def imitate(model: GPT, lessons: Sequence[Lesson], settings: TrainSettings, *, checkpoint: Path | None = None,
            after_step: Callable[[GPT, int], None] | None = None, label: str = "imitation") -> History:
    """Train `model` in place on what the lessons write. Raises LabError where there are no lessons."""
    if not lessons:
        raise LabError("There is nothing to learn from.", "Give at least one lesson.")

    def loss_at(model: GPT, step: int) -> Tensor:
        device = model.embedding.weight.device
        tokens_BT, mask_BT = lesson_batch(lessons, settings.batch, seed=settings.seed, step=step)
        tokens_BT, mask_BT = tokens_BT.to(device), mask_BT.to(device)
        return next_token_loss(model(tokens_BT[:, :-1]), tokens_BT[:, 1:], mask_BT[:, 1:])

    taught = " ".join(f"{part.share} of {part.world.name} in {part.dialect}" for part in lessons)
    return train(model, loss_at, settings, checkpoint=checkpoint, after_step=after_step, label=label,
                 identity=f"{fingerprint(model)} {taught}")
