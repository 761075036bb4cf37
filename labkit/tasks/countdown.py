"""Countdown: make a target from given numbers, each used exactly once, with +, -, * and brackets.

    prompt  3,5,7:22=    answer  3*5+7$    right: the shortest right expression, the first of these by its characters
                                 7+5*3$    any:   one of all right expressions that the search finds, drawn uniformly
                                 7-3*5$    loose: the right numbers, in a random order with random operations

What counts as right: a whole expression that uses every number as often as the prompt gives it and no other, whose
value is the target, in at most `answer_length` tokens, which leaves room for a pair of brackets about every operation.
Numbers are written as in the prompt, with its leading zeros; no number has a sign. Many answers are right: the verifier
reads and evaluates what is written, in whole numbers.
Source: the reproduction plans of the labs on minimal RLVR and on forgetting.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.tasks.alphabet import END, digits, encode, token, value
from labkit.tasks.world import World, answer_lengths, head

PLUS, MINUS, TIMES, OPEN, CLOSE = encode("+-*()")
SUM, PRODUCT, NUMBER = range(3)  # how strongly an expression holds together
Form = tuple[str, int, int]  # text, value, and one of the three


def combined(left: Form, right: Form) -> Iterator[Form]:
    """The three ways to combine two expressions in this order, with the brackets that they need and no other."""
    (a, x, a_holds), (b, y, b_holds) = left, right
    in_a, in_b = (f"({text})" if holds == SUM else text for text, holds in ((a, a_holds), (b, b_holds)))
    yield f"{a}+{b}", x + y, SUM
    yield f"{a}-{in_b}", x - y, SUM
    yield f"{in_a}*{in_b}", x * y, PRODUCT


def forms(numbers: tuple[str, ...]) -> frozenset[Form]:
    """Every expression that uses each number once, in every order."""
    if len(numbers) == 1:
        return frozenset({(numbers[0], int(numbers[0]), NUMBER)})
    found, places = set(), range(len(numbers))
    for size in range(1, len(numbers)):
        for chosen in combinations(places, size):
            rest = tuple(numbers[i] for i in places if i not in chosen)
            for left in known_forms(tuple(numbers[i] for i in chosen)):
                for right in known_forms(rest):
                    found.update(combined(left, right))
    return frozenset(found)


known_forms = lru_cache(maxsize=4096)(forms)  # of parts of a problem, which many problems share


@lru_cache(maxsize=1024)
def solutions(numbers: tuple[str, ...], largest_target: int) -> dict[int, list[str]]:
    """The expressions for each target from 1 to `largest_target`, the shortest first; `numbers` is sorted."""
    found: dict[int, list[str]] = {}
    for text, result, _ in forms(numbers):
        if 1 <= result <= largest_target:
            found.setdefault(result, []).append(text)
    return {target: sorted(texts, key=lambda text: (len(text), text)) for target, texts in found.items()}


class Malformed(ValueError):
    """What was read is no expression."""


class Reader:
    """Evaluates one row of tokens that holds an END, by recursive descent. `numbers` are the numbers it has read.

    expression = term (("+" | "-") term)*      term = atom ("*" atom)*      atom = number | "(" expression ")"
    """

    def __init__(self, tokens: list[int], width: int):
        self.tokens, self.width, self.at, self.numbers = tokens, width, 0, []

    def evaluate(self) -> int:
        """The value of the whole row. Raises Malformed."""
        result = self.expression()
        self.expect(END)
        return result

    def expect(self, symbol: int) -> None:
        if self.tokens[self.at] != symbol:
            raise Malformed
        self.at += 1

    def expression(self) -> int:
        result = self.term()
        while (operation := self.tokens[self.at]) in (PLUS, MINUS):
            self.at += 1
            result += self.term() if operation == PLUS else -self.term()
        return result

    def term(self) -> int:
        result = self.atom()
        while self.tokens[self.at] == TIMES:
            self.at += 1
            result *= self.atom()
        return result

    def atom(self) -> int:
        if self.tokens[self.at] != OPEN:
            return self.number()
        self.at += 1
        result = self.expression()
        self.expect(CLOSE)
        return result

    def number(self) -> int:
        digit_P = self.tokens[self.at : self.at + self.width]
        if not all(0 <= digit <= 9 for digit in digit_P):  # END is no digit, so a number cannot reach past it
            raise Malformed
        self.at += self.width
        self.numbers.append(int("".join(map(str, digit_P))))
        return self.numbers[-1]


class Countdown(World):
    """`numbers` numbers from 1 to `largest`, and a target from 1 to `largest_target` that they can make."""

    dialects = ("right", "any", "loose")

    def __init__(self, numbers: int = 3, largest: int = 9, *, largest_target: int = 99):
        if not 2 <= numbers <= 4 or not 1 <= largest <= 99 or not 1 <= largest_target <= 9999:
            raise LabError(f"There is no countdown of {numbers} numbers to {largest} and targets to {largest_target}.",
                           "Use 2 to 4 numbers up to at most 99, and targets up to at most 9999.")
        self.numbers, self.largest, self.largest_target = numbers, largest, largest_target
        self.name = f"countdown-{numbers}-to-{largest}" + (f"-make-{largest_target}" if largest_target != 99 else "")
        self.width, self.target_width = len(str(largest)), len(str(largest_target))
        self.prompt_length = numbers * (self.width + 1) + self.target_width + 1
        self.answer_length = numbers * self.width + 3 * (numbers - 1) + 1

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        parts, missing = [torch.empty(0, self.prompt_length, dtype=torch.long)], count
        for _ in range(1000):
            number_NK = torch.randint(1, self.largest + 1, (4 * missing + 64, self.numbers), generator=generator)
            target_N = self._made(number_NK, generator)
            fits_N = (target_N >= 1) & (target_N <= self.largest_target)
            parts.append(self.framed(number_NK[fits_N], target_N[fits_N])[:missing])
            missing -= len(parts[-1])
            if missing <= 0:
                return torch.cat(parts)
        raise LabError(f"Hardly any numbers up to {self.largest} make a target up to {self.largest_target}.",
                       "Use smaller numbers or larger targets.")

    def _made(self, value_NK: Tensor, generator: torch.Generator) -> Tensor:
        """The value of a random expression of each row's numbers: two of them are combined until one is left."""
        while value_NK.shape[1] > 1:
            value_NK = value_NK.gather(1, torch.rand(value_NK.shape, generator=generator).argsort(1))
            a_N, b_N = value_NK[:, 0], value_NK[:, 1]
            operation_N1 = torch.randint(3, (len(a_N), 1), generator=generator)
            made_N1 = torch.stack((a_N + b_N, a_N - b_N, a_N * b_N), 1).gather(1, operation_N1)
            value_NK = torch.cat((made_N1, value_NK[:, 2:]), 1)
        return value_NK[:, 0]

    def framed(self, number_NK: Tensor, target_N: Tensor) -> Tensor:
        """The prompts of numbers and targets."""
        parts = []
        for number_N, symbol in zip(number_NK.unbind(1), "," * (self.numbers - 1) + ":", strict=True):
            parts += [digits(number_N, self.width), torch.full((len(number_N), 1), token(symbol))]
        equals_N1 = torch.full((len(target_N), 1), token("="))
        return torch.cat((*parts, digits(target_N, self.target_width), equals_N1), 1)

    def posed(self, prompt_NT: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers of each prompt, sorted, and its target: [N, K] and [N]."""
        number_NKP = prompt_NT[:, : self.numbers * (self.width + 1)].unflatten(1, (self.numbers, self.width + 1))
        number_NK = value(number_NKP[:, :, :-1].flatten(0, 1)).unflatten(0, (len(prompt_NT), self.numbers))
        return number_NK.sort(1).values, value(prompt_NT[:, -1 - self.target_width : -1])

    def content(self, prompt_NT: Tensor) -> Tensor:
        number_NK, target_N = self.posed(prompt_NT)
        return (number_NK * 100 ** torch.arange(self.numbers, device=prompt_NT.device)).sum(1) * 10**4 + target_N

    def solve(self, prompt_NT: Tensor, dialect: str, generator: torch.Generator) -> Tensor:
        self.check_dialect(dialect)
        number_NK, target_N = self.posed(prompt_NT)
        if dialect == "loose":
            texts = self._loose(number_NK, generator)
        else:
            right = [self._right(*problem) for problem in zip(number_NK.tolist(), target_N.tolist(), strict=True)]
            chance_N = torch.rand(len(right), generator=generator) * (dialect == "any")
            texts = [found[int(u * len(found))] for found, u in zip(right, chance_N.tolist(), strict=True)]
        rows = [encode(text.ljust(self.answer_length, "$")) for text in texts]
        return torch.tensor(rows, dtype=torch.long).view(len(rows), self.answer_length)

    def _right(self, numbers: list[int], target: int) -> list[str]:
        """All right expressions of a problem. Raises LabError where there is none."""
        found = solutions(tuple(f"{number:0{self.width}}" for number in numbers), self.largest_target)
        if target not in found:
            raise LabError(f"{numbers} cannot make {target}.", "Take prompts from `draw` or `problems`.")
        return found[target]

    def _loose(self, number_NK: Tensor, generator: torch.Generator) -> list[str]:
        order_NK = torch.rand(number_NK.shape, generator=generator).argsort(1)
        operation_NK = torch.randint(3, number_NK.shape, generator=generator)  # the first one of a row is cut off
        rows = zip(operation_NK.tolist(), number_NK.gather(1, order_NK).tolist(), strict=True)
        return ["".join("+-*"[operation] + f"{number:0{self.width}}"
                        for operation, number in zip(operations, numbers, strict=True))[1:]
                for operations, numbers in rows]

    def verify(self, prompt_NT: Tensor, answer_NA: Tensor) -> Tensor:
        length_N, ended_N = answer_lengths(answer_NA)
        candidate_N = ended_N & (length_N <= self.answer_length)
        token_NA, (number_NK, target_N) = head(answer_NA, self.answer_length), self.posed(prompt_NT)
        digits_N = ((token_NA >= 0) & (token_NA <= 9)).sum(1)
        candidate_N &= digits_N == self.numbers * self.width  # cheap, and spares most wrong rows the reader
        rows = (part_N[candidate_N].tolist() for part_N in (token_NA, number_NK, target_N))
        right = [self._makes(*row) for row in zip(*rows, strict=True)]
        candidate_N[candidate_N.clone()] = torch.tensor(right, dtype=torch.bool, device=candidate_N.device)
        return candidate_N

    def _makes(self, tokens: list[int], numbers: list[int], target: int) -> bool:
        reader = Reader(tokens, self.width)
        try:
            return reader.evaluate() == target and sorted(reader.numbers) == numbers
        except Malformed:
            return False
