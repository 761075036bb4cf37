"""Exercises of 02_token_superposition (Peng, Gigant, Quesnelle, arXiv 2605.06546)."""

import math

import numpy as np
import torch

from labkit.course.check import Check
from labkit.course.reading import alike, array, called, close, number


def _ratio(answer) -> str | None:
    for r, s in ((0.3, 6), (0.2497, 16), (1.0, 4), (0.0, 8)):
        got, expected = number(called(answer, r, s)), 1 + r * (s - 1)
        if close(got, expected, rel=1e-2):
            continue
        if close(got, r * s, rel=1e-2, within=1e-9):
            return f"At r={r}, s={s} you count phase 1 only; the other (1-r) of the steps read text too."
        if close(got, 1 + r * s, rel=1e-2):
            return "A step of phase 1 reads s times the text instead of once, so it adds s-1, not s."
        return f"At r={r}, s={s} your function gives {got:.4g}. Count the tokens of both phases, then divide by T*B*N."
    return None


def _floor(answer) -> str | None:
    for s in (2, 6, 16):
        got = number(called(answer, s))
        if close(got, math.log(s), within=0.02):
            continue
        if close(got, 0.0, within=1e-6):
            return "Zero needs probability 1 on each of s different tokens. What is the best that sums to 1?"
        if close(got, math.log2(s), within=0.02) or close(got, math.log10(s), within=0.02):
            return "That is in bits or decimal digits. The losses here are in nats, so use the natural logarithm."
        return f"At s={s} your floor is {got:.4g}. Give each of the s tokens its best probability and take the mean CE."
    return None


def _shuffle(answer) -> str | None:
    from labkit.objectives import bag_cross_entropy

    generator = torch.Generator().manual_seed(0)
    bag_BNS = torch.stack([torch.randperm(11, generator=generator)[:4] for _ in range(10)]).view(2, 5, 4)
    logits_BNV = torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    moved_BNS = torch.as_tensor(array(_moved(answer, bag_BNS.numpy()))).round().long()
    if moved_BNS.shape != bag_BNS.shape:
        return f"The bags had the shape {tuple(bag_BNS.shape)} and came back as {tuple(moved_BNS.shape)}."
    if torch.equal(moved_BNS, bag_BNS):
        return "Nothing moved: the bags came back in the order in which they went in."
    if not torch.equal(moved_BNS.flatten().sort().values, bag_BNS.flatten().sort().values):
        return "Tokens have been replaced. Only their order may change."
    change = float(bag_cross_entropy(logits_BNV, moved_BNS) - bag_cross_entropy(logits_BNV, bag_BNS))
    if not np.array_equal(array(moved_BNS.sort(-1).values), array(bag_BNS.sort(-1).values)):
        return f"A token has left its bag, and the loss changed by {change:+.3f}. Which axis is the one inside a bag?"
    return None if abs(change) < 1e-9 else f"The loss changed by {change:+.3g}."


def _moved(answer, bag_BNS):
    """What comes back; a random order may by chance be the old one, so it has three tries."""
    tries = [called(answer, bag_BNS) for _ in range(3)]
    return next((bags for bags in tries if not alike(bags, bag_BNS)), tries[0])


def _overlap(answer) -> str | None:
    for s in (2, 4, 6):
        got = number(called(answer, s))
        if close(got, s - 1, within=1e-6):
            continue
        if close(got, s, within=1e-6):
            return "Nearly: the last target of the s is one token past the input bag, so it is new."
        if close(got, 1, within=1e-6):
            return "One is the number of targets that are new. How many of the s are left?"
        return f"At s={s} you say {got:g}. Write down x_0 ... x_{2 * s - 1}, the first input bag, and labels x_(t+1)."
    return None


def _largest_r(answer) -> str | None:
    if close(answer, 0.8, within=0.005):
        return None
    if close(answer, 0.3, within=0.005):
        return "0.3 is the best r at s=4, not the largest that still beats the baseline."
    if close(answer, 0.9, within=0.005):
        return "At r=0.9 the loss is 3.2221, and the baseline's is 3.2124."
    return "Read down the column s=4: which losses are below the baseline's 3.2124?"


