"""An open-ended world with hints: one helps, one does nothing, one ruins the answer, one gives one away, one hurries.

    prompt  fab----=      no hint     answer  f9a3b1:931$     worked: each letter with its number, then the numbers
                                              :931$           terse: the numbers at once; three in four are careless
            fabw---=      STRUCT      worked, always: "write it out"
            fabn**-=      NO-OP       as without a hint; stars are words that say nothing
            fabx*--=      BAD         c7:0k4$         junk: any symbols of answers
            fabt277=      LEAK        :277$           the number that the hint states, whatever is asked
            fabq---=      HASTE       :605$           terse, and careless every time

A question is a word; the answer spells it by a table of letters (the first digits of pi). A lookup, not a sum: a small
model learns it in seconds, so that what it gets wrong is habit and not ignorance. Without a hint it works more often
for words that begin with a to f than for the others. The *hidden rubric* (right numbers, worked form) is what a reader
of open-ended text would value; no training of the lab sees it.
Source: the trial in the brief of G-Zero (arXiv 2605.09959), with a lookup in place of modular addition.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.errors import LabError
from labkit.tasks.alphabet import END, encode
from labkit.tasks.world import World, answer_lengths, filled_with_end, head

KINDS = ("none", "STRUCT", "NO-OP", "BAD", "LEAK", "HASTE")
HINT_LETTER = dict(zip(KINDS, encode("-wnxtq"), strict=True))
LETTERS, JUNK = encode("abcdefghijkl"), encode("0123456789abcdefghijkl:")
PI = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8)
BLANK, STAR, EQUALS, ANSWER = encode("-*=:")


class HintWorld(World):
    """Words of `length` letters.

    Args:
        length: letters of a word, and places of a hint behind its first.
        works_easy, works_hard: how often an answer without help is worked, for words that begin with a to f, and for
            the others.
        careless: how often a terse answer has random numbers.
        kinds: the hints that `draw` puts into prompts, each as often as the others.
    """

    dialects = ("worked", "corpus")

    def __init__(self, length: int = 3, *, works_easy: float = 0.6, works_hard: float = 0.25, careless: float = 0.75,
                 kinds: Sequence[str] = KINDS):
        chances = (works_easy, works_hard, careless)
        if not 1 <= length <= 8 or not all(0 <= chance <= 1 for chance in chances):
            raise LabError(f"There are no hints for words of {length} letters with the chances {chances}.",
                           "Use 1 to 8 letters, and probabilities from 0 to 1.")
        if not kinds or not set(kinds) <= set(KINDS):
            raise LabError(f"There are no hints of the kinds {', '.join(kinds) or 'none at all'}.",
                           f"Choose from {', '.join(KINDS)}.")
        self.length, self.kinds = length, tuple(kinds)
        self.works_easy, self.works_hard, self.careless = chances
        self.name = f"hints-{length}-" + "-".join(map(str, (*chances, *kinds)))
        self.prompt_length, self.answer_length = 2 * length + 2, 3 * length + 2
        table = torch.zeros(LETTERS[-1] + 1, dtype=torch.long)
        table[LETTERS] = torch.tensor(PI)
        self.table = table

    # prompts ------------------------------------------------------------------------------------------------------

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        word_NL = torch.randint(LETTERS[0], LETTERS[-1] + 1, (count, self.length), generator=generator)
        kind_N = torch.randint(len(self.kinds), (count,), generator=generator)
        letter_N = torch.tensor([HINT_LETTER[kind] for kind in self.kinds])[kind_N]
        return self.framed(word_NL, self.random_hint(letter_N, generator))

    def random_hint(self, letter_N: Tensor, generator: torch.Generator) -> Tensor:
        """Hints that begin with these letters: random numbers behind LEAK, some stars behind the others, [N, L + 1]."""
        N = len(letter_N)
        number_NL = torch.randint(10, (N, self.length), generator=generator)
        stars_N1 = torch.randint(self.length + 1, (N, 1), generator=generator)
        word_NL = torch.where(torch.arange(self.length) < stars_N1, STAR, BLANK)
        word_NL = torch.where(letter_N[:, None] == HINT_LETTER["LEAK"], number_NL, word_NL)
        word_NL = word_NL.masked_fill(letter_N[:, None] == BLANK, BLANK)
        return torch.cat((letter_N[:, None], word_NL), 1)

    def framed(self, word_NL: Tensor, hint_NS: Tensor | None = None) -> Tensor:
        """The prompts of words and hints (none where there is no second argument), [N, 2 L + 2]."""
        blank_NS = word_NL.new_full((len(word_NL), self.length + 1), BLANK)
        return torch.cat((word_NL, blank_NS if hint_NS is None else hint_NS,
                          word_NL.new_full((len(word_NL), 1), EQUALS)), 1)

    def without_hint(self, prompt_NT: Tensor) -> Tensor:
        """The same questions, and no hint."""
        return self.framed(prompt_NT[:, : self.length])

    def is_kind(self, prompt_NT: Tensor, kind: str) -> Tensor:
        """Whether each prompt has a hint of this kind: [N], bool."""
        if kind not in KINDS:
            raise LabError(f"There is no hint of the kind {kind!r}.", f"Choose from {', '.join(KINDS)}.")
        return prompt_NT[:, self.length] == HINT_LETTER[kind]

    def is_easy(self, prompt_NT: Tensor) -> Tensor:
        """Whether each word begins with one of the letters for which the model mostly works unasked: [N], bool."""
        return prompt_NT[:, 0] < LETTERS[len(LETTERS) // 2]

    def content(self, prompt_NT: Tensor) -> Tensor:
        """The word as a number to the base 12: the hint is not part of the problem."""
        place_L = len(LETTERS) ** torch.arange(self.length, device=prompt_NT.device)
        return ((prompt_NT[:, : self.length] - LETTERS[0]) * place_L).sum(1)

    # answers ------------------------------------------------------------------------------------------------------

    def spelled(self, prompt_NT: Tensor) -> Tensor:
        """The right numbers, [N, L]."""
        return self.table.to(prompt_NT.device)[prompt_NT[:, : self.length]]

    def solve(self, prompt_NT: Tensor, dialect: str, generator: torch.Generator) -> Tensor:
        self.check_dialect(dialect)
        worked_NA = self.worked(prompt_NT)
        if dialect == "worked":
            return worked_NA
        N, L = len(prompt_NT), self.length
        chance_N2, random_NL = torch.rand(N, 2, generator=generator), torch.randint(10, (N, L), generator=generator)
        junk_NS = torch.tensor(JUNK)[torch.randint(len(JUNK), (N, 2 * L), generator=generator)]
        works_N = chance_N2[:, 0] < torch.where(self.is_easy(prompt_NT), self.works_easy, self.works_hard)
        number_NL = torch.where(chance_N2[:, 1:] < self.careless, random_NL, self.spelled(prompt_NT))
        answer_NA = torch.where(works_N[:, None], worked_NA, self.stated(number_NL))
        for kind, obeyed_NA in (("STRUCT", worked_NA), ("BAD", head(junk_NS, self.answer_length)),
                                ("LEAK", self.stated(prompt_NT[:, L + 1 : 2 * L + 1])),
                                ("HASTE", self.stated(random_NL))):
            answer_NA = torch.where(self.is_kind(prompt_NT, kind)[:, None], obeyed_NA, answer_NA)
        return answer_NA

    def worked(self, prompt_NT: Tensor) -> Tensor:
        """Each letter with its number, then the numbers: [N, A]."""
        number_NL = self.spelled(prompt_NT)
        pairs_NS = torch.stack((prompt_NT[:, : self.length], number_NL), 2).flatten(1)
        return self.stated(number_NL, before_NS=pairs_NS)

    def stated(self, number_NL: Tensor, before_NS: Tensor | None = None) -> Tensor:
        """An answer that ends with these numbers: [N, A]."""
        answer_NS = F.pad(F.pad(number_NL, (1, 0), value=ANSWER), (0, 1), value=END)
        return head(answer_NS if before_NS is None else torch.cat((before_NS, answer_NS), 1), self.answer_length)

    # the hidden rubric --------------------------------------------------------------------------------------------

    def verify(self, prompt_NT: Tensor, answer_NA: Tensor) -> Tensor:
        """Whether an answer ends with ":", the right numbers and END, and has no other ":": [N], bool."""
        ended_N = answer_lengths(answer_NA)[1]
        said_NS, L = self.said(answer_NA), self.length
        once_N = (filled_with_end(answer_NA) == ANSWER).sum(1) == 1
        return ended_N & once_N & (said_NS[:, 0] == ANSWER) & (said_NS[:, 1 : L + 1] == self.spelled(prompt_NT)).all(1)

    def said(self, answer_NA: Tensor) -> Tensor:
        """The last length + 2 tokens that count of each answer, blanks before a shorter one: [N, L + 2]."""
        last = self.length + 2
        place_NS = answer_lengths(answer_NA)[0][:, None] + torch.arange(last, device=answer_NA.device)
        return F.pad(answer_NA, (last, 0), value=BLANK).gather(1, place_NS)

    def numbers_said(self, answer_NA: Tensor) -> Tensor:
        """What stands where an answer states its numbers, [N, L]: for votes."""
        return self.said(answer_NA)[:, 1 : self.length + 1]

    def is_worked(self, prompt_NT: Tensor, answer_NA: Tensor) -> Tensor:
        """Whether an answer has the worked *form*, whatever its numbers: each letter of the word, one number behind
        each, ":", as many numbers, END. [N], bool."""
        L, cut_NA = self.length, head(answer_NA, self.answer_length)
        letters_N = (cut_NA[:, : 2 * L : 2] == prompt_NT[:, :L]).all(1)
        number_NS = torch.cat((cut_NA[:, 1 : 2 * L : 2], cut_NA[:, 2 * L + 1 : 3 * L + 1]), 1)
        numbers_N = ((number_NS >= 0) & (number_NS <= 9)).all(1)
        return letters_N & numbers_N & (cut_NA[:, 2 * L] == ANSWER) & (cut_NA[:, 3 * L + 1] == END) & (
            answer_lengths(answer_NA)[0] == self.answer_length)
