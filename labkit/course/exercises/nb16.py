"""Exercises of 16_scoreboard: verdicts, pairing, seeds for a width, luck, and what inconclusive means."""

import math
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import torch

from labkit.course.check import Check
from labkit.course.claims import decide
from labkit.course.reading import alike, array, called, close, number
from labkit.measure.intervals import interval, student, student_quantile

INF = math.inf
VERDICTS = ("reproduced", "partly", "not reproduced", "inconclusive")
JUDGED = ((-2.0, -1.0, (-INF, 0), None), (-2.0, 1.0, (-INF, 0), None), (0.5, 1.0, (-INF, 0), None),
          (0.45, 0.55, (0.4, 0.6), (0.3, 0.7)), (0.35, 0.5, (0.4, 0.6), (0.3, 0.7)), (0.2, 0.5, (0.4, 0.6), (0.3, 0.7)),
          (0.1, 0.2, (0.4, 0.6), (0.3, 0.7)), (0.62, 0.68, (0.4, 0.6), (0.3, 0.7)), (-3.0, 0.2, (-INF, 0), None))


def _judge(answer) -> str | None:
    for low, high, reproduced, partly in JUDGED:
        rule = SimpleNamespace(reproduced=reproduced, partly=partly, exact=False)
        expected, got = decide(rule, low, high), called(answer, low, high, reproduced, partly)
        if isinstance(got, str) and got.strip().lower() == expected:
            continue
        case = f"[{low:g}, {high:g}] with reproduced = {reproduced} and partly = {partly}"
        if not isinstance(got, str) or got.strip().lower() not in VERDICTS:
            return f"For {case} you give {got!r}. The four words are: {', '.join(VERDICTS)}."
        if expected == "inconclusive":
            return f"{case} lies across a border: numbers inside and outside fit the data, so it is not {got}."
        if expected == "partly":
            return f"For {case} you say {got}. Look at the second region before giving up."
        return f"For {case} you say {got}, the ledger says {expected}. The whole interval decides."
    return None


def _arms(seed: int) -> tuple[dict[int, float], dict[int, float]]:
    """Five seeds with common luck; the second arm's order is another one."""
    rng = np.random.default_rng(seed)
    luck, noise = 3 * rng.standard_normal(5), rng.standard_normal((2, 5))
    ours = {10 + n: float(luck[n] + 0.3 * noise[0, n] - 1) for n in range(5)}
    baseline = {10 + n: float(luck[n] + 0.3 * noise[1, n]) for n in (3, 0, 4, 2, 1)}
    return ours, baseline


def _paired(answer) -> str | None:
    for seed in (0, 1, 2):
        ours, baseline = _arms(seed)
        got, expected = array(called(answer, ours, baseline)), interval(ours, baseline)[1:]
        if got.shape != (2,):
            return f"Return two numbers, (low, high); yours has the shape {got.shape}."
        if alike(got, expected, within=2e-3):
            continue
        d_N, half = np.array([ours[n] - baseline[n] for n in ours]), (got[1] - got[0]) / 2
        mixed_N = np.array(list(ours.values())) - np.array(list(baseline.values()))
        if alike(got, student(mixed_N, 0.95), within=2e-3):
            return "You pair by position. The seeds of the two arms come in different orders."
        if abs(half - 1.96 * d_N.std(ddof=1) / 5**0.5) < 1e-3:
            return "1.96 is for many seeds. With five of them Student's quantile is 2.776."
        if abs(half - 2.776 * d_N.std() / 5**0.5) < 1e-3:
            return "The spread is divided by N; an estimate from N values divides by N - 1 (ddof=1)."
        if abs(half - 2.776 * d_N.std(ddof=1)) < 1e-3:
            return "That is the spread of one seed. A mean of N seeds has sd / root N."
        if got[0] > got[1]:
            return "The low end comes first."
        if half > expected[1] - expected[0]:
            return "Far too wide: take the difference seed by seed first, then its mean and spread."
        return f"You give [{got[0]:.3f}, {got[1]:.3f}]. In the middle stands the mean of ours - baseline; is it there?"
    return None


def _needed(sd: float, half: float) -> int:
    return next(n for n in range(2, 10_000) if student_quantile(0.975, n - 1) * sd / math.sqrt(n) <= half)


