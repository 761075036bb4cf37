"""A pool of preference pairs without a judge: the answer with the hint is chosen, the one without is rejected.

    for each proposal (q, h):   a ~ pi(. | q),  b ~ pi(. | q, h),  delta = mean log pi(a | q) - log pi(a | q, h)
    kept: delta between two percentiles of the whole pool, then the filters on b's text; the pair's prompt is q alone

Sources: phase 2 of G-Zero's code (arXiv 2605.09959); the filters' numbers are its defaults, in characters.
"""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.data import generator_for
from labkit.errors import LabError
from labkit.models import GPT, answer_logprob, generate
from labkit.objectives import hint_delta
from labkit.tasks import HintProposals, HintWorld, answer_mask
from labkit.tasks.alphabet import END, decode
from labkit.trainers.dpo import Pairs

PROPOSALS, ANSWERS = 5, 6  # streams of the draws


@dataclass(frozen=True)
class TextFilters:
    """What an assisted answer must be, in characters, in the order in which it is asked."""

    shortest: int = 100
    longest: int = 10_000
    most_times: float = 2.5  # as long as the answer without a hint
    least_zlib: float = 0.15  # compressed size over size: below, it repeats itself
    zlib_from: int = 500  # asked from this length on
    common_prefix: int = 30  # as many characters of the question at the start are an echo
    roles: tuple[str, ...] = ("user:", "assistant:", "system:", "<|im_start|>")

    def problem(self, question: str, plain: str, assisted: str) -> str | None:
        """The first filter that refuses, or None."""
        size, head = len(assisted.encode()), question[: self.common_prefix]
        squeezed = len(zlib.compress(assisted.encode()))
        asked = {
            "short": len(assisted) < self.shortest,
            "long": len(assisted) > self.longest,
            "padded": len(assisted) > self.most_times * max(1, len(plain)),
            "repetitive": len(assisted) >= self.zlib_from and squeezed < self.least_zlib * size,
            "echo": len(head) == self.common_prefix and assisted.startswith(head),
            "role": assisted.lstrip().lower().startswith(self.roles),
        }
        return next((name for name, refused in asked.items() if refused), None)


SMALL_WORLD = TextFilters(shortest=4, longest=11, common_prefix=3)


@dataclass
class Pool:
    """N readable proposals with both answers."""

    prompt_NT: Tensor  # with the hint
    plain_NA: Tensor
    assisted_NA: Tensor
    delta_N: Tensor
    fits_N: Tensor  # passes the filters

    def band(self, low: float = 0.0, high: float = 50.0) -> Tensor:
        """Whether each pair's delta lies between two percentiles of the whole pool, both included, and its text
        passes: [N], bool."""
        if not 0 <= low < high <= 100:
            raise LabError(f"There is no band from {low} to {high}%.", "Use 0 <= low < high <= 100.")
        if not len(self.delta_N):
            return self.fits_N
        delta_N = self.delta_N.double()
        low_high = torch.tensor([low, high], dtype=torch.float64, device=delta_N.device) / 100
        bottom, top = torch.quantile(delta_N, low_high)
        return (delta_N >= bottom) & (delta_N <= top) & self.fits_N

    def pairs(self, world: HintWorld, keep_N: Tensor | None = None) -> Pairs:
        """Preference pairs, in the pool's order: the hint is in no prompt."""
        pairs = Pairs(world.without_hint(self.prompt_NT), self.assisted_NA, self.plain_NA)
        return pairs if keep_N is None else pairs.rows(keep_N.nonzero()[:, 0])


def answers_to(solver: GPT, prompt_NT: Tensor, world: HintWorld, generator: torch.Generator, *,
               temperature: float = 0.7, samples: int = 1) -> Tensor:
    """Answers drawn by the solver, [N * samples, A]."""
    return generate(solver, prompt_NT, max_new_tokens=world.answer_length, temperature=temperature, stop_tokens=(END,),
                    generator=generator, samples=samples).tokens_BT


@torch.no_grad()
def plain_answers(solver: GPT, prompt_NT: Tensor, world: HintWorld, generator: torch.Generator, *,
                  temperature: float = 0.7) -> tuple[Tensor, Tensor]:
    """One answer to each question without its hint, and the Hint-delta of it: [N, A] and [N].

    Drawn at `temperature`, scored at 1, as in the code.
    """
    if not len(prompt_NT):
        return prompt_NT.new_zeros(0, world.answer_length), torch.zeros(0, device=prompt_NT.device)
    question_NT = world.without_hint(prompt_NT)
    plain_NA = answers_to(solver, question_NT, world, generator, temperature=temperature)
    logp_NA, hinted_logp_NA = (answer_logprob(solver, each, plain_NA)[0] for each in (question_NT, prompt_NT))
    return plain_NA, hint_delta(logp_NA, hinted_logp_NA, answer_mask(plain_NA))


def instruction(world: HintProposals, device: torch.device) -> Tensor:
    """The one prompt that all proposals answer, [1, T]."""
    return world.problems(1, seed=0).to(device)


def propose(proposer: GPT, proposals: HintProposals, count: int, generator: torch.Generator) -> Tensor:
    """Proposals drawn at temperature 1, [count, A]."""
    prompt_1T = instruction(proposals, proposer.embedding.weight.device)
    return generate(proposer, prompt_1T, max_new_tokens=proposals.answer_length, stop_tokens=(END,),
                    generator=generator, samples=count).tokens_BT


def draw_pool(proposer: GPT, solver: GPT, proposals: HintProposals, *, count: int = 2000, temperature: float = 0.7,
              seed: int = 0, round_: int = 0, filters: TextFilters = SMALL_WORLD) -> Pool:
    """`count` proposals, both answers to each that can be read, and their deltas."""
    dice = generator_for(seed, round_, PROPOSALS, device=solver.embedding.weight.device)
    prompt_NT, valid_N = proposals.read(propose(proposer, proposals, count, dice))
    return pool_of(solver, prompt_NT[valid_N], proposals.world, temperature=temperature, seed=seed, round_=round_,
                   filters=filters)


def pool_of(solver: GPT, prompt_NT: Tensor, world: HintWorld, *, temperature: float = 0.7, seed: int = 0,
            round_: int = 0, filters: TextFilters = SMALL_WORLD) -> Pool:
    """The pool of given questions with hints."""
    dice = generator_for(seed, round_, ANSWERS, device=solver.embedding.weight.device)
    plain_NA, delta_N = plain_answers(solver, prompt_NT, world, dice, temperature=temperature)
    assisted_NA = answers_to(solver, prompt_NT, world, dice, temperature=temperature) if len(prompt_NT) else plain_NA
    fits = [filters.problem(*each) is None for each in
            zip(*(texts(each) for each in (prompt_NT, plain_NA, assisted_NA)), strict=True)]
    fits_N = torch.tensor(fits, dtype=torch.bool, device=prompt_NT.device)
    return Pool(prompt_NT, plain_NA, assisted_NA, delta_N, fits_N)


def texts(token_NA: Tensor) -> list[str]:
    """Each row as text, up to its END."""
    return [decode(row).split("$")[0] for row in token_NA.tolist()]