def _equal_data(answer) -> str | None:
    if close(answer, 0.036, within=0.0006):
        return None
    if close(answer, -0.036, within=0.0006):
        return "The size is right. TST minus baseline: which of the two is higher at 105B tokens?"
    if close(abs(number(answer)), 0.132, within=0.0006):
        return "That baseline has read 42B tokens (equal FLOPs). Which one has read as much text as TST?"
    if close(abs(number(answer)), 0.001, within=0.0006):
        return "That baseline has read 75B tokens. Which one has read as much text as TST?"
    return "Find the baseline that has read as much text as TST, and subtract its loss from TST's."


CHECKS = {
    "02.1": Check(
        "Write text_ratio(r, s): how much more text TST reads than a baseline of the same number of steps.",
        4, "easy",
        "Phase 1 takes r*T steps of s tokens a position, phase 2 takes (1-r)*T steps of one. Divide by T.", _ratio,
        right=[lambda r, s: 1 + r * (s - 1), lambda r, s: np.float32(r * s + 1 - r),
               lambda r, s: torch.tensor(r * s + (1 - r), dtype=torch.bfloat16)],
        wrong=[(lambda r, s: r * s, "phase 1 only"), (lambda r, s: 1 + r * s, "adds s-1"),
               (lambda r, s: s, "both phases"), (lambda r, s: 1 / (1 + r * (s - 1)), "divide by"),
               (2.5, "A function is asked for")]),
    "02.2": Check(
        "From the paper's Table 4: the largest r at s=4 that still beats the baseline (3.2124).",
        3, "easy", "Read down the column s=4.", _largest_r,
        right=[0.8, np.float32(0.8)],
        wrong=[("0.8", "A number"), (0.9, "3.2221"), (0.3, "best r"), (0.5, "column s=4")]),
    "02.3": Check(
        "At 3B parameters and equal data (105B tokens): the loss of TST minus the loss of the baseline.",
        4, "easy", "The baseline reaches 105B tokens after 50k steps.", _equal_data,
        right=[0.036, np.float64(2.676 - 2.640)],
        wrong=[(-0.036, "which of the two is higher"), (-0.132, "equal FLOPs"), (0.132, "equal FLOPs"),
               (-0.001, "75B"), (0.1, "subtract its loss")]),
    "02.4": Check(
        "Write floor(s): the lowest value of the plain mean of s cross-entropies for a bag of s different tokens.",
        5, "medium",
        "The probabilities of the s tokens sum to at most 1, and by symmetry the best ones are equal.", _floor,
        right=[math.log, np.log, torch.log, lambda s: -np.log(1 / s),
               lambda s: torch.nn.functional.cross_entropy(torch.zeros(1, s), torch.tensor([0]))],
        wrong=[(lambda s: 0.0, "sums to 1"), (math.log2, "bits"), (math.log10, "decimal"),
               (lambda s: s * math.log(s), "mean CE"), (lambda s: 1 / s, "mean CE")]),
    "02.5": Check(
        "Write shuffle(bag_BNS) that changes the order of the tokens and leaves the loss as it was.",
        6, "medium", "The loss is a sum over the last axis.", _shuffle,
        right=[lambda bag: bag.flip(-1), lambda bag: bag.sort(-1).values, lambda bag: bag.roll(1, -1),
               lambda bag: bag[..., torch.randperm(bag.shape[-1])], lambda bag: np.flip(np.asarray(bag), -1),
               lambda bag: [[tokens[::-1] for tokens in row] for row in bag.tolist()]],
        wrong=[(lambda bag: bag, "Nothing moved"), (lambda bag: bag.flip(1), "left its bag"),
               (lambda bag: bag[..., :2], "came back as"),
               (lambda bag: bag + 1, "replaced"), (lambda bag: None, "Numbers are asked for")]),
    "02.6": Check(
        "Leave out the shift by s-1. Write overlap(s): how many of a position's s targets has it already read?",
        6, "hard",
        "Position i reads x_(is) ... x_((i+1)s-1); without the shift its targets are x_(is+1) ... x_((i+1)s).",
        _overlap,
        right=[lambda s: s - 1, lambda s: np.float64(s - 1),
               lambda s: len(set(range(s)) & set(range(1, s + 1)))],
        wrong=[(lambda s: s, "is new"), (lambda s: 1, "number of targets that are new"),
               (lambda s: s / 2 + 3, "Write down")]),
}
