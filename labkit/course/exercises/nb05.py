"""Exercises of 05_architecture_warmup (Taming Curvature, arXiv 2606.16768)."""

from itertools import combinations

import numpy as np
import torch

from labkit.course.check import Check, Unreadable
from labkit.course.reading import array, called, close, number

ATTENTION, FEED_FORWARD = ("q", "k", "v", "out"), ("gate", "up", "down")


def _subsets(names):
    return [set(chosen) for size in range(len(names) + 1) for chosen in combinations(names, size)]


def _two(answer, zero) -> list[bool]:
    got = array(called(answer, zero))
    if got.shape != (2,):
        raise Unreadable("Return two booleans: attention, feed-forward.")
    return [bool(wakes) for wakes in got]


def _wakes(answer) -> str | None:
    for zero in _subsets(ATTENTION):
        got = _two(answer, zero)[0]
        if got != (not {"v", "out"} <= zero):
            return (f"Attention with {sorted(zero) or 'nothing'} zero: you say it {'wakes' if got else 'sleeps'}. The "
                    "gradient of out has the heads' output in it, that of v has out in it, those of q and k have both.")
    for zero in _subsets(FEED_FORWARD):
        got = _two(answer, zero)[1]
        if got != (len(zero) <= 1):
            return (f"SwiGLU with {sorted(zero) or 'nothing'} zero: you say it {'wakes' if got else 'sleeps'}. The "
                    "output is down (silu(gate) * up): each one's gradient has the other two as factors.")
    return None if all(_two(answer, {"q", "gate"})) else "Zeros in one branch say nothing of the other."


def _threshold(answer) -> str | None:
    for beta_1 in (0.9, 0.5, 0.0, 0.95):
        got, adam = number(called(answer, beta_1)), (2 + 2 * beta_1) / (1 - beta_1)
        if close(got, adam / (1 + 2 * beta_1), within=1e-6):
            continue
        if close(got, adam, within=1e-6):
            return "That is Adam's own border. Nadam's step holds the gradient a second time."
        if close(got, 2, within=1e-6):
            return "That is plain gradient descent, beta_1 = 0."
        if close(got, (2 + 2 * beta_1) / (1 + 2 * beta_1), within=1e-6):
            return "That is the border of (1 - beta_1) times eta lambda: divide."
        return f"At beta_1 = {beta_1} you say {got:.4g}. Put w' = -w and m' = -m into both rules and solve."
    return None


def _shift(answer) -> str | None:
    for low, high in ((-7.0, 5.0), (-3.0, 10.0), (-4.0, 4.0), (-9.0, 1.0)):
        got, right = number(called(answer, low, high)), max(0.0, -(low + high) / 2)
        if close(got, right, within=1e-6):
            continue
        if close(got, -low, within=1e-6):
            return "That makes all of them positive, which is enough, but not the smallest c."
        if close(got, -(low + high), within=1e-6):
            return "Twice too much: the shift moves both ends, one away from zero and one towards it."
        if close(got, -(low + high) / 2, within=1e-6):
            return f"For {low:g} and {high:g} no shift is needed, and c must not be negative."
        return f"For {low:g} and {high:g} you say {got:.4g}. When are |low + c| and |high + c| equal?"
    return None


def _carry(answer) -> str | None:
    generator = np.random.default_rng(0)
    u, old, new = generator.standard_normal(6), generator.random(6) + 0.2, generator.random(6) + 0.2
    u /= np.linalg.norm(u)
    got = array(called(answer, u, old, new))
    if got.shape != u.shape:
        return f"The vector had the shape {u.shape} and came back as {got.shape}."
    if abs(np.linalg.norm(got) - 1) > 1e-6 + got.slack:
        return "The direction may be right; the length is not 1."

    def like(vector):
        return abs(got @ vector) / np.linalg.norm(vector) / np.linalg.norm(got) > 1 - 1e-9 - got.slack**2

    if like(u * np.sqrt(new / old)):
        return None
    if like(u):
        return "That is u itself, which stands still only if P does."
    if like(u * np.sqrt(old / new)):
        return "The other way round: q = P_old^(-1/2) u, and the new vector is P_new^(1/2) q."
    if like(u * new / old):
        return "Roots: G has P^(-1/2) on each side."
    return "Write q with the old P, then solve q = P_new^(-1/2) u' for u'."