def _seeds_for(answer) -> str | None:
    for sd, half in ((1.0, 1.0), (1.0, 0.5), (0.02, 0.03), (2.0, 0.4)):
        got, expected = number(called(answer, sd, half)), _needed(sd, half)
        if close(got, expected):
            continue
        case = f"sd {sd:g}, half width {half:g}"
        if got % 1:
            return f"For {case} you give {got:g}: seeds come whole."
        if got == math.ceil((1.96 * sd / half) ** 2):
            return f"{case}: {got:g} would do with 1.96, but with few seeds Student's quantile is larger."
        if got == expected - 1:
            return f"{case}: with {got:g} seeds the interval is still too wide."
        if got > expected:
            return f"{case}: {got:g} are enough, and so are fewer."
        return f"{case}: {got:g} are too few. Compute the half width at that N."
    return None


def _needed_by_halving(sd: float, half: float) -> float:
    few, many = 1, 256
    while many - few > 1:
        N = (few + many) // 2
        few, many = (few, N) if student_quantile(0.975, N - 1) * sd <= half * N**0.5 else (N, many)
    return float(many)


def _luck(answer) -> str | None:
    for rows in (1, 40, 300):
        got = array(called(answer, rows))
        if got.shape != (2,):
            return "Return two numbers: the average, and the chance of at least one."
        mean, chance = got
        if close(mean, 0.05 * rows, rel=1e-6):
            return "5% miss the true value, half of them on each side. The rule looks at one side."
        if not close(mean, 0.025 * rows, rel=1e-3):
            return f"For {rows} rows you expect {mean:g}. Which share of intervals lies wholly below a true 0?"
        if chance > 1 or (rows > 1 and close(chance, 0.025 * rows, rel=1e-6)):
            return f"For {rows} rows your chance is {chance:g}. Adding chances counts the cases with two of them twice."
        if rows > 1 and close(chance, 0.975**rows, rel=1e-6):
            return "That is the chance of none at all."
        if not close(chance, 1 - 0.975**rows, rel=1e-3):
            return f"For {rows} rows your chance is {chance:.3g}. Begin with the chance that none is reproduced."
    return None


def _inconclusive(answer) -> str | None:
    values = array(list(answer.values()) if isinstance(answer, Mapping) else answer)
    if values.shape != (5,) or not np.isfinite(values).all():
        return "Five finite numbers are asked for, one difference a seed."
    mean, low, high = interval(values)
    if mean <= 0:
        return f"Their mean is {mean:+.3g}, on the claim's side. Put it above 0."
    if low >= 0:
        return f"The interval [{low:.3g}, {high:.3g}] lies wholly outside the region: that one is not reproduced."
    return None


def _right_judge(low, high, reproduced, partly):
    for name, region in (("reproduced", reproduced), ("partly", partly)):
        if region and region[0] < low and high < region[1]:
            return name
    touches = [not (high < left or low > right) for left, right in filter(None, (reproduced, partly))]
    return "inconclusive" if any(touches) else "not reproduced"


def _judge_by_distance(low, high, reproduced, partly):
    for name, region in {"reproduced": reproduced, "partly": partly}.items():
        if region is not None and min(low - region[0], region[1] - high) > 0:
            return name
    outside = all(max(left - high, low - right) > 0 for left, right in filter(None, [reproduced, partly]))
    return "not reproduced" if outside else "inconclusive"


def _by_middle(low, high, reproduced, partly):
    return _right_judge((low + high) / 2, (low + high) / 2, reproduced, partly)


def _strict(low, high, reproduced, partly):
    verdict = _right_judge(low, high, reproduced, partly)
    return "not reproduced" if verdict == "inconclusive" else verdict


def _right_paired(ours, baseline, t=2.776, ddof=1, root=5**0.5):
    d_N = np.array([ours[seed] - baseline[seed] for seed in sorted(ours)])
    half = t * d_N.std(ddof=ddof) / root
    return d_N.mean() - half, d_N.mean() + half


def _paired_by_hand(ours, baseline):
    d = [ours[seed] - baseline[seed] for seed in ours]
    mean = sum(d) / 5
    half = 2.776 * (sum((x - mean) ** 2 for x in d) / 4 / 5) ** 0.5
    return torch.tensor([mean - half, mean + half])


def _unpaired(ours, baseline):
    a, b = np.array(list(ours.values())), np.array(list(baseline.values()))
    half = 2.306 * math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 5)
    return a.mean() - b.mean() - half, a.mean() - b.mean() + half


