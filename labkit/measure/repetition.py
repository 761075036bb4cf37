"""Answers that fill up with repetition: how many are cut off, how many loop, and what the loops weigh in an update.

    truncation share    answers without END, over all answers
    repetition ratio    bytes / zlib bytes of the last L tokens, one byte a token; an answer of at least L tokens is
                        repetitive if it exceeds a threshold
    periodic tail       the longest tail with x_t = x_{t-d} for some period d <= P, from token ids alone

zlib spends about 11 + d bytes on a loop of period d, for L up to some 256. So a short tail has a ceiling: 5.3 at
L = 64 and 10.7 at L = 128 for one repeated token, 4.9 and 9.8 for two. Text over 12 symbols has 1.2 and 1.5. The
paper's L = 10,000 characters and threshold 10 say nothing about small worlds; here L = 64 and 3, which notices loops
of a period up to 10 that fill the tail. One of two tokens that follows 16 others in the tail has only 2.3: where
answers are cut off at 64, give last=32 and threshold=2, or use `periodic_tail`, which needs no threshold and no copy
to the host.

The advantage of a sampled token is A = log p_y - log q_y (q the student, p the teacher). On the student's own answers
E[A] = -KL(q, p) <= 0 at every prefix, so both means of `advantage_by_repetition` are below 0 up to noise, and
"repeated tokens have a 4 to 9 times better advantage" means one nearer to 0: a ratio looped / other of 1/4 to 1/9.
Source: Stable-OPD, arXiv 2604.08527 (truncation, repetition, the two averages). Its repetitive answers are longer than
L characters; here an answer cut off at a cap of L tokens counts too.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import check_devices, check_shape
from labkit.tasks.world import answer_lengths


class PeriodicTail(NamedTuple):
    """The loop that each answer ends with; its END, where it has one, is no part of it."""

    length_N: Tensor  # tokens, the loop's first round included; 0 without a loop
    period_N: Tensor  # the smallest that fits; 0 without a loop
    looped_NA: Tensor  # bool: the tokens of the loop


class RepetitionAdvantage(NamedTuple):
    """Mean advantage of the tokens inside and outside of loops; NaN where there are none."""

    looped: float
    other: float
    ratio: float  # looped / other: between 0 and 1 where both are below 0 and the loops are nearer to it
    looped_share: float  # of the tokens that count


def truncation_share(answer_NA: Tensor) -> float:
    """Share of the answers that have no END. NaN without answers."""
    check_shape("answer_NA", answer_NA, (None, None), "[N, A]")
    return float((~answer_lengths(answer_NA)[1]).double().mean())


def repetition_ratio(tokens: Sequence[int] | Tensor, *, last: int = 64) -> float:
    """Bytes over zlib bytes of the last `last` tokens, one byte a token; of all of them where there are fewer.

    Below 1 for a few tokens, as zlib adds some 10 bytes to anything; 0 for none.
    Raises LabError for ids outside 0 to 255, tokens that are no single row, or last below 1.
    """
    if last < 1:
        raise LabError(f"A tail of {last} tokens holds nothing.", "Use 1 or more; 64 fits the small worlds.")
    row_T = torch.as_tensor(tokens)
    check_shape("tokens", row_T, (None,), "one row [T]")
    ids = row_T[-last:].tolist()
    wrong = [token for token in ids if not (isinstance(token, int) and 0 <= token < 256)]
    if wrong:
        raise LabError(f"The token {wrong[0]} does not fit into one byte.",
                       "Use periodic_tail, which takes any ids, or number the tokens that occur from 0 to 255.")
    return len(ids) / len(zlib.compress(bytes(ids)))


def repetition_ceiling(last: int = 64) -> float:
    """The ratio of one token repeated `last` times, which nothing of that length exceeds."""
    return repetition_ratio([0] * last, last=last)


def repetition_share(answer_NA: Tensor, *, last: int = 64, threshold: float = 3.0) -> float:
    """Share of the answers with at least `last` tokens before END whose repetition ratio exceeds `threshold`.

    Of all answers, the short ones included; NaN without answers.
    Raises LabError for a threshold that no tail of this length can exceed, and as repetition_ratio.
    """
    check_shape("answer_NA", answer_NA, (None, None), "[N, A]")
    ceiling = repetition_ceiling(last)
    if threshold >= ceiling:
        raise LabError(f"No {last} tokens have a repetition ratio above {threshold}: their ceiling is {ceiling:.1f}.",
                       "Lower the threshold (3 at 64 tokens), or look at a longer tail.")
    before_end_N = _lengths_before_end(answer_NA).tolist()
    rows = [row_A[:length] for row_A, length in zip(answer_NA.cpu(), before_end_N, strict=True) if length >= last]
    repetitive = sum(repetition_ratio(row_T, last=last) > threshold for row_T in rows)
    return repetitive / len(answer_NA) if len(answer_NA) else float("nan")


def periodic_tail(answer_NA: Tensor, longest_period: int = 16, *, rounds: int = 3) -> PeriodicTail:
    """The longest tail of each answer, before its END, that repeats with a period of at most `longest_period`.

    rounds: a tail of fewer than rounds * period tokens is no loop. Three, since two rounds happen by chance: of
        answers drawn at random, one in V ends with two equal tokens, and one in V * V with three.
    Of periods with equally long tails the smallest is given. Nothing waits for the host.
    Raises LabError for a period below 1, fewer than two rounds, or an answer that is not [N, A].
    """
    check_shape("answer_NA", answer_NA, (None, None), "[N, A]")
    if longest_period < 1 or rounds < 2:
        raise LabError(f"Nothing repeats with a period of up to {longest_period} in {rounds} rounds.",
                       "Use a period of 1 or more, and two rounds or more.")
    A, end_N = answer_NA.shape[1], _lengths_before_end(answer_NA)
    place_A = torch.arange(A, device=answer_NA.device)
    behind_NA = place_A >= end_N[:, None]
    length_N, period_N = torch.zeros_like(end_N), torch.zeros_like(end_N)
    for period in range(1, min(longest_period, A // rounds) + 1):
        equal_NA = behind_NA.clone()  # what stands behind an answer must not end the run
        equal_NA[:, period:] |= answer_NA[:, period:] == answer_NA[:, :-period]
        run_N = equal_NA.flip(1).long().cumprod(1).sum(1) - (A - end_N)
        tail_N = run_N + period
        better_N = (tail_N >= rounds * period) & (tail_N > length_N)
        length_N, period_N = tail_N.where(better_N, length_N), period_N.masked_fill(better_N, period)
    return PeriodicTail(length_N, period_N, ~behind_NA & (place_A >= (end_N - length_N)[:, None]))


def advantage_by_repetition(advantage_NA: Tensor, mask_NA: Tensor, looped_NA: Tensor) -> RepetitionAdvantage:
    """Mean advantage of the tokens inside and outside of loops, and the ratio of the two with its sign.

    mask_NA: tokens that count; what it leaves out may be anything, NaN too. looped_NA: from periodic_tail.
    The loop's first round is inside, though it repeats nothing yet.
    Raises LabError for tensors of different shapes or devices.
    """
    looped_NA, other_NA = _sides(advantage_NA, mask_NA, looped_NA)
    means = [_sum(advantage_NA, side_NA) / side_NA.sum() for side_NA in (looped_NA, other_NA)]
    share = looped_NA.sum().double() / (looped_NA | other_NA).sum()
    return RepetitionAdvantage(float(means[0]), float(means[1]), float(means[0] / means[1]), float(share))


def looped_weight_share(weight_NA: Tensor, mask_NA: Tensor, looped_NA: Tensor) -> float:
    """sum |w| over the looped tokens / sum |w| over all that count, in the gradient sum_t w_t grad log q(y_t).

    weight_NA: the advantage, or the advantage minus its expectation, times what the loss's average gives each token.
    How large the tokens' gradients are, and whether they cancel, it doesn't say. NaN where all weights are 0.
    Raises LabError as advantage_by_repetition.
    """
    looped_NA, other_NA = _sides(weight_NA, mask_NA, looped_NA)
    looped = _sum(weight_NA.abs(), looped_NA)
    return float(looped / (looped + _sum(weight_NA.abs(), other_NA)))


def _sides(value_NA: Tensor, mask_NA: Tensor, looped_NA: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens that count are in a loop, and which are not."""
    check_shape("values", value_NA, (None, None), "[N, A]")
    for name, tensor in (("mask_NA", mask_NA), ("looped_NA", looped_NA)):
        check_shape(name, tensor, tuple(value_NA.shape), "the shape of the values")
    check_devices(values=value_NA, mask_NA=mask_NA, looped_NA=looped_NA)
    counts_NA, in_loop_NA = mask_NA != 0, looped_NA != 0
    return counts_NA & in_loop_NA, counts_NA & ~in_loop_NA


def _sum(value_NA: Tensor, side_NA: Tensor) -> Tensor:
    return torch.where(side_NA, value_NA.double(), 0.0).sum()


def _lengths_before_end(answer_NA: Tensor) -> Tensor:
    length_N, ended_N = answer_lengths(answer_NA)
    return length_N - ended_N.long()
