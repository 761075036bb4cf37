"""Exercises of 10_opd_repetition (length inflation in on-policy distillation, arXiv 2604.08527)."""

import math
import zlib

import numpy as np
import torch

from labkit.course.check import Check
from labkit.course.reading import called, close, number


def _odds(c: float) -> float:
    return math.log(c / (1 - c))


def _critical(answer) -> str | None:
    for wrong, right in ((0.98, 0.02), (0.97, 0.02), (0.6, 0.02), (0.9, 0.3)):
        got, expected = number(called(answer, wrong, right)), -_odds(right) / (_odds(wrong) - _odds(right))
        if close(got, expected, within=1e-3):
            continue
        if close(got, 1 - expected, within=1e-3):
            return f"At c_w = {wrong}, c_r = {right} that is the share of right sums, 1 - e*."
        if close(got, (0.5 - right) / (wrong - right), within=1e-3):
            return "That is where the mean probability is 1/2: the forward KL. The reverse KL averages log-odds."
        return f"At c_w = {wrong}, c_r = {right} you say {got:.4g}. Set the mean of the two log-odds to 0."
    return None


def _by_bisection(wrong, right):
    """The critical error by halving an interval."""
    low, high = 0.0, 1.0
    for _ in range(40):
        e = (low + high) / 2
        low, high = (e, high) if e * _odds(wrong) + (1 - e) * _odds(right) < 0 else (low, e)
    return low


def _step_tokens(answer) -> str | None:
    for x in (0.0, 0.4, 0.9):
        got, waits = number(called(answer, x)), x / (1 - x)
        if close(got, 3 + 2 * waits, within=1e-3):
            continue
        if x and close(got, 3 + waits, within=1e-3):
            return "A WAIT brings two tokens: the ? and the sum that follows it."
        if x and close(got, 3 + 2 * x, within=1e-3):
            return "That allows one WAIT a step. After the new sum it may be said again."
        if close(got, 3 / (1 - x), within=1e-3):
            return "Only the sum is stated again, not the whole step."
        return f"At x = {x} you say {got:.4g}. The number of WAITs is geometric: its mean is x/(1-x)."
    return None


def _mean_advantage(answer) -> str | None:
    for q, p in (([0.2, 0.3, 0.5], [0.5, 0.25, 0.25]), ([0.9, 0.05, 0.05], [0.3, 0.3, 0.4])):
        q_V, p_V = np.array(q), np.array(p)
        got, kl = number(called(answer, q_V, p_V)), float((q_V * np.log(q_V / p_V)).sum())
        if close(got, -kl, within=1e-6):
            continue
        if close(got, kl, within=1e-6):
            return "The size is right. A is log p - log q: which of the two is larger where q likes to go?"
        if close(got, float(np.log(p_V / q_V).mean()), within=1e-6):
            return "That gives all tokens the same weight. The student draws them with probability q."
        if close(got, float((p_V * np.log(p_V / q_V)).sum()), within=1e-6):
            return "There the teacher draws the tokens. On-policy the student does."
        return f"For q = {q} and p = {p} you say {got:.4g}. Weigh log p - log q by who draws the token."
    return None


def _loop(length: int) -> bytes:
    return (b"5?" * length)[:length]


def _ceiling(answer) -> str | None:
    for length in (64, 128, 1000):
        got, packed = number(called(answer, length)), len(zlib.compress(_loop(length)))
        if abs(got / (length / packed) - 1) < 0.02:
            continue
        if abs(got * length / packed - 1) < 0.02:
            return "Upside down: bytes over compressed bytes."
        if abs(got * len(zlib.compress(b"5?" * length)) / (2 * length) - 1) < 0.02:
            return f"b'5?' * L has 2 L bytes. Cut the loop at L = {length}."
        return f"At L = {length} you say {got:.3g}. len(zlib.compress(loop)) counts the compressed bytes."
    return None


def _pull(answer) -> str | None:
    for share, factor in ((0.3, 4), (0.3, 9), (0.5, 2)):
        got = number(called(answer, share, factor))
        if close(got, share * factor / (1 - share), within=1e-3):
            continue
        if close(got, share * factor / (share * factor + 1 - share), within=1e-3):
            return "That is their share of the whole. How many times the others' total is it?"
        if close(got, share * factor, within=1e-3):
            return "The others are 1 - share of the tokens, not all of them."
        return f"At share {share} and factor {factor} you say {got:.4g}. Put both weights side by side, theirs first."
    return None


def _forward(answer) -> str | None:
    for e, wrong, right in ((0.77, 0.98, 0.02), (0.3, 0.9, 0.1)):
        got = number(called(answer, e, wrong, right))
        if close(got, e * wrong + (1 - e) * right, within=1e-4):
            continue
        if close(got, 1 / (1 + math.exp(-e * _odds(wrong) - (1 - e) * _odds(right))), within=1e-3):
            return "That is the reverse KL's answer. With the forward KL the teacher's side is averaged as it is."
        if close(got, (1 - e) * wrong + e * right, within=1e-4):
            return "e is the share of wrong sums: it belongs to c_w."
        return f"At e = {e} you say {got:.4g}. Differentiate -(c log x + (1-c) log(1-x)), averaged over c."
    return None


