"""Exercises of 03_lighthouse_attention (Peng, Ghosh, Quesnelle, arXiv 2605.06554)."""

import numpy as np
import torch

from labkit.course.check import Check
from labkit.course.reading import alike, array, called, close, number


def _length(answer) -> str | None:
    for N, L, p, k in ((256, 3, 4, 8), (2**20, 4, 4, 4096), (98_304, 3, 2, 1536)):
        got, expected = number(called(answer, N, L, p, k)), N // p ** (L - 1) + (L - 1) * p * k
        if close(got, expected, rel=1e-6):
            continue
        if close(got, expected - (L - 1) * (p - 1) * k, rel=1e-6):
            return "Each of the k parents of a level brings p children, not one."
        if close(got, N / p**L + (L - 1) * p * k, rel=1e-6):
            return "The coarsest of L levels is level L - 1: its windows are p^(L-1) long."
        if close(got, N / p ** (L - 1) + L * p * k, rel=1e-6):
            return "There are L levels, and between them L - 1 steps down."
        return f"At N={N}, L={L}, p={p}, k={k} you have {got:,.0f}. Add up the coarsest level and all children."
    return None


def _speed(answer) -> str | None:
    for share, speed in ((6 / 16, 1e9), (6 / 16, 2.76), (0.25, 4.0), (0.0, 3.0)):
        got, expected = number(called(answer, share, speed)), 1 / (share + (1 - share) / speed)
        if close(got, expected, rel=1e-3):
            continue
        if close(got, share + (1 - share) * speed, rel=1e-3):
            return "You averaged speeds. Add up times: each stage takes its share of the steps divided by its speed."
        if close(got, 1 / (1 - share + share / speed), rel=1e-3):
            return "The dense share is the one that is not sped up."
        if close(got, 1 / expected, rel=1e-3):
            return "That is the time. How many times as fast is the run?"
        return f"With {share:.0%} dense steps and a speed of {speed:g} you have {got:.4g}."
    return None


def _entry_range(answer) -> str | None:
    for level, i, p in ((0, 7, 4), (1, 3, 4), (2, 2, 4), (3, 1, 2)):
        f = p**level
        got, expected = array(called(answer, level, i, p)), (i * f + f - 1, i * f + 2 * f - 2)
        if got.shape != (2,):
            return "Return two numbers: the first and the last position."
        if alike(got, expected):
            continue
        if alike(got, expected[::-1]):
            return "The two are exchanged: the first position comes first."
        if alike(got, (expected[0], expected[1] + 1)):
            return "One too many: the last position is reached too, so from first to last there are p^l."
        if alike(got, (i * f, i * f + f - 1)):
            return "Those are the tokens that the entry sums up. Its first tokens would hear of its last: a leak."
        if alike(got, (i * f + f, i * f + 2 * f - 1)):
            return "Causal, but one late: the last token that it sums up may hear of it."
        return f"For level {level}, entry {i}, p={p} you say {got.tolist()}. It starts at its last token: p^l long."
    return None


def _peeks(answer) -> str | None:
    from labkit.models.lighthouse import Lighthouse

    def at(parts):
        return [torch.as_tensor(part, dtype=torch.float64).reshape(1, 1, 64, 2) for part in parts]

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 64, 2, generator=generator, dtype=torch.float64)
    answered = array(called(answer, start[0].numpy()))
    if answered.shape != (64, 2):
        return f"The queries had the shape (64, 2) and came back as {answered.shape}."
    if not alike(answered[:-1], start[0][:-1]):
        return "Earlier queries changed too. Only the last one may."
    changed = torch.cat([start[0][:-1], torch.tensor(answered[-1:].tolist(), dtype=torch.float64)])
    method = Lighthouse(4, 3, 4, 4)
    moved = (method(*at((changed, start[1], start[2]))) - method(*at(start))).abs().sum((0, 1, 3)) > 0
    if not moved[:48].any():
        return "No output before the last window changed. What must the last query be, to get into the choice?"
    return None


