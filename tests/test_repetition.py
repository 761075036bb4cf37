"""Loops, truncation and what they weigh: equal to searches over every tail, to zlib's own counts and to closed forms.

The search tries each tail of an answer, each period and each place, as a reader would; `periodic_tail` shifts whole
tensors instead, so the two share no step. Each test says which mistake it would notice.
"""

import math
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.errors import LabError
from labkit.measure import (
    advantage_by_repetition,
    looped_weight_share,
    periodic_tail,
    repetition_ratio,
    repetition_share,
    truncation_share,
)
from labkit.measure.repetition import repetition_ceiling
from labkit.tasks import answer_mask
from labkit.tasks.alphabet import END


def rows(*answers: list[int], length: int) -> torch.Tensor:
    """Answers filled with END to one length."""
    return torch.tensor([answer + [END] * (length - len(answer)) for answer in answers])


def searched(row_A: list[int], longest_period: int, rounds: int) -> tuple[int, int]:
    """Length and period of the longest periodic tail before END, by trying them all."""
    text = row_A[:row_A.index(END)] if END in row_A else row_A
    for length in range(len(text), 0, -1):
        tail = text[len(text) - length:]
        for period in range(1, longest_period + 1):
            if length >= rounds * period and all(tail[i] == tail[i + period] for i in range(length - period)):
                return length, period
    return 0, 0


@given(st.lists(st.lists(st.sampled_from([0, 1, 2, END]), min_size=11, max_size=11), min_size=1, max_size=6),
       st.integers(1, 6), st.integers(2, 4))
def test_equals_the_search_on_short_answers(answers, longest_period, rounds):
    """Few tokens, so loops of all kinds occur: whole answers, loops behind END, answers without a token."""
    answer_NA = torch.tensor(answers)
    tail = periodic_tail(answer_NA, longest_period, rounds=rounds)
    expected = [searched(answer, longest_period, rounds) for answer in answers]
    assert list(zip(tail.length_N.tolist(), tail.period_N.tolist(), strict=True)) == expected
    for answer, (length, _), looped_A in zip(answers, expected, tail.looped_NA.tolist(), strict=True):
        end = answer.index(END) if END in answer else len(answer)
        assert looped_A == [end - length <= place < end for place in range(len(answer))]


@given(st.integers(0, 10**6), st.integers(1, 16), st.integers(0, 20), st.booleans())
def test_a_planted_loop_is_found(seed, period, head, ended):
    """Random text, then a loop that begins with tokens found nowhere else: its length and period, exactly."""
    draw = torch.Generator().manual_seed(seed)
    loop = (100 + torch.randperm(30, generator=draw)[:period]).tolist()  # no token twice, none of the text's
    length = int(torch.randint(3 * period, 5 * period + 1, (), generator=draw))
    text = torch.randint(11, 100, (head,), generator=draw).tolist() + (loop * 5)[:length]
    answer_NA = torch.tensor([text + [END] * (3 if ended else 0)])
    tail = periodic_tail(answer_NA)
    assert (int(tail.length_N), int(tail.period_N)) == (length, period)
    assert tail.looped_NA[0].nonzero()[:, 0].tolist() == list(range(head, head + length))
    too_short = periodic_tail(answer_NA, period - 1) if period > 1 else None
    assert too_short is None or int(too_short.length_N) == 0  # all its tokens differ within a period


def test_closed_forms_of_a_tail():
    """What counts as a loop: three rounds, the last may be a part; END and what stands behind it never."""
    answer_NA = rows([7, 5, 5, 5], [5, 5], [1, 2, 1, 2, 1, 2, 1], [1, 2, 1, 2, 1], [3, 3, 3, 4], [], [5], length=8)
    tail = periodic_tail(answer_NA)
    assert tail.length_N.tolist() == [3, 0, 7, 0, 0, 0, 0] and tail.period_N.tolist() == [1, 0, 2, 0, 0, 0, 0]
    assert periodic_tail(answer_NA, rounds=2).length_N.tolist() == [3, 2, 7, 5, 0, 0, 0]
    assert periodic_tail(answer_NA, 1).length_N.tolist() == [3, 0, 0, 0, 0, 0, 0]
    assert int(tail.looped_NA.sum()) == 10 and not (tail.looped_NA & ~answer_mask(answer_NA)).any()