def _unlocking(answer) -> str | None:
    if close(answer, 0.08, within=1e-6):
        return None
    if close(answer, -0.25, within=1e-6):
        return "That is the difference to the base: shallow at first *and* unlocked later. Which run shares the former?"
    if close(answer, -0.08, within=1e-6):
        return "The size is right. Is the loss with unlocking higher or lower than without?"
    if close(abs(number(answer)), 0.33, within=1e-6):
        return "That is what being shallow for ever brought. What came on top of it by unlocking?"
    return "Compare two runs that differ in unlocking alone."


CHECKS = {
    "05.1": Check(
        "By how much did unlocking change the loss?",
        5, "easy", "Which two of the four runs differ in unlocking alone?", _unlocking,
        right=[0.08, 2.55 - 2.47, np.float32(2.55) - np.float32(2.47), torch.tensor(0.08).half()],
        wrong=[(-0.25, "difference to the base"), (-0.08, "higher or lower"), (-0.33, "for ever"), (0.0, "Compare")]),
    "05.2": Check(
        "Write wakes(zero): do attention and feed-forward get any gradient when these matrices are zero?",
        6, "medium", "Write down the gradient of each matrix and look which others are factors in it.", _wakes,
        right=[lambda zero: (not {"v", "out"} <= zero, len({"gate", "up", "down"} & zero) < 2),
               lambda zero: ("v" not in zero or "out" not in zero, len(set(FEED_FORWARD) - zero) >= 2),
               lambda zero: np.array([sum(n in zero for n in pair) < 2 for pair in (("v", "out"), FEED_FORWARD)])],
        wrong=[(lambda zero: (True, True), "you say it wakes"),
               (lambda zero: ("out" not in zero, "down" not in zero), "that of v has out in it"),
               (lambda zero: (not {"v", "out"} <= zero, len(zero) < 3), "other two as factors"),
               (lambda zero: ("out" not in zero and "v" not in zero, True), "you say it sleeps"),
               (lambda zero: True, "two booleans"), (lambda zero: None, "Numbers are asked for")]),
    "05.3": Check(
        "Write shift(low, high): the smallest c >= 0 for which G + cI is largest in size at the high end.",
        5, "medium", "Both ends move by c. At the border they have the same size.", _shift,
        right=[lambda low, high: max(0.0, -(low + high) / 2), lambda low, high: max(0, (abs(low) - high) / 2),
               lambda low, high: torch.tensor(-(low + high) / 2).relu()],
        wrong=[(lambda low, high: -low, "not the smallest"), (lambda low, high: -(low + high), "Twice"),
               (lambda low, high: (high - low) / 2, "When are"),
               (lambda low, high: -(low + high) / 2, "not be negative"), (lambda low, high: 0.0, "When are")]),
    "05.4": Check(
        "Write carry(u_N, P_old_N, P_new_N): the unit vector to start from after P has changed.",
        7, "medium", "q = P^(-1/2) u is the same before and after.", _carry,
        right=[lambda u, old, new: u * np.sqrt(new / old) / np.linalg.norm(u * np.sqrt(new / old)),
               lambda u, old, new: torch.nn.functional.normalize(u * old.rsqrt() * new.sqrt(), dim=0),
               lambda u, old, new: -(v := (new / old) ** 0.5 * u) / sum(x * x for x in v) ** 0.5,
               lambda u, old, new: (v := (u * (new / old).sqrt()).float()) / v.norm()],
        wrong=[(lambda u, old, new: u, "stands still"), (lambda u, old, new: u * np.sqrt(new / old), "length"),
               (lambda u, old, new: u * np.sqrt(old / new) / np.linalg.norm(u * np.sqrt(old / new)), "other way round"),
               (lambda u, old, new: u * new / old / np.linalg.norm(u * new / old), "Roots"),
               (lambda u, old, new: u[:3], "came back as"),
               (lambda u, old, new: u.numpy().flip(), "raised")]),
    "05.5": Check(
        "Write threshold(beta_1): the largest stable eta * lambda of Nadam with P fixed.",
        8, "hard", "At the border w and m change sign at each step: w' = -w, m' = -m.", _threshold,
        right=[lambda b: (2 + 2 * b) / (1 - b) / (1 + 2 * b), lambda b: 2 / (1 - b) / (b / (1 + b) + 1),
               lambda b: np.float64(2 + 2 * b) / (1 + b - 2 * b**2),
               lambda b: torch.tensor((2 + 2 * b) / (1 - b) / (1 + 2 * b)).half()],
        wrong=[(lambda b: 2.0, "plain gradient descent"), (lambda b: (2 + 2 * b) / (1 - b), "Adam's own"),
               (lambda b: (2 + 2 * b) / (1 + 2 * b), "divide"), (lambda b: 13.57, "solve"),
               (lambda b: 2 / (1 - b), "solve")]),
}
