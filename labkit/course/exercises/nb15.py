"""Exercises of 15_g_zero (G-Zero, arXiv 2605.09959)."""

import numpy as np
import torch

from labkit.course.check import Check
from labkit.course.reading import alike, array, called, close, number


def _divergence(answer) -> str | None:
    for p, other in (((0.8, 0.2), (0.5, 0.5)), ((0.1, 0.6, 0.3), (0.3, 0.3, 0.4))):
        p, other = np.array(p), np.array(other)
        got, want = number(called(answer, p, other)), float((p * np.log(p / other)).sum())
        if close(got, want, within=1e-6):
            continue
        if close(got, float((other * np.log(other / p)).sum()), within=1e-6):
            return "That is the mean over answers drawn WITH the hint. Who writes the answer that delta scores?"
        if close(got, -want, within=1e-6):
            return "The sign is turned: how much less likely does the hint make the plain answer?"
        if close(got, want / np.log(2), within=1e-6):
            return "That is in bits. The course counts in nats: natural logarithms."
        if close(got, float(np.log(p / other).mean()), within=1e-6):
            return "The answers are not equally likely: weigh each with the probability that it is drawn."
        return f"For p={p.tolist()} and {other.tolist()} you say {got:.4f}. Sum p(a) (log p(a) - log p'(a)) over a."
    return None


def _reward(answer) -> str | None:
    for delta, length, share in ((0.08, 350, 1 / 128), (0.3, 120, 0.25), (-9.0, 200, 0.0)):
        got = number(called(answer, delta, length, share))
        penalty = 0.03 * max(0, length - 200) / 100
        if close(got, max(delta, -5) - share - penalty, within=1e-9):
            continue
        if close(got, delta - share - penalty, within=1e-9):
            return "Nearly: a delta below -5 counts as -5."
        if close(got, max(delta, -5) - share - 0.03 * (length - 200) / 100, within=1e-9):
            return "A hint of 120 characters earns nothing for being short: the penalty has a hinge at 200."
        if close(got, max(delta, -5) - penalty, within=1e-9):
            return "The share of near duplicates is missing."
        return f"For delta={delta}, {length} characters and share={share:.4f} you say {got:.4f}. Three terms."
    return None


def _advantages(answer) -> str | None:
    values = array(answer)
    if values.shape != (2,):
        return "Give two numbers: the advantage of one of the fifteen, and of the sixteenth."
    mean = (15 * 0.05 - 1 - 1 / 128) / 16
    want = np.array([0.05 - mean, -1 - 1 / 128 - mean])
    if alike(values, want, within=0.001):
        return None
    if alike(values, want[::-1], within=0.001):
        return "The two are exchanged."
    if alike(values, [0.05, -1 - 1 / 128], within=0.001):
        return "Those are the rewards. An advantage compares with the group's mean."
    spread = np.std([0.05] * 15 + [-1 - 1 / 128], ddof=1)
    if alike(values, want / spread, within=0.01):
        return "You divided by the standard deviation; this trainer does not."
    return "The mean of sixteen rewards first, then each reward minus it."


def _margins(answer) -> str | None:
    values = array(answer)
    if values.shape != (2,):
        return "Give two numbers: the normalised margin and the summed one."
    if alike(values, [-0.4, 4.0], within=1e-6):
        return None
    if alike(values, [4.0, -0.4], within=1e-6):
        return "The two are exchanged."
    if alike(values, [-0.2, 2.0], within=1e-6):
        return "beta is missing."
    if alike(values, [0.4, -4.0], within=1e-6):
        return "The margin is chosen minus rejected."
    return "beta times (chosen - rejected): once with each sum divided by its number of tokens, once without."


def _seen(answer) -> str | None:
    for pool, steps, batch in ((730, 50, 8), (100, 50, 8), (4000, 100, 16)):
        got = number(called(answer, pool, steps, batch))
        if close(got, min(pool, steps * batch), within=1e-9):
            continue
        if close(got, steps * batch, within=1e-9):
            return "Pairs that are met a second time count once."
        if close(got, pool, within=1e-9):
            return "Training ends after so many steps, whatever is left."
        return f"For a pool of {pool}, {steps} steps of {batch} you say {got:g}."
    return None


PLAIN, GOOD = np.array([0.5, 0.3, 0.2]), np.array([0.9, 0.06, 0.04])


def _break(answer) -> str | None:
    other = array(called(answer))
    if other.shape != (3,) or (other <= 0).any() or not close(other.sum(), 1.0, within=1e-6 + other.slack):
        return "Return three probabilities above 0 that sum to 1."
    kl, good = (float((PLAIN * np.log(PLAIN / each)).sum()) for each in (other, GOOD))
    if other[0] >= PLAIN[0]:
        return f"With your hint the right answer has {other[0]:.2f}, not below 0.5: it does no harm."
    if kl <= good:
        return f"It does harm, but the proposer would pass it by: {kl:.3f} nats against {good:.3f} of the good hint."
    return None


