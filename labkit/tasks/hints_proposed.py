"""What a proposer writes: a question and a hint, in tokens that may be malformed.

    prompt  ?=        proposal  fab>w**$        the word, ">", the hint's letter, what stands behind it, END
                                jkc>t277$

The blanks of a prompt are not written, so a hint is one to length + 1 tokens long, as a proposer's hints differ in
length. What the corpus proposes: hints of `kinds` alike, and `slips` of the proposals without their ">".
Source: the instruction prompt of G-Zero's Challenger (arXiv 2605.09959, code), which asks for two tagged blocks.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.errors import LabError
from labkit.tasks.alphabet import END, encode
from labkit.tasks.hints import BLANK, HINT_LETTER, KINDS, LETTERS, STAR, HintWorld
from labkit.tasks.world import World, answer_lengths, head

ASK, EQUALS, SPLIT = encode("?=>")
COMMON = ("STRUCT", "NO-OP", "BAD", "LEAK")


class HintProposals(World):
    """Proposals for a `HintWorld`. "Right" is what can be read.

    The instruction is one for all, as in the code; two digits stand before it, since a world needs problems on three
    sides. They mean nothing.
    """

    dialects = ("proper", "corpus")
    prompt_length = 4

    def __init__(self, world: HintWorld | None = None, *, slips: float = 0.1, kinds: Sequence[str] = COMMON):
        if not 0 <= slips <= 1 or not kinds or not set(kinds) <= set(KINDS[1:]):
            raise LabError(f"There are no proposals of {', '.join(kinds) or 'nothing'} with slips={slips}.",
                           f"Choose from {', '.join(KINDS[1:])}, and slips from 0 to 1.")
        self.world, self.slips, self.kinds = world or HintWorld(), slips, tuple(kinds)
        self.name = "-".join(("proposals", str(slips), *kinds, self.world.name))
        self.answer_length = 2 * self.world.length + 3

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        number_N2 = torch.randint(10, (count, 2), generator=generator)
        return F.pad(F.pad(number_N2, (0, 1), value=ASK), (0, 1), value=EQUALS)

    def content(self, prompt_NT: Tensor) -> Tensor:
        return 10 * prompt_NT[:, 0] + prompt_NT[:, 1]

    def solve(self, prompt_NT: Tensor, dialect: str, generator: torch.Generator) -> Tensor:
        """Proposals of random words with hints of this world's kinds."""
        self.check_dialect(dialect)
        N, L = len(prompt_NT), self.world.length
        word_NL = torch.randint(LETTERS[0], LETTERS[-1] + 1, (N, L), generator=generator)
        letters_K = torch.tensor([HINT_LETTER[kind] for kind in self.kinds])
        hint_NS = self.world.random_hint(letters_K[torch.randint(len(letters_K), (N,), generator=generator)], generator)
        slip_N1 = torch.rand(N, 1, generator=generator) < (self.slips if dialect == "corpus" else 0.0)
        written_NA = self.written(word_NL, hint_NS)
        broken_NA = F.pad(torch.cat((written_NA[:, :L], written_NA[:, L + 1 :]), 1), (0, 1), value=END)
        return torch.where(slip_N1, broken_NA, written_NA)

    def written(self, word_NL: Tensor, hint_NS: Tensor) -> Tensor:
        """Words and hints as a proposer writes them: [N, A]."""
        hint_NS = hint_NS.masked_fill(hint_NS == BLANK, END)  # blanks stand at the end only
        return F.pad(torch.cat((F.pad(word_NL, (0, 1), value=SPLIT), hint_NS), 1), (0, 1), value=END)

    def read(self, proposal_NA: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts of the proposals, [N, T], and whether each can be read, [N]; one that cannot be has a prompt without
        meaning. A hint of a kind that is not proposed here cannot be read."""
        L, cut_NA = self.world.length, head(proposal_NA, self.answer_length)
        word_NL, split_N, letter_N, behind_NL = (cut_NA[:, :L], cut_NA[:, L], cut_NA[:, L + 1],
                                                 cut_NA[:, L + 2 : 2 * L + 2])
        ends = torch.tensor([LETTERS[0], LETTERS[-1]], device=cut_NA.device)
        word_N = ((word_NL >= ends[0]) & (word_NL <= ends[1])).all(1)
        known_N = torch.isin(letter_N, torch.tensor([HINT_LETTER[kind] for kind in self.kinds], device=cut_NA.device))
        leak_N = letter_N == HINT_LETTER["LEAK"]
        stars_N = ((behind_NL == STAR) | (behind_NL == END)).all(1)
        numbers_N = ((behind_NL >= 0) & (behind_NL <= 9)).all(1)
        length_N, ended_N = answer_lengths(proposal_NA)
        valid_N = (word_N & known_N & (split_N == SPLIT) & torch.where(leak_N, numbers_N, stars_N) & ended_N
                   & (length_N <= self.answer_length))
        hint_NS = F.pad(behind_NL.masked_fill(behind_NL == END, BLANK), (1, 0))
        hint_NS[:, 0] = letter_N
        return self.world.framed(word_NL, hint_NS), valid_N

    def hint_length(self, prompt_NT: Tensor) -> Tensor:
        """How many tokens a hint has, blanks not counted: [N]."""
        L = self.world.length
        return (prompt_NT[:, L : 2 * L + 1] != BLANK).sum(1)

    def verify(self, prompt_NT: Tensor, answer_NA: Tensor) -> Tensor:
        return self.read(answer_NA)[1]
