"""Running sums modulo m in several languages: the same work in words that overlap much, a little, or not at all.

    prompt  3625=    answer  a33b62a24e52:2$    A: "filler, number, sum so far" from left to right
                             l55k20i66g32:2$    B: from right to left, with other fillers, two of them A's
                             a3tb6sa2ue5s:2$    C: as A, but the sums so far in letters (q is 0, r is 1 …)
                             :2$                direct: the answer at once
                             l33k62i24g52:2$    drift: A's steps in B's fillers: no error, only a foreign style
    with WAIT:               a33b65?2a24 …      a sum so far may be stated again after "?"

What counts as right: exactly one ":", behind it the true sum and END; before it anything made of fillers, numbers
below m, sum letters and "?", or nothing. How the chain is written is free, which is what makes languages of it.
A teacher of another language is good at the task and strange to the student: the labs on on-policy distillation ask
what that costs. Slips and WAIT make the corpus of the lab on growing answers: a wrong sum is mostly noticed. It teaches
to take back the sum that was written last, whoever wrote it; what comes after builds on a sum, right or wrong, and an
older one is never stated again.
Source: the pilots of the labs on on-policy distillation (the microworld).
"""

from typing import ClassVar

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.tasks.alphabet import END, VOCAB, encode, token
from labkit.tasks.world import World, answer_lengths, answer_mask, head

EQUALS, ANSWER, WAIT = token("="), token(":"), token("?")
FILLERS, SUMS = "abcdefghijkl", "qrstuvwxyz"
FORWARD = (0.30, 0.22, 0.16, 0.12, 0.08, 0.06, 0.06, 0.0, 0.0, 0.0, 0.0, 0.0)
MOST_WAITS = 6  # for one partial sum; with the corpus of the lab on growing answers one sum in a thousand wants more