CHECKS = {
    "15.1": Check(
        "Write pairs_seen(pool, steps, batch): how many different pairs a run of phase 3 trains on.",
        4, "easy", "Pairs are taken in order; a run may end before the pool does.", _seen,
        right=[lambda pool, steps, batch: min(pool, steps * batch),
               lambda pool, steps,
               batch: len({n for step in range(steps) for n in range(pool)[step * batch:(step + 1) * batch]}),
               lambda pool, steps, batch: np.float64(pool if pool < steps * batch else steps * batch)],
        wrong=[(lambda pool, steps, batch: steps * batch, "count once"),
               (lambda pool, steps, batch: pool, "ends after"),
               (lambda pool, steps, batch: max(pool, steps * batch), "ends after"),
               (lambda pool, steps, batch: steps, "you say")]),
    "15.2": Check(
        "Write reward(delta, length, share): what the code pays for a readable proposal.",
        4, "easy", "Delta (not below -5), minus the share, minus 0.03 for each 100 characters beyond 200.", _reward,
        right=[lambda delta, length, share: max(delta, -5) - share - 0.03 * max(0, length - 200) / 100,
               lambda delta, length, share: np.maximum(delta, -5) - np.maximum(length - 200, 0) * 3e-4 - share,
               lambda delta, length, share: (-5 if delta < -5 else delta) - share
               - (0.0003 * (length - 200) if length > 200 else 0)],
        wrong=[(lambda delta, length, share: delta - share - 0.03 * max(0, length - 200) / 100, "counts as -5"),
               (lambda delta, length, share: max(delta, -5) - share - 0.03 * (length - 200) / 100, "hinge at 200"),
               (lambda delta, length, share: max(delta, -5) - 0.03 * max(0, length - 200) / 100, "near duplicates"),
               (lambda delta, length, share: max(delta, -5) + share - 0.03 * max(0, length - 200) / 100, "Three terms"),
               (lambda delta, length, share: max(delta, -5) - share - 0.03 * (length > 200), "Three terms"),
               (lambda delta, length, share: delta, "Three terms")]),
    "15.3": Check(
        "Fifteen proposals earn 0.05 each, the sixteenth cannot be read and has -1 - 1/128: their two advantages.",
        4, "easy", "The mean of the sixteen is below zero.", _advantages,
        right=[(0.0661, -0.9917), [0.066, -0.992], np.array([0.05, -1.0078125]) + 0.0161133,
               torch.tensor([0.0661, -0.9917]).half()],
        wrong=[((-0.9917, 0.0661), "exchanged"), ((0.05, -1.0078), "rewards"), ((0.25, -3.75), "standard deviation"),
               ((0.1, -1.0), "mean of sixteen"), (0.066, "two numbers")]),
    "15.4": Check(
        "Write mean_shift(p, other): the mean of n * delta over answers drawn without the hint.",
        4, "medium",
        "delta of one answer a is log p(a) - log p'(a), over n. Each a is drawn with probability p(a).", _divergence,
        right=[lambda p, other: (p * np.log(p / other)).sum(),
               lambda p, other: sum(a * np.log(a) - a * np.log(b) for a, b in zip(p, other, strict=True)),
               lambda p, other: torch.nn.functional.kl_div(other.log(), p, reduction="sum"),
               lambda p, other: (p @ (p.log() - other.log())).float()],
        wrong=[(lambda p, other: (other * np.log(other / p)).sum(), "WITH the hint"),
               (lambda p, other: (p * np.log(other / p)).sum(), "sign is turned"),
               (lambda p, other: (p * np.log2(p / other)).sum(), "in bits"),
               (lambda p, other: np.log(p / other).mean(), "not equally likely"),
               (lambda p, other: np.abs(p - other).sum(), "Sum p(a)")]),
    "15.5": Check(
        "Log-ratio sums -3 over 10 tokens (chosen) and -5 over 50 (rejected), beta 2: both margins.",
        5, "medium", "Normalised: the sums become -0.3 and -0.1 a token.", _margins,
        right=[(-0.4, 4.0), [2 * (-3 / 10 + 5 / 50), 2 * (-3 + 5)], torch.tensor([-0.4, 4.0])],
        wrong=[((4.0, -0.4), "exchanged"), ((-0.2, 2.0), "beta is missing"), ((0.4, -4.0), "chosen minus"),
               ((-0.8, -16), "divided by its number"), (4.0, "two numbers"), ((-0.4, 2.0), "once with"),
               ((-0.8, 4.0), "once with")]),
    "15.6": Check(
        "Write bad_hint(): three probabilities that move further from (0.5, 0.3, 0.2) than (0.9, 0.06, 0.04) does, and "
        "make the first, right answer rarer.",
        6, "hard", "KL(p, p') becomes large where p' nearly forbids what p does often.", _break,
        right=[lambda: (0.01, 0.495, 0.495), lambda: np.array([0.05, 0.05, 0.9]),
               lambda: torch.tensor([-9.0, 0.0, 0.0]).softmax(0)],
        wrong=[(lambda: (0.98, 0.01, 0.01), "no harm"), (lambda: (0.45, 0.3, 0.25), "pass it by"),
               (lambda: (0.5, 0.5), "three probabilities"),
               (lambda: (0.0, 0.5, 0.5), "above 0"), (lambda: (0.1, 0.1, 0.1), "sum to 1")]),
}
