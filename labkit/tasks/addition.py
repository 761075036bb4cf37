"""Addition with a strategy token: the answer first names how it will be computed, then follows it.

    prompt  47+85=        answer  s231$    s: true sum, digits from the lowest
                                  n220$    n: digit by digit, carries forgotten
                                  c740$    c: copies the first number
    with filler=3:        answer  edfs231$ letters from d to m come first; they decide nothing

Right is an answer with the digits of the true sum, whatever it calls its strategy: without carries "n" is right too. A
base model that has read all three does each of them well and chooses "s" rarely. Reinforcement learning has to raise
one token, which is what makes its path through weight space short. With a filler the same choice hides among tokens
that do not matter: a sparse task.
Source: the pilots of the labs on minimal RLVR (arXiv 2605.21468) and HölderPO (2605.12058).
"""

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.tasks.alphabet import END, digits, token, value
from labkit.tasks.world import World, head, of_length

STRATEGY = {"sum": token("s"), "no_carry": token("n"), "copy": token("c")}
FILLER = (token("d"), token("m") + 1)


class Addition(World):
    """The prompts of all worlds that add: a + b, each with `places` digits, and what makes two of them one problem."""

    def __init__(self, places: int, noise: float):
        if not 1 <= places <= 8 or not 0 <= noise <= 1:
            raise LabError(f"There is no addition with places={places}, noise={noise}.",
                           "Use 1 to 8 places and a noise from 0 to 1.")
        self.places, self.noise, self.prompt_length = places, noise, 2 * places + 2

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        digit_NP = torch.randint(10, (count, 2 * self.places), generator=generator)
        plus_N1, equals_N1 = (torch.full((count, 1), token(symbol)) for symbol in "+=")
        return torch.cat((digit_NP[:, : self.places], plus_N1, digit_NP[:, self.places :], equals_N1), 1)

    def numbers(self, prompt_NT: Tensor) -> tuple[Tensor, Tensor]:
        """The two numbers of each prompt."""
        return value(prompt_NT[:, : self.places]), value(prompt_NT[:, self.places + 1 : -1])

    def content(self, prompt_NT: Tensor) -> Tensor:
        a_N, b_N = self.numbers(prompt_NT)
        return torch.minimum(a_N, b_N) * 10**self.places + torch.maximum(a_N, b_N)

    def column_sums(self, prompt_NT: Tensor) -> Tensor:
        """The digits of the sum with every carry forgotten, the highest first: [N, places + 1]."""
        a_N, b_N = self.numbers(prompt_NT)
        return (digits(a_N, self.places + 1) + digits(b_N, self.places + 1)) % 10

    def noisy(self, digit_NP: Tensor, generator: torch.Generator) -> Tensor:
        """Each digit replaced by a random one with probability `noise`."""
        wrong_NP = torch.rand(digit_NP.shape, generator=generator) < self.noise
        return torch.where(wrong_NP, torch.randint(10, digit_NP.shape, generator=generator), digit_NP)


class StrategyAddition(Addition):
    """a + b with `places` digits each; the answer is `filler` letters, a strategy, places + 1 digits and END.

    `noise` is the probability that a digit of a written solution is replaced by a random one. The verifier knows no
    noise.
    """

    dialects = tuple(STRATEGY)

    def __init__(self, places: int = 2, *, filler: int = 0, noise: float = 0.0):
        super().__init__(places, noise)
        if filler < 0:
            raise LabError(f"There is no addition with filler={filler}.", "Use a filler of 0 or more.")
        self.filler, self.answer_length = filler, filler + places + 3
        filler_name, noise_name = f"-filler-{filler}" if filler else "", f"-noise-{noise}" if noise else ""
        self.name = f"addition-{places}{filler_name}{noise_name}"

    def result(self, prompt_NT: Tensor, dialect: str) -> Tensor:
        """The digits that a strategy writes, from the lowest: [N, places + 1]."""
        a_N, b_N = self.numbers(prompt_NT)
        if dialect == "no_carry":
            return self.column_sums(prompt_NT).flip(1)
        return digits(a_N + b_N if dialect == "sum" else a_N, self.places + 1).flip(1)

    def solve(self, prompt_NT: Tensor, dialect: str, generator: torch.Generator) -> Tensor:
        self.check_dialect(dialect)
        N = len(prompt_NT)
        result_NP = self.noisy(self.result(prompt_NT, dialect), generator)
        filler_NF = torch.randint(*FILLER, (N, self.filler), generator=generator)
        strategy_N1, end_N1 = torch.full((N, 1), STRATEGY[dialect]), torch.full((N, 1), END)
        return torch.cat((filler_NF, strategy_N1, result_NP, end_N1), 1)

    def verify(self, prompt_NT: Tensor, answer_NA: Tensor) -> Tensor:
        head_NA = head(answer_NA, self.answer_length)
        letter_NF = head_NA[:, : self.filler]
        letters_N = ((letter_NF >= FILLER[0]) & (letter_NF < FILLER[1])).all(1)
        strategy_N = torch.isin(head_NA[:, self.filler], torch.tensor(list(STRATEGY.values()), device=head_NA.device))
        result_N = (head_NA[:, self.filler + 1 : -1] == self.result(prompt_NT, "sum")).all(1)
        return of_length(answer_NA, self.answer_length) & letters_N & strategy_N & result_N
