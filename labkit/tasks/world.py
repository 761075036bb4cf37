"""What every small world offers: prompts, solutions in several dialects, and a verifier.

    prompts  -> a policy -> answers -> verify: 1 where an answer is right, else 0        (a verifiable reward)

All prompts of a world have one length, so a batch needs no padding on the left. An answer is a row of at most
`answer_length` tokens that ends with END; what stands behind the first END does not count, and an answer without END
was cut off and is wrong. Everything is computed on whole batches of tensors.

A problem belongs to the training, validation or test side by a hash of its content, not of its tokens: 3+5 and 5+3 are
one problem, and are never on two sides.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.data import generator_for
from labkit.errors import LabError
from labkit.tasks.alphabet import END

SIDES = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}  # tenths of the hash


def answer_lengths(answer_NA: Tensor) -> tuple[Tensor, Tensor]:
    """How many tokens of each answer count, its END included, and whether it has one: [N] and [N], bool."""
    before_NA = (answer_NA == END).cumsum(1) == 0
    length_N, ended_N = before_NA.sum(1), ~before_NA.all(1)
    return length_N + ended_N, ended_N


def answer_mask(answer_NA: Tensor) -> Tensor:
    """True from the first token of each answer to its END, that included: [N, A]."""
    return torch.arange(answer_NA.shape[1], device=answer_NA.device) < answer_lengths(answer_NA)[0][:, None]


def filled_with_end(answer_NA: Tensor) -> Tensor:
    """The answers with END in every place behind their END, so that equal answers are equal rows."""
    return answer_NA.masked_fill(~answer_mask(answer_NA), END)


def head(answer_NA: Tensor, length: int) -> Tensor:
    """The first `length` tokens of each answer, END where it has none: [N, length]."""
    cut_NA = filled_with_end(answer_NA)[:, :length]
    return F.pad(cut_NA, (0, length - cut_NA.shape[1]), value=END)


def of_length(answer_NA: Tensor, length: int) -> Tensor:
    """Whether each answer ended, and with exactly `length` tokens, its END included: [N], bool."""
    length_N, ended_N = answer_lengths(answer_NA)
    return ended_N & (length_N == length)


def hash_of(key_N: Tensor) -> Tensor:
    """A whole number from 0 to 9 for each key: the last rounds of splitmix64, so that near keys part."""
    x_N = key_N.long()
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        logical_N = (x_N >> shift) & ((1 << (64 - shift)) - 1)  # torch shifts the sign in
        x_N = (x_N ^ logical_N) * factor
    return x_N.remainder(10)


class World(ABC):
    """One family of problems. Its size is set when it is made; nothing in it depends on a global seed.

    Prompts and solutions are made on the CPU, as every device must see the same ones; `verify` works on any device.
    """

    name: str
    prompt_length: int
    answer_length: int  # the most tokens of an answer, END included
    dialects: tuple[str, ...]  # ways to answer; the first is right and is what a textbook would print

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Prompts from all sides, [count, prompt_length]."""

    @abstractmethod
    def content(self, prompt_NT: Tensor) -> Tensor:
        """A whole number for each prompt, equal for prompts that pose the same problem: [N]."""

    @abstractmethod
    def solve(self, prompt_NT: Tensor, dialect: str, generator: torch.Generator) -> Tensor:
        """An answer in a dialect for each prompt, [N, answer_length]. Not every dialect is right."""

    @abstractmethod
    def verify(self, prompt_NT: Tensor, answer_NA: Tensor) -> Tensor:
        """Whether each answer is right: [N], bool. Any number of tokens A is allowed."""

    def problems(self, count: int, *, split: str = "train", seed: int = 0, step: int = 0) -> Tensor:
        """`count` prompts from one side, [count, prompt_length], on the CPU: a pure function of its arguments."""
        if split not in SIDES:
            raise LabError(f"There is no side {split!r}.", f"Choose one of {', '.join(SIDES)}.")
        if count < 0:
            raise LabError(f"{count} problems cannot be drawn.", "Ask for 0 or more.")
        parts, missing = [torch.empty(0, self.prompt_length, dtype=torch.long)], count
        for prompt_NT in self._on_side(split, count, generator_for(seed, step, list(SIDES).index(split))):
            parts.append(prompt_NT[:missing])
            missing -= len(parts[-1])
            if missing <= 0:
                return torch.cat(parts)
        raise LabError(f"The world {self.name} has no problem on the side {split}.", "Make it larger.")

    def _on_side(self, split: str, count: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Draws of twice as many as should be needed, until they are enough; a hundred times at most."""
        side = SIDES[split]
        for _ in range(100):
            prompt_NT = self.draw(2 * count * 10 // len(side) + 20, generator)
            tenth_N = hash_of(self.content(prompt_NT))
            yield prompt_NT[(tenth_N >= side.start) & (tenth_N < side.stop)]

    def check_dialect(self, dialect: str) -> None:
        """Raises LabError for a dialect that this world does not speak."""
        if dialect not in self.dialects:
            raise LabError(f"The world {self.name} has no dialect {dialect!r}.",
                           f"Choose one of {', '.join(self.dialects)}.")