CHECKS = {
    "16.1": Check(
        "Invent five paired differences with a mean above 0 that leave the claim 'below 0' inconclusive.",
        6, "easy", "The interval must hold 0: make the differences scatter more than their mean.", _inconclusive,
        right=[[-2.0, -1.0, 0.5, 1.0, 2.0], np.array([3.0, -1, 0, 0, 0], np.float32),
               dict(enumerate([5, -4, 1, 1, 1]))],
        wrong=[([1.0, 1.1, 0.9, 1.0, 1.2], "that one is not reproduced"), ([-1.0, -2, 0.5, 1, -3], "claim's side"),
               ([1.0, -1.0, 0.5], "Five finite"), ([1.0] * 5, "not reproduced"), ([0.0] * 5, "claim's side")]),
    "16.2": Check(
        "Write judge(low, high, reproduced, partly): the verdict of an interval.",
        6, "medium",
        "Inside one region? Then its name. Apart from both? Then not reproduced. What is left is inconclusive.",
        _judge,
        right=[_right_judge, _judge_by_distance, lambda *interval: _right_judge(*interval).capitalize()],
        wrong=[(_by_middle, "across a border"), (_strict, "across a border"),
               (lambda low, high, reproduced, partly: _right_judge(low, high, reproduced, None), "second region"),
               (lambda low, high, reproduced, partly: "unclear", "four words"),
               (lambda low, high, reproduced, partly: True, "four words")]),
    "16.3": Check(
        "Write luck(rows): how many rows without an effect are reproduced on average, and the chance of at least one.",
        5, "medium", "One row: 2.5%. All escape with a chance of 0.975 to the power of their number.", _luck,
        right=[lambda rows: (0.025 * rows, 1 - 0.975**rows),
               lambda rows: np.array([rows / 40, -np.expm1(rows * np.log(0.975))]),
               lambda rows: [sum(0.025 for _ in range(rows)), 1 - math.prod(0.975 for _ in range(rows))]],
        wrong=[(lambda rows: (0.05 * rows, 1 - 0.95**rows), "one side"),
               (lambda rows: (0.025 * rows, 0.025 * rows), "twice"),
               (lambda rows: (0.025 * rows, 0.975**rows if rows > 1 else 0.025), "none at all"),
               (lambda rows: (rows / 2, 0.5), "wholly below"), (lambda rows: 0.025 * rows, "two numbers"),
               (lambda rows: (0.025 * rows, 1 - 0.95**rows), "Begin with")]),
    "16.4": Check(
        "Write paired(ours, baseline): (low, high) of the 95% interval of ours minus baseline.",
        6, "medium", "One difference for each seed, by its name. Then mean, sd with ddof=1, and 2.776 sd / root 5.",
        _paired,
        right=[_right_paired, lambda ours, baseline: interval(ours, baseline)[1:],
               lambda a, b: student(np.array([a[n] - b[n] for n in b]), 0.95), _paired_by_hand],
        wrong=[(lambda a, b: student(np.array(list(a.values())) - np.array(list(b.values())), 0.95), "by position"),
               (_unpaired, "seed by seed"), (lambda a, b: _right_paired(a, b, t=1.96), "1.96"),
               (lambda a, b: _right_paired(a, b, ddof=0), "ddof=1"),
               (lambda a, b: _right_paired(a, b, root=1), "root N"),
               (lambda a, b: interval(a, b), "two numbers"),
               (lambda a, b: _right_paired(b, a), "In the middle"),
               (lambda a, b: _right_paired(a, b)[::-1], "low end")]),
    "16.5": Check(
        "Write seeds_for(sd, half): the fewest seeds for which the interval's half width is at most half.",
        6, "hard",
        "Student's quantile depends on N, so try N = 2, 3, 4, ... until the half width is small enough.", _seeds_for,
        right=[_needed, lambda sd, half: np.int64(_needed(sd, half)), _needed_by_halving],
        wrong=[(lambda sd, half: math.ceil((1.96 * sd / half) ** 2), "1.96"),
               (lambda sd, half: (1.96 * sd / half) ** 2, "whole"),
               (lambda sd, half: _needed(sd, half) - 1, "still too wide"),
               (lambda sd, half: _needed(sd, half) + 3, "so are fewer"), (lambda sd, half: 2, "too few")]),
}
