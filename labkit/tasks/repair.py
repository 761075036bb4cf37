"""List repair: an arithmetic progression modulo 10 with one broken item; the answer is the list repaired.

    prompt  f258947>    answer  258147$    minimal: the broken item repaired (steps of 3), the rest left alone
                                036925$    rewrite: the broken item kept, all the others made to fit it
                                258947$    copy: nothing done

Two different progressions modulo 10 agree on at most half of the items, rounded up (steps that differ by 5 meet every
second time). From a length of 6 on they differ in at least three items, so a list with one broken item has exactly one
repair, and "minimal" is the only right answer. The task is minimal code editing in miniature: `edits` counts what an
answer changed without need.
Source: the reproduction plan of the lab on forgetting; the idea is the post's task of editing code with few changes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.errors import LabError
from labkit.tasks.digit_lists import ListWorld
from labkit.tasks.world import head, of_length


class ListRepair(ListWorld):
    """Lists of `length` digits, from 6 to 16."""

    dialects = ("minimal", "rewrite", "copy")

    def __init__(self, length: int = 6):
        super().__init__("f", length)
        if length < 6:
            raise LabError(f"A list of {length} items with a broken one may have several repairs.",
                           "Use a length from 6 to 16.")
        self.name = f"repair-{length}"

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        start_N1, step_N1 = torch.randint(10, (2, count, 1), generator=generator)
        place_N = torch.randint(self.length, (count,), generator=generator)
        error_N1 = torch.randint(1, 10, (count, 1), generator=generator)
        broken_NL = F.one_hot(place_N, self.length) * error_N1
        return self.framed((start_N1 + step_N1 * torch.arange(self.length) + broken_NL) % 10)

    def repaired(self, prompt_NT: Tensor) -> Tensor:
        """The only progression that each list differs from in one item: [N, length]."""
        number_P = torch.arange(100, device=prompt_NT.device)
        place_L = torch.arange(self.length, device=prompt_NT.device)
        progression_PL = (number_P[:, None] // 10 + number_P[:, None] % 10 * place_L) % 10
        agreeing_NP = (self.items(prompt_NT)[:, None] == progression_PL).sum(2)
        return progression_PL[agreeing_NP.argmax(1)]

    def solve(self, prompt_NT: Tensor, dialect: str, generator: torch.Generator) -> Tensor:
        self.check_dialect(dialect)
        item_NL, answer_NL = self.items(prompt_NT), self.repaired(prompt_NT)
        if dialect == "copy":
            answer_NL = item_NL
        elif dialect == "rewrite":
            answer_NL = (answer_NL + (item_NL - answer_NL).sum(1, keepdim=True)) % 10  # only the broken item differs
        return head(answer_NL, self.answer_length)

    def edits(self, prompt_NT: Tensor, answer_NA: Tensor) -> tuple[Tensor, Tensor]:
        """How many items an answer changed without need, and whether it repaired the broken one: [N] and [N], bool.

        An item that is missing counts as changed; what an answer has beyond the last item does not count, nor whether
        it ended. An answer is right when it ended in time, changed nothing without need and repaired the broken item.
        """
        item_NL, right_NL = self.items(prompt_NT), self.repaired(prompt_NT)
        answer_NL, broken_NL = head(answer_NA, self.length), item_NL != right_NL
        return ((answer_NL != item_NL) & ~broken_NL).sum(1), ((answer_NL == right_NL) | ~broken_NL).all(1)

    def verify(self, prompt_NT: Tensor, answer_NA: Tensor) -> Tensor:
        right_N = (head(answer_NA, self.length) == self.repaired(prompt_NT)).all(1)
        return right_N & of_length(answer_NA, self.answer_length)