def test_the_longest_loop_counts_and_of_equal_ones_the_smallest_period():
    one_then_two = rows([1, 1, 2, 1, 1, 2, 1, 1, 2, 1, 1, 1], [2, 2, 2, 2, 2, 2, 2], length=12)
    tail = periodic_tail(one_then_two)
    assert tail.length_N.tolist() == [3, 7] and tail.period_N.tolist() == [1, 1]
    longer = periodic_tail(rows([1, 1, 1, 2] * 3 + [1, 1, 1], length=16))
    assert (int(longer.length_N), int(longer.period_N)) == (15, 4)  # period 1 has a tail of three as well


def test_a_loop_of_three_tokens_is_rarer_by_chance_than_one_of_two():
    """Of random answers over V symbols one in V ^ 2 ends with three equal ones, one in V with two: why rounds is 3."""
    V, N = 8, 20000
    answer_NA = 11 + torch.randint(V, (N, 12), generator=torch.Generator().manual_seed(0))
    for rounds in (2, 3):
        chance = V ** (1.0 - rounds)
        found = float((periodic_tail(answer_NA, 1, rounds=rounds).length_N > 0).double().mean())
        assert abs(found - chance) < 4 * math.sqrt(chance / N)


def test_periods_longer_than_the_answers_and_answers_without_tokens():
    assert periodic_tail(torch.tensor([[1, 1, 1]]), 100).length_N.tolist() == [3]
    for shape in ((0, 5), (2, 0), (0, 0)):
        tail = periodic_tail(torch.zeros(shape, dtype=torch.long))
        assert tail.length_N.tolist() == [0] * shape[0] and tail.looped_NA.shape == shape


def test_truncation_is_the_share_without_end():
    """An END at the cap is one; a row with two is one answer; no answers have no share."""
    answer_NA = torch.tensor([[1, 2, END], [END, 1, END], [1, 2, 3], [4, 4, 4]])
    assert truncation_share(answer_NA) == 0.5 and truncation_share(answer_NA[:2]) == 0.0
    assert math.isnan(truncation_share(answer_NA[:0])) and truncation_share(answer_NA[:, :0]) == 1.0


@given(st.lists(st.integers(0, 255), max_size=80), st.integers(1, 90))
def test_the_ratio_is_of_the_last_tokens_only(tokens, last):
    """What stands before the last L tokens must not help the compression."""
    tail = bytes(tokens[max(0, len(tokens) - last):])
    for given_as in (tokens, torch.tensor(tokens, dtype=torch.long)):
        assert repetition_ratio(given_as, last=last) == len(tail) / len(zlib.compress(tail))
    text = list(range(200))
    assert repetition_ratio(text + [7] * 64) == repetition_ceiling() > 1 > repetition_ratio([7] * 64 + text)


def test_a_short_tail_has_a_ceiling():
    """The docstring's numbers, within a byte of zlib (other builds may pack a byte more): one token repeated reaches
    5.3 at 64 and 10.7 at 128, two 4.9 and 9.8, random text over twelve symbols 1.2 and 1.5; the paper's 10 is out of
    reach at 64, and within easy reach at its own 10,000."""
    draw = torch.Generator().manual_seed(0)
    for last, one, two, text in ((64, 5.3, 4.9, 1.2), (128, 10.7, 9.8, 1.5)):
        assert repetition_ceiling(last) == pytest.approx(one, rel=0.1)
        assert repetition_ratio([1, 2] * last, last=last) == pytest.approx(two, rel=0.1)
        random = [repetition_ratio(torch.randint(12, (last,), generator=draw), last=last) for _ in range(50)]
        assert sum(random) / 50 == pytest.approx(text, rel=0.1) and max(random) < 2
    assert repetition_ceiling(10_000) > 100
    periods = [period for period in range(1, 17) if repetition_ratio(list(range(period)) * 64) > 3]
    assert periods in ([*range(1, 10)], [*range(1, 11)])
    late_NA = torch.cat([torch.randint(12, (50, 16), generator=draw), torch.tensor([3, 5]).repeat(50, 24)], 1)
    assert max(repetition_ratio(row_A) for row_A in late_NA) < 3 and repetition_share(late_NA + 11) == 0
    assert repetition_share(late_NA + 11, last=32, threshold=2) == 1
    assert (periodic_tail(late_NA + 11).length_N >= 48).all()


