"""Lab 15 on a real instruct model (the optional extra: pip install -e '.[hf]').

    pool    questions with hints, both answers, Hint-delta, filters           labkit.trainers.self_play_text_pool
    arms    lower, upper and a random half by length-normalised DPO; oracle: only pairs in which the answer with the
            hint alone meets the hidden rubric; shuffled: a coin swaps the answers; SFT: imitation of the lower half
    exam    the share of answers that meet the rubric, on topics of which no question was asked, without a hint

    model, tokenizer = load_instruct("Qwen/Qwen3-0.6B", "cuda")
    rows = text_lab(model, tokenizer, RUBRICS["no comma"], seeds=range(3))
    summary(rows)

One model is in the device's memory: the reference is its log-probabilities, computed before the first step, and the
weights of the start wait in the host's memory for the next arm. Seeds draw questions, answers and exams anew; the
model is one, so an interval speaks of draws and not of models.

Memory of Qwen3-0.6B with the settings below, by count: 9.5 GB for weights, gradients and AdamW in fp32, 3.3 GB kept
for the gradient of four rows, and some copies of their logits: about 15 of 24 GB. Time there, estimated and not
measured: 5 minutes a seed.
Source: phases 2 and 3 of G-Zero's code (arXiv 2605.09959).
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from labkit.data import generator_for
from labkit.errors import LabError
from labkit.measure import interval
from labkit.trainers.dpo import DPOSettings, dpo
from labkit.trainers.self_play_pool import TextFilters
from labkit.trainers.self_play_text_model import Instruct, answer_counts, check_chat, load_instruct
from labkit.trainers.self_play_text_pool import ARMS, TEXT, TextPool, deltas, draw_text_pool
from labkit.trainers.self_play_text_rubrics import EXAM, QUESTIONS, RUBRICS, Rubric

__all__ = ["ARMS", "EXAM", "QUESTIONS", "RUBRICS", "Rubric", "TextSettings", "hint_rows", "load_instruct", "summary",
           "text_lab"]
EXAMS = 14  # stream of the draws


@dataclass(frozen=True)
class TextSettings:
    """One run of the lab on text. The rate is the code's, which trains low-rank adapters; here all weights learn."""

    dpo: DPOSettings = field(default_factory=lambda: DPOSettings(50, 1e-5))
    pool: int = 256
    exam: int = len(EXAM)  # questions
    new: int = 128  # the most tokens of an answer
    temperature: float = 0.7
    filters: TextFilters = TEXT
    arms: tuple[str, ...] = ARMS
    drawn_at_once: int = 64
    scored_at_once: int = 4

    def __post_init__(self):
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not 1 <= self.exam <= len(EXAM):
            raise LabError(f"The arms {', '.join(self.arms)} and an exam of {self.exam} questions can't be run.",
                           f"Choose of {', '.join(ARMS)}, and 1 to {len(EXAM)} questions.")

    def asked(self, model: nn.Module, tokenizer) -> Instruct:
        """The model as these settings ask it."""
        return Instruct(model, tokenizer, self.new, self.temperature, self.drawn_at_once, self.scored_at_once,
                        self.dpo.precision)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights in the host's memory, shared ones once."""
    return {name: weight.detach().to("cpu", copy=True) for name, weight in model.named_parameters()}


@contextmanager
def weights_put_back(model: nn.Module, start: Mapping[str, Tensor]) -> Iterator[None]:
    """Behind this block, and where it fails, the model is again what it was."""
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(start[name])
                weight.grad = None


def graded(chat: Instruct, rubric: Rubric, questions: Sequence[str], seed: int, hint: str | None = None) -> dict:
    """One answer to each question: the share that meets the rubric, words of an answer, and the share cut short."""
    prompt_NP = chat.prompts(questions, [hint] * len(questions))
    answer_NA = chat.answers(prompt_NP, generator_for(seed, EXAMS, device=chat.device), label="exam")
    said = chat.texts(answer_NA)
    return {"meets": statistics.mean(map(rubric.holds, said)),
            "words": statistics.mean(len(each.split()) for each in said),
            "cut": float((~chat.finished(answer_NA)).float().mean())}


