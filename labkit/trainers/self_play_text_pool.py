"""A pool of preference pairs in real text, and the arms that learn from parts of it.

    q and h at random,   a ~ pi(. | q),   b ~ pi(. | q, h),   delta(q, h, a);   chosen b, rejected a, prompt q alone

Filters and percentiles are those of labkit.trainers.self_play_pool. The rubric's verdicts are kept beside the pairs:
only the arm "oracle" may read them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.data import generator_for
from labkit.errors import LabError
from labkit.objectives import hint_delta
from labkit.trainers.dpo import Pairs
from labkit.trainers.self_play_pool import Pool, TextFilters
from labkit.trainers.self_play_text_model import Instruct, answer_counts
from labkit.trainers.self_play_text_rubrics import QUESTIONS, Rubric

PROPOSALS, ANSWERS, COINS = 11, 12, 13  # streams of the draws
TEXT = TextFilters(shortest=20)  # the code's limits, but for answers that may be one short sentence
ARMS = ("lower half", "upper half", "random half", "oracle", "shuffled", "SFT")


@dataclass
class TextPool(Pool):
    """N pairs; `prompt_NT` has the hint, `question_NP` has not."""

    question_NP: Tensor
    kinds: list[str]  # of the hints
    better_N: Tensor  # the answer with the hint meets the rubric, minus the answer without it does: 1, 0 or -1

    def kept(self, arm: str, seed: int) -> Tensor:
        """Which pairs an arm learns from, [N]. "random half" takes as many as "lower half"."""
        if arm in ("lower half", "shuffled", "SFT"):
            return self.band(0, 50)
        if arm == "upper half":
            return self.band(50, 100)
        if arm == "oracle":
            return self.fits_N & (self.better_N > 0)
        if arm != "random half":
            raise LabError(f"There is no arm {arm!r}.", f"Choose one of {', '.join(ARMS)}.")
        fits = self.fits_N.nonzero()[:, 0].cpu()
        drawn = fits[torch.randperm(len(fits), generator=generator_for(seed, COINS))[: int(self.band().sum())]]
        return torch.zeros_like(self.fits_N).index_fill(0, drawn.to(self.fits_N.device), True)

    def pairs_of(self, arm: str, seed: int) -> tuple[Pairs, Tensor]:
        """What an arm learns from, in the pool's order, and `better` of each: the hint is in no prompt. In "shuffled" a
        coin says which of the two answers is preferred."""
        keep = self.kept(arm, seed).nonzero()[:, 0]
        pairs, better = Pairs(self.question_NP, self.assisted_NA, self.plain_NA).rows(keep), self.better_N[keep]
        if arm != "shuffled":
            return pairs, better
        coin = (torch.rand(len(keep), generator=generator_for(seed, COINS)) < 0.5).to(keep.device)
        return pairs.swapped(coin), torch.where(coin, -better, better)


@torch.no_grad()
def deltas(chat: Instruct, questions: list[str], hints: list[str], plain_NA: Tensor) -> Tensor:
    """Hint-delta of answers that were drawn without the hints, [N]."""
    logp_NA, hinted_NA = (chat.logprob(chat.prompts(questions, each), plain_NA) for each in (None, hints))
    return hint_delta(logp_NA, hinted_NA, answer_counts(plain_NA))


def proposals(rubric: Rubric, count: int, seed: int) -> tuple[list[str], list[str]]:
    """`count` different pairs of a question and a kind of hint: what the untrained proposer of the lab would bring."""
    grid = [(question, kind) for question in QUESTIONS for kind in rubric.hints()]
    if not 1 <= count <= len(grid):
        raise LabError(f"A pool of {count} cannot be drawn.", f"Ask for 1 to {len(grid)} pairs.")
    drawn = torch.randperm(len(grid), generator=generator_for(seed, PROPOSALS))[:count].tolist()
    return [grid[i][0] for i in drawn], [grid[i][1] for i in drawn]


def draw_text_pool(chat: Instruct, rubric: Rubric, count: int, *, seed: int = 0,
                   filters: TextFilters = TEXT) -> TextPool:
    """`count` questions with hints, both answers to each, their deltas, and what filters and rubric say."""
    questions, kinds = proposals(rubric, count, seed)
    hints = [rubric.hints()[kind] for kind in kinds]
    question_NP, prompt_NT = chat.prompts(questions), chat.prompts(questions, hints)
    dice = generator_for(seed, ANSWERS, device=chat.device)
    plain_NA = chat.answers(question_NP, dice, label="answers without a hint")
    assisted_NA = chat.answers(prompt_NT, dice, label="answers with a hint")
    plain, assisted = chat.texts(plain_NA), chat.texts(assisted_NA)
    fits = [filters.problem(*each) is None for each in zip(questions, plain, assisted, strict=True)]
    better = [rubric.holds(b) - rubric.holds(a) for a, b in zip(plain, assisted, strict=True)]
    return TextPool(prompt_NT, plain_NA, assisted_NA, deltas(chat, questions, hints, plain_NA),
                    torch.tensor(fits, device=chat.device), question_NP, kinds,
                    torch.tensor(better, device=chat.device))