@given(st.lists(st.sampled_from([0, 1, 255]), min_size=64, max_size=64), st.integers(1, 64))
def test_nothing_exceeds_the_ceiling(tokens, period):
    assert repetition_ratio((tokens[:period] * 64)[:64]) <= repetition_ceiling(64)


def test_the_share_counts_long_repetitive_answers_among_all():
    """A loop of 64 at the cap counts, the same with random text for its tail does not, nor does a loop of 40."""
    draw = torch.Generator().manual_seed(0)
    text = (11 + torch.randint(12, (70,), generator=draw)).tolist()
    answer_NA = rows([5, 6] * 35, text, [5] * 40, [5] * 63, [5] * 64, [5] * 70, length=70)
    assert repetition_share(answer_NA) == 3 / 6
    assert repetition_share(answer_NA, last=40, threshold=2.5) == 5 / 6
    assert repetition_share(answer_NA, threshold=5.1) == 2 / 6  # [5, 6] has a ceiling of 4.9
    assert repetition_share(answer_NA[1:2]) == 0.0 and math.isnan(repetition_share(answer_NA[:0]))
    behind_end = torch.cat([torch.full((1, 3), 4), torch.full((1, 67), END)], 1)
    assert repetition_share(behind_end) == 0.0  # END upon END is no repetition


