"""Lists of digits in, lists of digits out: a letter says what to do, so that one model can hold all the tasks.

    sort    s3170>   0137$     an answer is unique; the prior tasks that a model may forget
    reverse r3170>   0713$
    shift   h3170>   4281$     each digit plus one, modulo 10
    copy    c3170>   3170$
    parity  p3170>   1110$     any digits of the same parities, one by one: 5^length right answers; the new task
    split   t3170>   0000$     any digits that add up to the last one, modulo 10: 10^(length - 1) right answers

parity is a sequence form of ParityMNIST: its many right answers are what reinforcement learning may keep and
supervised training on one of them must give up. split is the task on which the same story failed in the pilot: a base
model knows nothing of it, and is right one time in ten. What counts as right: exactly `length` digits and END.
Source: the reproduction plan of the lab on forgetting (RL's Razor, arXiv 2509.04259, appendix B.3 for ParityMNIST).
"""

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.tasks.alphabet import END, VOCAB, token, value
from labkit.tasks.world import World, head, of_length

ONE_ANSWER = {"sort": lambda item_NL: item_NL.sort(1).values, "reverse": lambda item_NL: item_NL.flip(1),
              "shift": lambda item_NL: (item_NL + 1) % 10, "copy": lambda item_NL: item_NL}
LETTER = {"sort": "s", "reverse": "r", "shift": "h", "copy": "c", "parity": "p", "split": "t"}
DIALECTS = {"parity": ("canonical", "uniform", "pair", "same"), "split": ("canonical", "uniform")}


class ListWorld(World):
    """A letter, `length` digits and ">"; the answer is `length` digits and END."""

    def __init__(self, letter: str, length: int):
        if not 1 <= length <= 16:
            raise LabError(f"There is no list of {length} digits.", "Use a length from 1 to 16.")
        self.letter, self.length = token(letter), length
        self.prompt_length, self.answer_length = length + 2, length + 1

    def framed(self, item_NL: Tensor) -> Tensor:
        """The prompts of lists."""
        letter_N1, close_N1 = (torch.full((len(item_NL), 1), symbol) for symbol in (self.letter, token(">")))
        return torch.cat((letter_N1, item_NL, close_N1), 1)

    def items(self, prompt_NT: Tensor) -> Tensor:
        """The digits of each prompt: [N, length]."""
        return prompt_NT[:, 1:-1]

    def content(self, prompt_NT: Tensor) -> Tensor:
        return value(self.items(prompt_NT))


class DigitList(ListWorld):
    """One rule for lists of `length` digits.

    Dialects of parity: "canonical" writes 0 for even and 1 for odd; "uniform" draws any right digit; "pair" draws from
    0 and 4 or from 1 and 5; "same" draws a right digit with probability `same` and else any of the ten, of which half
    are right too: an answer of four is right with probability (0.75 + 0.25 / 2)^4 = 0.586 at the pilot's 0.75.
    Dialects of split: "canonical" writes zeros and the last digit of the prompt, "uniform" any right answer. The other
    rules have one answer, so only "canonical".
    """

    def __init__(self, rule: str = "sort", length: int = 4, *, same: float = 0.75):
        if rule not in LETTER or not 0 <= same <= 1:
            raise LabError(f"There is no rule {rule!r} with same={same}.",
                           f"Choose one of {', '.join(LETTER)}, and same from 0 to 1.")
        super().__init__(LETTER[rule], length)
        self.rule, self.same, self.dialects = rule, same, DIALECTS.get(rule, ("canonical",))
        self.name = f"{rule}-{length}" + (f"-same-{same}" if same != 0.75 else "")

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return self.framed(torch.randint(10, (count, self.length), generator=generator))

    def content(self, prompt_NT: Tensor) -> Tensor:
        """The digits in order; for sort their order is free, as it does not change the answer."""
        item_NL = self.items(prompt_NT)
        return value(ONE_ANSWER["sort"](item_NL) if self.rule == "sort" else item_NL)

    def solve(self, prompt_NT: Tensor, dialect: str, generator: torch.Generator) -> Tensor:
        self.check_dialect(dialect)
        item_NL = self.items(prompt_NT)
        if self.rule == "parity":
            answer_NL = self._parity(item_NL, dialect, generator)
        elif self.rule == "split":
            answer_NL = self._split(item_NL, dialect, generator)
        else:
            answer_NL = ONE_ANSWER[self.rule](item_NL)
        return head(answer_NL, self.answer_length)

    def _parity(self, item_NL: Tensor, dialect: str, generator: torch.Generator) -> Tensor:
        odd_NL, shape = item_NL % 2, item_NL.shape
        if dialect == "canonical":
            return odd_NL
        if dialect == "pair":
            return odd_NL + 4 * torch.randint(2, shape, generator=generator)
        right_NL = odd_NL + 2 * torch.randint(5, shape, generator=generator)
        if dialect == "uniform":
            return right_NL
        any_NL, kept_NL = torch.randint(10, shape, generator=generator), torch.rand(shape, generator=generator)
        return torch.where(kept_NL < self.same, right_NL, any_NL)

    def _split(self, item_NL: Tensor, dialect: str, generator: torch.Generator) -> Tensor:
        free_NL = torch.zeros_like(item_NL[:, 1:])
        if dialect == "uniform":
            free_NL = torch.randint(10, free_NL.shape, generator=generator)
        return torch.cat((free_NL, (item_NL[:, -1:] - free_NL.sum(1, keepdim=True)) % 10), 1)

    def allowed(self, prompt_NT: Tensor) -> Tensor:
        """The tokens that are right at each place of an answer, whatever stands at the others: [N, A, V], bool.

        With it the exact oracle can be sampled: the base model restricted to right answers, which is its I-projection,
        the right distribution nearest to it. For parity it masks the logits of five digits at each place.

        Raises:
            LabError: for split, whose places depend on each other.
        """
        if self.rule == "split":
            raise LabError("In a split the right digits depend on the other ones.", "Draw answers and keep right ones.")
        token_V, item_NL1 = torch.arange(VOCAB, device=prompt_NT.device), self.items(prompt_NT)[:, :, None]
        if self.rule == "parity":
            right_NLV = (token_V < 10) & (token_V % 2 == item_NL1 % 2)
        else:
            right_NLV = token_V == ONE_ANSWER[self.rule](item_NL1[:, :, 0])[:, :, None]
        return torch.cat((right_NLV, (token_V == END).expand(len(prompt_NT), 1, VOCAB)), 1)

    def verify(self, prompt_NT: Tensor, answer_NA: Tensor) -> Tensor:
        item_NL, answer_NL = self.items(prompt_NT), head(answer_NA, self.length)
        whole_N = of_length(answer_NA, self.answer_length) & ((answer_NL >= 0) & (answer_NL < 10)).all(1)
        if self.rule == "parity":
            return whole_N & (answer_NL % 2 == item_NL % 2).all(1)
        if self.rule == "split":
            return whole_N & (answer_NL.sum(1) % 10 == item_NL[:, -1])
        return whole_N & (answer_NL == ONE_ANSWER[self.rule](item_NL)).all(1)
