"""Addition with written carries: each column's carry and digit from the lowest, then the sum.

    prompt  4785+1947=    answer  12131706=06732$     carries:    5+7 is 1 2, 8+4+1 is 1 3, 7+9+1 is 1 7, 4+1+1 is 0 6
                                  --------=06732$     blank:      nothing written, the sum all the same
                                  02020605=05622$     no_carries: every carry is 0, and the sum that follows from it
                                  05080704=04785$     copy:       as if the second number were 0

What counts as right: every column holds its true carry and its true digit or is left blank, both tokens of it; then
"=", and the true sum in places + 1 digits, the highest first. So no token of an answer may be wrong: a dense task,
where one final check grades 12 tokens at three places and 15 at four. "carries" and "blank" are right, and blank is
harder to do: it computes every carry in one go. The other two are right only where no column carries, or where the
second number is 0.
Source: the reproduction plan of the lab on HölderPO (arXiv 2605.12058), which needs answers of 12 to 16 tokens.
"""

import torch
from torch import Tensor

from labkit.tasks.addition import Addition
from labkit.tasks.alphabet import END, digits, token
from labkit.tasks.world import head, of_length

BLANK, EQUALS = token("-"), token("=")


class WrittenAddition(Addition):
    """a + b with `places` digits each; the answer is a carry and a digit for each column, "=", the sum, and END.

    `noise` is the probability that a digit of a written solution is replaced by a random one; blanks stay.
    """

    dialects = ("carries", "blank", "no_carries", "copy")

    def __init__(self, places: int = 4, *, noise: float = 0.0):
        super().__init__(places, noise)
        self.name = f"written-{places}" + (f"-noise-{noise}" if noise else "")
        self.answer_length = 3 * places + 3

    def carries(self, prompt_NT: Tensor) -> Tensor:
        """The carry out of each column, from the lowest: [N, places]."""
        a_N, b_N = self.numbers(prompt_NT)
        power_P = 10 ** torch.arange(1, self.places + 1, device=prompt_NT.device)
        return (a_N[:, None] % power_P + b_N[:, None] % power_P) // power_P

    def columns(self, prompt_NT: Tensor) -> tuple[Tensor, Tensor]:
        """What is right: carry and digit of each column from the lowest, [N, 2 * places]; the sum, [N, places + 1]."""
        sum_NP = digits(sum(self.numbers(prompt_NT)), self.places + 1)
        return torch.stack((self.carries(prompt_NT), sum_NP.flip(1)[:, :-1]), 2).flatten(1), sum_NP

    def solve(self, prompt_NT: Tensor, dialect: str, generator: torch.Generator) -> Tensor:
        self.check_dialect(dialect)
        scratch_NP, result_NP = self.columns(prompt_NT)
        if dialect in ("no_carries", "copy"):
            result_NP = (self.column_sums(prompt_NT) if dialect == "no_carries"
                         else digits(self.numbers(prompt_NT)[0], self.places + 1))
            digit_NP = result_NP.flip(1)[:, :-1]
            scratch_NP = torch.stack((torch.zeros_like(digit_NP), digit_NP), 2).flatten(1)
        scratch_NP, result_NP = self.noisy(scratch_NP, generator), self.noisy(result_NP, generator)
        if dialect == "blank":
            scratch_NP = torch.full_like(scratch_NP, BLANK)
        equals_N1, end_N1 = (torch.full((len(prompt_NT), 1), symbol) for symbol in (EQUALS, END))
        return torch.cat((scratch_NP, equals_N1, result_NP, end_N1), 1)

    def verify(self, prompt_NT: Tensor, answer_NA: Tensor) -> Tensor:
        head_NA, width = head(answer_NA, self.answer_length), 2 * self.places
        scratch_NP, result_NP = self.columns(prompt_NT)
        written_NP2 = head_NA[:, :width].unflatten(1, (self.places, 2))
        true_NP = (written_NP2 == scratch_NP.unflatten(1, (self.places, 2))).all(2)
        columns_N = (true_NP | (written_NP2 == BLANK).all(2)).all(1)
        result_N = (head_NA[:, width] == EQUALS) & (head_NA[:, width + 1 : -1] == result_NP).all(1)
        return of_length(answer_NA, self.answer_length) & columns_N & result_N