def learned(chat: Instruct, pool: TextPool, arm: str, rubric: Rubric, settings: TextSettings, seed: int) -> dict:
    """One arm: train on its part of the pool, sit the exam. The model stays as the arm left it."""
    pairs, better = pool.pairs_of(arm, seed)
    facts = {"arm": arm, "pairs": len(pairs)}
    if not len(pairs):  # an oracle may find none
        return facts
    plan = replace(settings.dpo, objective="sft") if arm == "SFT" else settings.dpo
    dpo(chat.model, pairs, plan, logprob=lambda _, *both: chat.logprob(*both), mask=answer_counts, label=arm)
    facts |= {name: float((better == sign).float().mean()) for name, sign in (("better", 1), ("worse", -1))}
    return facts | graded(chat, rubric, EXAM[: settings.exam], seed)


def text_lab(model: nn.Module, tokenizer, rubric: Rubric, *, seeds: Sequence[int] = (0, 1, 2),
             settings: TextSettings = TextSettings()) -> list[dict]:
    """All arms and seeds; the model is afterwards what it was before.

    Returns rows with seed and arm ("base", "base with the hint", then those that learned); of the exam: `meets`, the
    share of answers that meet the rubric, `words` of an answer, and `cut`, the share that `new` tokens cut short; of
    the pairs: their number `pairs`, and the shares in which the preferred answer alone meets the rubric, `better`, or
    the other alone, `worse`. An arm that found no pairs has `pairs` 0 and no exam.
    Raises LabError for a model without a chat template, and where the filters refuse the whole pool.
    """
    check_chat(model, tokenizer)
    chat, start = settings.asked(model, tokenizer), weights_of(model)
    exam, rows = EXAM[: settings.exam], []
    for seed in seeds:
        rows.append({"seed": seed, "arm": "base", **graded(chat, rubric, exam, seed)})
        rows.append({"seed": seed, "arm": "base with the hint", **graded(chat, rubric, exam, seed, rubric.hint)})
        pool = draw_text_pool(chat, rubric, settings.pool, seed=seed, filters=settings.filters)
        if not pool.fits_N.any():
            raise LabError(f"The filters refused all {settings.pool} answers.",
                           "Allow more tokens (new), or set the filters' limits to this model's answers.")
        for arm in settings.arms:
            with weights_put_back(model, start):
                rows.append({"seed": seed, **learned(chat, pool, arm, rubric, settings, seed)})
    return rows


def summary(rows: Sequence[Mapping]) -> list[dict]:
    """One row an arm: means over seeds, and the change of `meets` from the base with its 95% interval, paired by
    seed."""
    graded_rows = [row for row in rows if "meets" in row]
    meets = {arm: {row["seed"]: row["meets"] for row in graded_rows if row["arm"] == arm}
             for arm in dict.fromkeys(row["arm"] for row in graded_rows)}
    table = []
    for arm, ours in meets.items():
        change, low, high = interval(ours, {seed: meets["base"][seed] for seed in ours})
        of_arm = [row for row in graded_rows if row["arm"] == arm]
        means = {name: statistics.mean(row[name] for row in of_arm) for name in
                 ("meets", "pairs", "better", "worse", "words", "cut") if name in of_arm[0]}
        table.append({"arm": arm, "seeds": len(ours), "change": change, "low": low, "high": high, **means})
    return table


def hint_rows(model: nn.Module, tokenizer, rubric: Rubric, *, questions: Sequence[str] = QUESTIONS, seed: int = 0,
              settings: TextSettings = TextSettings()) -> list[dict]:
    """Each kind of hint on every question: median delta, and the share of answers that meet the rubric without and with
    the hint. No weight changes. Raises LabError where there are no questions."""
    if not questions:
        raise LabError("There are no questions to ask.", "Give at least one.")
    chat, dice = settings.asked(model, tokenizer), generator_for(seed, EXAMS, device=next(model.parameters()).device)
    plain_NA = chat.answers(chat.prompts(questions), dice)
    without, rows = statistics.mean(map(rubric.holds, chat.texts(plain_NA))), []
    for kind, hint in rubric.hints().items():
        hints = [hint] * len(questions)
        said = chat.texts(chat.answers(chat.prompts(questions, hints), dice, label=kind))
        rows.append({"kind": kind, "delta": float(deltas(chat, questions, hints, plain_NA).median()),
                     "without": without, "with": statistics.mean(map(rubric.holds, said))})
    return rows