class RunningSum(World):
    """The sum of `length` numbers modulo `modulus`.

    Args:
        slip: the probability that a partial sum is first written wrong, by any other number alike. What follows builds
            on what is written, so an answer with a slip is mostly wrong.
        wait_wrong, wait_right: the probability of WAIT after a wrong and after a right partial sum, at each statement.
        retry_slip: the probability that a partial sum that is stated again is wrong.
    "direct" never slips. With all four at 0 every dialect is right.
    """

    dialects = ("A", "B", "C", "direct", "drift")
    # the soft menus: probabilities of the twelve FILLERS; A and B share two of them
    fillers: ClassVar[dict[str, tuple[float, ...]]] = {"A": FORWARD, "B": FORWARD[::-1], "C": FORWARD,
                                                    "drift": FORWARD[::-1]}

    def __init__(self, length: int = 4, modulus: int = 7, *, slip: float = 0.0, wait_wrong: float = 0.0,
                 wait_right: float = 0.0, retry_slip: float = 0.0):
        chances = (slip, wait_wrong, wait_right, retry_slip)
        if not 1 <= length <= 64 or not 2 <= modulus <= 10 or not all(0 <= chance <= 1 for chance in chances):
            raise LabError(f"There is no running sum with length={length}, modulus={modulus} and chances {chances}.",
                           "Use a length from 1 to 64, a modulus from 2 to 10, and probabilities from 0 to 1.")
        self.length, self.modulus = length, modulus
        self.slip, self.wait_wrong, self.wait_right, self.retry_slip = chances
        self.waits = MOST_WAITS if wait_wrong or wait_right else 0
        self.name = f"running-sum-{length}-mod-{modulus}" + ("-" + "-".join(map(str, chances)) if any(chances) else "")
        self.prompt_length, self.answer_length = length + 1, length * (3 + 2 * self.waits) + 3

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        number_NL = torch.randint(self.modulus, (count, self.length), generator=generator)
        return torch.cat((number_NL, torch.full((count, 1), EQUALS)), 1)

    def content(self, prompt_NT: Tensor) -> Tensor:
        """How often each number occurs, as the digits of one number to the base length + 1: the order is free."""
        return ((self.length + 1) ** prompt_NT[:, :-1]).sum(1)

    def solve(self, prompt_NT: Tensor, dialect: str, generator: torch.Generator) -> Tensor:
        self.check_dialect(dialect)
        number_NL = prompt_NT[:, :-1]
        if dialect == "direct":
            steps, sum_N = [], number_NL.sum(1) % self.modulus
        else:
            steps, sum_N = self._chain(number_NL.flip(1) if dialect == "B" else number_NL, dialect, generator)
        answer = [torch.full_like(sum_N, ANSWER), sum_N, torch.full_like(sum_N, END)]
        token_NS = torch.stack(steps + answer, 1)
        # -1 marks the places of a WAIT that was not said; the rest moves up, in order
        order_NS = (token_NS < 0).to(torch.int8).argsort(dim=1, stable=True)
        return head(token_NS.gather(1, order_NS), self.answer_length)

    def _chain(self, number_NL: Tensor, dialect: str, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
        """The columns of a chain, with -1 where nothing is said, and the last sum that each row states."""
        N = len(number_NL)
        filler_NL = torch.multinomial(torch.tensor(self.fillers[dialect]), N * self.length, replacement=True,
                                      generator=generator).view(N, self.length) if N else number_NL
        filler_NL, first_sum = filler_NL + token(FILLERS[0]), token(SUMS[0]) if dialect == "C" else 0
        columns, sum_N = [], torch.zeros(N, dtype=torch.long)
        for k in range(self.length):
            true_N = (sum_N + number_NL[:, k]) % self.modulus
            sum_N, waiting_N = self._state(true_N, self.slip, generator), torch.ones(N, dtype=torch.bool)
            columns += [filler_NL[:, k], number_NL[:, k], sum_N + first_sum]
            for _ in range(self.waits):
                chance_N = torch.where(sum_N == true_N, self.wait_right, self.wait_wrong)
                waiting_N = waiting_N & (torch.rand(N, generator=generator) < chance_N)
                sum_N = torch.where(waiting_N, self._state(true_N, self.retry_slip, generator), sum_N)
                columns += [torch.where(waiting_N, said_N, -1)
                            for said_N in (torch.full_like(sum_N, WAIT), sum_N + first_sum)]
        return columns, sum_N

    def _state(self, true_N: Tensor, slip: float, generator: torch.Generator) -> Tensor:
        """The true sums, each replaced with probability `slip` by one of the other numbers."""
        other_N = (true_N + torch.randint(1, self.modulus, true_N.shape, generator=generator)) % self.modulus
        return torch.where(torch.rand(true_N.shape, generator=generator) < slip, other_N, true_N)

    def verify(self, prompt_NT: Tensor, answer_NA: Tensor) -> Tensor:
        length_N, ended_N = answer_lengths(answer_NA)
        token_NA = head(answer_NA, max(3, answer_NA.shape[1])).long()
        # in an answer of fewer than three tokens two of these places are one, which cannot hold both ANSWER and the sum
        last_N3 = token_NA.gather(1, (length_N[:, None] - torch.tensor([3, 2, 1], device=length_N.device)).clamp(min=0))
        true_N = prompt_NT[:, :-1].sum(1) % self.modulus
        form_N = (last_N3[:, 0] == ANSWER) & ((token_NA == ANSWER).sum(1) == 1)
        return ended_N & form_N & (last_N3[:, 1] == true_N) & self._legal(token_NA).all(1)

    def clean_steps(self, prompt_NT: Tensor, answer_NA: Tensor) -> Tensor:
        """How many tokens stand before the first wrong statement of a left-to-right chain (A, C, drift): [N].

        Wrong are a number that is not the prompt's, a sum so far that is not true, and any token that has no place in
        such a chain. "?" takes back the token before it, so a wrong sum counts only if no "?" follows at once; a token
        of another world counts always. A chain may stop early for ":" and the true sum. Without a wrong statement it is
        A, all columns, also where END came earlier. So `clean_steps(prompt, answer[:, :L]) == L` says that the prefix
        of L tokens is free of errors; pass the prefix itself, since an error taken back behind it still stands in it.
        """
        said_NA = answer_mask(answer_NA)
        wait_NA = said_NA & (answer_NA == WAIT) & ((answer_NA == ANSWER).cumsum(1) == 0)  # verify: none behind ":"
        kept_NA = ~wait_NA
        kept_NA[:, :-1] &= ~wait_NA[:, 1:]
        wrong_NA = kept_NA & said_NA & ~self._in_place(prompt_NT, answer_NA, kept_NA.cumsum(1) - 1)
        wrong_NA |= ~self._legal(answer_NA)
        return (wrong_NA.cumsum(1) == 0).sum(1)

    def _in_place(self, prompt_NT: Tensor, answer_NA: Tensor, place_NA: Tensor) -> Tensor:
        """Whether each token is what a left-to-right chain has at that place: [N, A], bool."""
        number_NL = prompt_NT[:, :-1]
        step_NA = (place_NA // 3).clamp(0, self.length - 1)
        number_NA, sum_NA = (part_NL.gather(1, step_NA)
                             for part_NL in (number_NL, number_NL.cumsum(1) % self.modulus))
        filler_NA = (answer_NA >= token(FILLERS[0])) & (answer_NA <= token(FILLERS[-1]))
        stated_NA = (answer_NA == sum_NA) | (answer_NA == sum_NA + token(SUMS[0]))
        role_NA = place_NA % 3
        chain_NA = torch.where(role_NA == 0, filler_NA, torch.where(role_NA == 1, answer_NA == number_NA, stated_NA))
        far = answer_NA.shape[1]
        mark_N1 = place_NA.masked_fill(answer_NA != ANSWER, far).amin(1, keepdim=True) if far else place_NA
        total_N1 = number_NL.sum(1, keepdim=True) % self.modulus
        end_NA = torch.where(place_NA == mark_N1 + 1, answer_NA == total_N1, answer_NA == END)
        return torch.where(place_NA < mark_N1, chain_NA & (place_NA < 3 * self.length),
                           torch.where(place_NA == mark_N1, role_NA == 0, end_NA))

    def _legal(self, token_NA: Tensor) -> Tensor:
        """Where a token is a number below m, a sum letter, a filler, WAIT, ANSWER or END, or behind END: [N, A]."""
        symbols = [*range(self.modulus), *encode(SUMS[: self.modulus] + FILLERS), WAIT, ANSWER, END]
        legal_V = torch.zeros(VOCAB, dtype=torch.bool, device=token_NA.device)
        legal_V[symbols] = True
        known_NA = (token_NA >= 0) & (token_NA < VOCAB)
        return known_NA & legal_V[token_NA.clamp(0, VOCAB - 1)] | ~answer_mask(token_NA)