CHECKS = {
    "10.1": Check(
        "Write pull(share, factor): the weight of the heavier tokens over the weight of all others.",
        5, "easy", "Weights: share * factor against (1 - share) * 1.", _pull,
        right=[lambda share, factor: share * factor / (1 - share), lambda a, f: f / (1 / a - 1),
               lambda a, f: sum([f] * round(1000 * a)) / round(1000 * (1 - a)),
               lambda a, f: np.float16(a * f / (1 - a))],
        wrong=[(lambda a, f: a * f / (a * f + 1 - a), "share of the whole"), (lambda a, f: a * f, "not all of them"),
               (lambda a, f: f, "side by side"),
               (lambda a, f: (1 - a) / (a * f), "side by side")]),
    "10.2": Check(
        "Write critical(c_w, c_r): the error rate at which the student's WAIT has probability 1/2.",
        5, "easy", "Probability 1/2 is log-odds 0: e times one number plus (1 - e) times another is 0.", _critical,
        right=[lambda w, r: math.log((1 - r) / r) / (math.log((1 - r) / r) + math.log(w / (1 - w))),
               lambda w, r: torch.logit(r) / (torch.logit(r) - torch.logit(w)), _by_bisection],
        wrong=[(lambda w, r: _odds(w) / (_odds(w) - _odds(r)), "share of right sums"),
               (lambda w, r: (0.5 - r) / (w - r), "forward KL"),
               (lambda w, r: math.log(r / (1 - r)), "mean of the two log-odds"),
               (lambda w, r: 0.5, "mean of the two log-odds")]),
    "10.3": Check(
        "Write step_tokens(x): the expected tokens of a step if each statement is followed by WAIT with probability x.",
        5, "medium", "Three tokens at least; each WAIT brings two more. How many WAITs are expected?", _step_tokens,
        right=[lambda x: 3 + 2 * x / (1 - x), lambda x: 1 + 2 / (1 - x),
               lambda x: 3 + sum(2 * x**n for n in range(1, 500)), lambda x: torch.tensor((3 - x) / (1 - x)).half()],
        wrong=[(lambda x: 3 + x / (1 - x), "two tokens"), (lambda x: 3 + 2 * x, "one WAIT a step"),
               (lambda x: 3 / (1 - x), "whole step"), (lambda x: 5.0, "geometric")]),
    "10.4": Check(
        "Write mean_advantage(q_V, p_V): the exact mean of log p_y - log q_y over tokens y that the student q draws.",
        5, "medium", "A sum over v of probability times advantage. Compare it with KL(q, p).", _mean_advantage,
        right=[lambda q, p: (q * (p.log() - q.log())).sum(), lambda q, p: float(-(q * (q / p).log()).sum()),
               lambda q, p: -torch.nn.functional.kl_div(p.log(), q, reduction="sum"),
               lambda q, p: sum(a * math.log(b / a) for a, b in zip(q, p, strict=True)),
               lambda q, p: np.average(np.log(p / q), weights=q), lambda q, p: (q.half() @ (p / q).log().half())],
        wrong=[(lambda q, p: (q * (q / p).log()).sum(), "larger"), (lambda q, p: (p / q).log().mean(), "same weight"),
               (lambda q, p: (p * (p / q).log()).sum(), "teacher draws"), (lambda q, p: (p - q).sum(), "who draws"),
               (lambda q, p: (q * (p / q).log()), "One number")]),
    "10.5": Check(
        "Write ceiling(L): bytes over zlib bytes for the loop 5?5?5?... of L bytes.",
        6, "medium", "zlib.compress takes bytes; a loop costs it a dozen bytes, whatever its length.", _ceiling,
        right=[lambda n: n / len(zlib.compress((b"5?" * n)[:n])),
               lambda n: n / len(zlib.compress(("5?" * (n // 2)).encode(), 9))],
        wrong=[(lambda n: len(zlib.compress(_loop(n))) / n, "Upside down"),
               (lambda n: 2 * n / len(zlib.compress(b"5?" * n)), "Cut the loop"), (lambda n: 7.0, "counts")]),
    "10.6": Check(
        "Write forward_wait(e, c_w, c_r): the best WAIT probability under the forward KL.",
        7, "hard",
        "The forward KL is a cross-entropy: the student is asked to match an average of the teacher's answers.",
        _forward,
        right=[lambda e, w, r: e * w + (1 - e) * r, lambda e, w, r: np.float64(r + e * (w - r)),
               lambda e, w, r: torch.lerp(r, w, e), lambda e, w, r: np.average([w, r], weights=[e, 1 - e])],
        wrong=[(lambda e, w, r: 1 / (1 + np.exp(-e * _odds(w) - (1 - e) * _odds(r))), "reverse KL's"),
               (lambda e, w, r: (1 - e) * w + e * r, "belongs to c_w"), (lambda e, w, r: 0.5, "Differentiate")]),
}
