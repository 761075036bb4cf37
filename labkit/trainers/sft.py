"""Supervised fine-tuning: learn the answer, given the prompt.

    L = - sum over answer tokens of log p(y_t | prompt, y_<t) / number of answer tokens in the batch

Only answers are learned; a prompt is read and not imitated. `on_prompts=True` learns both, for comparison.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.models import GPT
from labkit.objectives import next_token_loss
from labkit.trainers.loop import History, TrainSettings, train


@dataclass(frozen=True)
class Example:
    """One exchange in token ids; the answer should end with the end-of-text token."""

    prompt: Sequence[int]
    answer: Sequence[int]


def pad_examples(examples: Sequence[Example], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens [B, T], padded on the right to the longest, and a mask [B, T] that is True on answers."""
    longest = max(len(example.prompt) + len(example.answer) for example in examples)
    tokens_BT = torch.full((len(examples), longest), pad)
    answer_BT = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        start, end = len(example.prompt), len(example.prompt) + len(example.answer)
        tokens_BT[row, :end] = torch.tensor([*example.prompt, *example.answer])
        answer_BT[row, start:end] = True
    return tokens_BT, answer_BT


def answer_loss(model: GPT, examples: Sequence[Example], *, on_prompts: bool = False) -> Tensor:
    """Mean next-token loss over the answers of a batch. Padding comes last, so a causal model never reads it."""
    device = model.embedding.weight.device
    tokens_BT, counts_BT = (part.to(device) for part in pad_examples(examples))
    if on_prompts:
        length_B = torch.tensor([len(e.prompt) + len(e.answer) for e in examples], device=device)
        counts_BT = torch.arange(tokens_BT.shape[1], device=device) < length_B[:, None]
    return next_token_loss(model(tokens_BT[:, :-1]), tokens_BT[:, 1:], counts_BT[:, 1:])


@torch.no_grad()
def held_out_answer_loss(model: GPT, examples: Sequence[Example], batch: int) -> float:
    """Mean loss over all answer tokens, computed `batch` examples at a time."""
    parts = [examples[start : start + batch] for start in range(0, len(examples), batch)]
    answers = [sum(len(example.answer) for example in part) for part in parts]
    losses = [float(answer_loss(model, part)) * count for part, count in zip(parts, answers, strict=True)]
    return sum(losses) / sum(answers)


def sft(model: GPT, examples: Sequence[Example], settings: TrainSettings, *, held_out: Sequence[Example] = (),
        on_prompts: bool = False, checkpoint: Path | None = None, label: str = "fine-tuning") -> History:
    """Fine-tune on batches drawn from (seed, step); `settings.context` is the longest example allowed.

    Raises:
        LabError: there is no example, an example has no prompt or no answer, or one is longer than the context.
    """
    if not examples:
        raise LabError("There is nothing to learn from.", "Give at least one example.")
    for number, example in enumerate([*examples, *held_out]):
        length = len(example.prompt) + len(example.answer)
        if not example.prompt or not example.answer or length > settings.context:
            raise LabError(
                f"Example {number} has {len(example.prompt)} prompt and {len(example.answer)} answer tokens.",
                f"Give it a prompt, an answer, and no more than the context of {settings.context} tokens in all.")

    def loss_at(model: GPT, step: int) -> Tensor:
        rows = np.random.default_rng((settings.seed, step)).integers(len(examples), size=settings.batch)
        return answer_loss(model, [examples[row] for row in rows], on_prompts=on_prompts)

    def evaluate(model: GPT) -> float:
        return held_out_answer_loss(model, held_out, settings.batch)

    total = sum(sum(example.prompt) + sum(example.answer) for example in examples)
    identity = f"{model.config} {len(examples)} examples with sum {total}, on_prompts={on_prompts}"
    return train(model, loss_at, settings, evaluate=evaluate if held_out else None, checkpoint=checkpoint, label=label,
                 identity=identity)