def _tie(answer) -> str | None:
    if close(answer, 2**21, within=0.5):
        return None
    if close(answer, 21, within=0.5):
        return "That is the exponent. N itself is asked for."
    if close(answer, 2**24, within=0.5):
        return "2^24 is where whole numbers run out. The keys of parents have a fraction of 2^-4 (L = 5)."
    if close(answer, 2**20, within=0.5):
        return "At 2^20 the step of fp32 is still 1/16 just below N, and 2^-4 is exact."
    return "Just below N = 2^n, neighbouring fp32 numbers are 2^(n-24) apart. When is that more than 2^-4?"


CHECKS = {
    "03.1": Check(
        "Write length(N, L, p, k): the rows S of the short sequence.",
        4, "easy",
        "The coarsest level has N / p^(L-1) entries; each of L - 1 steps down adds the p children of k parents.",
        _length,
        right=[lambda N, L, p, k: N // p ** (L - 1) + (L - 1) * p * k,
               lambda N, L, p, k: np.float64(N / p ** (L - 1) + (L - 1) * p * k)],
        wrong=[(lambda N, L, p, k: N // p ** (L - 1) + (L - 1) * k, "brings p children"),
               (lambda N, L, p, k: N / p**L + (L - 1) * p * k, "level L - 1"),
               (lambda N, L, p, k: N / p ** (L - 1) + L * p * k, "L - 1 steps"), (5, "A function is asked for")]),
    "03.2": Check(
        "Write speed_up_of(share, speed): a share of the steps is dense, the others are `speed` times as fast.",
        4, "easy", "Add the times of the two stages.", _speed,
        right=[lambda share, speed: 1 / (share + (1 - share) / speed), lambda a, s: s / (a * s + 1 - a)],
        wrong=[(lambda share, speed: share + (1 - share) * speed, "Add up times"),
               (lambda share, speed: 1 / (1 - share + share / speed), "not sped up"),
               (lambda share, speed: share + (1 - share) / speed, "the time")]),
    "03.3": Check(
        "Write reached(level, i, p): the first and last position that entry i of a level writes to.",
        6, "medium",
        "The first one is the last token of its window; it reaches as many positions as its window is long.",
        _entry_range,
        right=[lambda level, i, p: (i * p**level + p**level - 1, i * p**level + 2 * p**level - 2),
               lambda level, i, p: [*torch.arange((i + 1) * p**level - 1, (i + 2) * p**level - 1)[[0, -1]]],
               lambda level, i, p: np.array([(i + 1) * p**level - 1, (i + 2) * p**level - 2])],
        wrong=[(lambda level, i, p: (i * p**level, (i + 1) * p**level - 1), "a leak"),
               (lambda level, i, p: ((i + 1) * p**level, (i + 2) * p**level - 1), "one late"),
               (lambda level, i, p: (i * p**level + p**level - 1, i * p**level + 2 * p**level - 1), "One too many"),
               (lambda level, i, p: (i * p**level + 2 * p**level - 2, i * p**level + p**level - 1), "exchanged"),
               (lambda level, i, p: p**level, "two numbers"), (lambda level, i, p: (0, 0), "you say")]),
    "03.4": Check(
        "Write peek(q_NK): change the last of 64 queries so that outputs before the last window of 16 change.",
        6, "medium", "Scores are norms. The loudest token of the tile gets its window expanded.", _peeks,
        right=[lambda q: _with_last(q, 100.0), lambda q: _with_last(q, -50.0),
               lambda q: _with_last(q, 100.0).float(),
               lambda q: np.concatenate([np.asarray(q)[:-1], np.full((1, 2), 1e3)])],
        wrong=[(lambda q: q, "No output before"), (lambda q: 100 * q, "Only the last one"),
               (lambda q: q[:32], "came back as"), (lambda q: q.zero_(), "Only the last one")]),
    "03.5": Check(
        "p = 2, L = 5: the smallest power of two N at which fp32 sort keys i p^l and (i + 1) p^l - 2^-l tie.",
        6, "hard", "fp32 has 24 bits. How far apart are neighbouring numbers just below N?", _tie,
        right=[2**21, 2.0**21, np.int64(2_097_152), torch.tensor(2**21)],
        wrong=[(21, "the exponent"), (2**24, "whole numbers"), (2**20, "still 1/16"), (1000, "Just below")]),
}


def _with_last(q_NK, factor):
    """The queries with the last one multiplied."""
    q_NK = q_NK.clone()
    q_NK[-1] *= factor
    return q_NK