def loop_means(advantage_NA, mask_NA, looped_NA):
    sums, counts = [0.0, 0.0], [0, 0]
    for a_A, m_A, l_A in zip(advantage_NA.tolist(), mask_NA.tolist(), looped_NA.tolist(), strict=True):
        for a, m, in_loop in zip(a_A, m_A, l_A, strict=True):
            if m:
                sums[not in_loop] += a
                counts[not in_loop] += 1
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    return means[0], means[1], means[0] / means[1], counts[0] / sum(counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_two_means_equal_a_loop(dtype):
    """Over tokens and not over answers; tokens outside the mask may be NaN or in a loop and change nothing."""
    draw = torch.Generator().manual_seed(0)
    advantage_NA = torch.randn(5, 9, generator=draw, dtype=torch.float64).to(dtype) - 1
    mask_NA, looped_NA = torch.rand(2, 5, 9, generator=draw) > 0.4
    expected = loop_means(advantage_NA.double(), mask_NA, looped_NA)
    noisy_NA = advantage_NA.masked_fill(~mask_NA, math.nan)
    for mask in (mask_NA, mask_NA.float()):
        assert advantage_by_repetition(noisy_NA, mask, looped_NA) == pytest.approx(expected, rel=1e-12)
    weights_NA = advantage_NA.double().abs() * mask_NA
    share = float((weights_NA * looped_NA).sum() / weights_NA.sum())
    assert looped_weight_share(noisy_NA, mask_NA, looped_NA) == pytest.approx(share, rel=1e-12)


def test_the_sign_of_the_ratio_is_kept():
    """The paper's averages are both negative: -0.03 beside -0.16 is a ratio of 0.19, and +0.03 one of -0.19."""
    looped_NA = torch.tensor([[False, False, True, True]])
    for looped, ratio in ((-0.03, 0.1875), (0.03, -0.1875)):
        advantage_NA = torch.tensor([[-0.1, -0.22, looped, looped]], dtype=torch.float64)
        result = advantage_by_repetition(advantage_NA, torch.ones(1, 4), looped_NA)
        assert result == pytest.approx((looped, -0.16, ratio, 0.5))


def test_on_the_students_own_tokens_the_mean_advantage_is_minus_the_kl():
    """Weighted by q, A = log p - log q has the mean -KL(q, p) < 0 in loops and outside: a positive mean can be noise
    only. Drawn tokens agree within four standard errors."""
    log_q_2V, log_p_2V = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    token_2A = torch.multinomial(log_q_2V.exp(), 20000, replacement=True, generator=torch.Generator().manual_seed(1))
    advantage_2A = (log_p_2V - log_q_2V).gather(1, token_2A)
    looped_2A = torch.tensor([[True], [False]]).expand(2, 20000)  # prefix 0 is a loop, prefix 1 is not
    result = advantage_by_repetition(advantage_2A, torch.ones_like(token_2A), looped_2A)
    kl_2 = (log_q_2V.exp() * (log_q_2V - log_p_2V)).sum(1)
    for mean, kl, spread in zip(result, kl_2.tolist(), advantage_2A.std(1).tolist(), strict=False):
        assert abs(mean + kl) < 4 * spread / math.sqrt(20000) and kl > 0.1


def test_thirty_percent_of_tokens_with_four_to_nine_times_the_weight():
    """0.3 x 4 / 0.7 and 0.3 x 9 / 0.7: 1.7 and 3.9 to 1. The sign of a weight does not matter, only its size."""
    looped_NA = torch.arange(10)[None] < 3
    for times, odds in ((4.0, 12 / 7), (9.0, 27 / 7)):
        weight_NA = torch.where(looped_NA, times, -1.0)
        share = looped_weight_share(weight_NA, torch.ones(1, 10), looped_NA)
        assert share / (1 - share) == pytest.approx(odds)


def test_means_of_nothing_are_nan():
    """Not 0, which would read as a result; the side that has tokens keeps its mean."""
    advantage_NA, mask_NA = torch.full((1, 3), -2.0), torch.ones(1, 3)
    nobody = advantage_by_repetition(advantage_NA, mask_NA, torch.zeros(1, 3))
    assert math.isnan(nobody.looped) and nobody.other == -2.0 and math.isnan(nobody.ratio) and nobody.looped_share == 0
    assert looped_weight_share(advantage_NA, mask_NA, torch.zeros(1, 3)) == 0.0
    assert math.isnan(looped_weight_share(advantage_NA, torch.zeros(1, 3), mask_NA))
    empty = advantage_by_repetition(*torch.zeros(3, 0, 3))
    assert all(math.isnan(value) for value in empty)


SQUARE = torch.ones(2, 2)


@pytest.mark.parametrize("call, says", [
    (lambda: truncation_share(torch.ones(3)), r"\[N, A\]"),
    (lambda: periodic_tail(torch.ones(3)), r"\[N, A\]"),
    (lambda: periodic_tail(SQUARE.long(), 0), "1 or more"),
    (lambda: periodic_tail(SQUARE.long(), rounds=1), "two rounds or more"),
    (lambda: repetition_ratio([1, 256]), "256 does not fit into one byte"),
    (lambda: repetition_ratio([-1, 1]), "-1 does not fit into one byte"),
    (lambda: repetition_ratio([0.5]), "0.5 does not fit into one byte"),
    (lambda: repetition_ratio([1], last=0), "1 or more"),
    (lambda: repetition_ratio(SQUARE.long()), "one row"),
    (lambda: repetition_share(torch.ones(3)), r"\[N, A\]"),
    (lambda: repetition_share(SQUARE.long(), threshold=10), "their ceiling is 5"),
    (lambda: advantage_by_repetition(SQUARE, SQUARE[:1], SQUARE), "mask_NA has shape"),
    (lambda: looped_weight_share(SQUARE, SQUARE, SQUARE[:, :1]), "looped_NA has shape"),
    (lambda: looped_weight_share(SQUARE[0], SQUARE[0], SQUARE[0]), r"\[N, A\]"),
])
def test_bad_input_gets_a_sentence(call, says):
    with pytest.raises(LabError, match=says):
        call()
