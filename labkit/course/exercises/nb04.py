"""Exercises of 04_compute_optimal_tokenization (Limisiewicz and others, arXiv 2605.01188)."""

import math
from fractions import Fraction

import numpy as np

from labkit.course.check import Check, array, close, number


def _beta(answer) -> str | None:
    if close(answer, 1.0, within=1e-6):
        return None
    if close(answer, 0.5, within=1e-6):
        return "At 1/2 the exponent of T in *bytes* per parameter is 0. Tokens per parameter are that divided by T."
    return "Tokens per parameter are rho*/T, so T has the exponent 2 beta - 1 - 1. When is that 0?"


def _tokens(answer) -> str | None:
    for T, rho in ((4.57, 60.0), (1.0, 60.0), (3.0, 91.0)):
        got = number(answer(T, rho))
        if math.isclose(got, rho / T, rel_tol=1e-6):
            continue
        if math.isclose(got, rho * T, rel_tol=1e-6):
            return "A token holds T bytes, so the same text has fewer tokens than bytes: divide."
        if math.isclose(got, 20.0, rel_tol=1e-6):
            return "20 whatever T is: that is the rule of thumb in tokens which the paper questions."
        return f"At T={T}, rho={rho} your function gives {got:.4g}. Bytes per parameter = T times tokens per parameter."
    return None


def _far(answer) -> str | None:
    if close(answer, 18.2 / 1e25**0.035, within=0.02):
        return None
    if close(answer, 18.2 / 2e21**0.035, within=0.03):
        return "That is T* at 2e21, the largest budget of the paper."
    if number(answer) > 18.2:
        return "T* falls as compute grows: divide T0 by C^delta."
    if close(answer, 18.2 / 25**0.035, within=0.05):
        return "C is 1e25, not 25."
    return "T* = T0 / C^delta = 18.2 / (1e25)^0.035."


def _shift(answer) -> str | None:
    y_BPD = np.arange(2 * 4 * 3, dtype=float).reshape(2, 4, 3) + 1
    start_D = np.array([-1.0, -2.0, -3.0])
    import torch

    moved = array(answer(torch.tensor(y_BPD), torch.tensor(start_D)))
    if moved.shape != y_BPD.shape:
        return f"Four patches went in, and the shape {moved.shape} came out. How many steps must the module take?"
    if np.array_equal(moved, y_BPD):
        return "Nothing moved: step p would know the bytes of patch p, which it helps to predict."
    if np.array_equal(moved[:, 0], y_BPD[:, -1]):
        return "The last patch came round to the front: step 0 would know the end of the text."
    if not (moved[:, 0] == start_D).all():
        return "Step 0 has no patch before it: it reads the start vector, in every sequence of the batch."
    return None if np.array_equal(moved[:, 1:], y_BPD[:, :-1]) else "Step p must read patch p - 1."


def _double(answer) -> str | None:
    for T, bpb in ((3.0, 1.0), (4.5, 0.96)):
        got = array([number(each) for each in answer(T, bpb)])
        if got.shape != (2,):
            return "Return two numbers: the best T and the bits per byte of the doubled text."
        if np.allclose(got, (2 * T, bpb / 2)):
            continue
        if np.allclose(got, (T, bpb)):
            return "Half of the bytes are new and carry nothing. What does a patch of T bytes hold now?"
        if math.isclose(got[0], 2 * T) and math.isclose(got[1], bpb):
            return "T is right. The same bits are now spread over twice the bytes."
        if np.allclose(got, (T / 2, 2 * bpb)) or math.isclose(got[0], T / 2):
            return "A patch should hold the same words as before. Does it need more bytes for that, or fewer?"
        return f"For T={T}, {bpb} bits per byte you return {got.tolist()}. Keep the content of a patch as it was."
    return None


CHECKS = {
    "04.1": Check(
        "At which beta would the best tokens per parameter not depend on T?",
        3, "Tokens per parameter are rho*/T.", _beta,
        right=[1, 1.0, Fraction(1)],
        wrong=[(0.5, "bytes"), (0, "When is that 0"), (2, "When is that 0")]),
    "04.2": Check(
        "Write tokens_per_parameter(T, rho): tokens a parameter, when rho bytes a parameter are best.",
        3, "D = B / T.", _tokens,
        right=[lambda T, rho: rho / T, lambda T, rho: np.float64(rho) / T],
        wrong=[(lambda T, rho: rho * T, "divide"), (lambda T, rho: 20, "rule of thumb"),
               (lambda T, rho: 7, "gives 7")]),
    "04.3": Check(
        "The best T at 1e25 FLOPs by the printed constants T0 = 18.2, delta = 0.035.",
        3, "1e25 ** 0.035 is about 7.5.", _far,
        right=[18.2 / 1e25**0.035, 2.43, np.float32(2.427)],
        wrong=[(18.2 * 1e25**0.035, "divide"), (3.28, "2e21"), (18.2 / 25**0.035, "not 25"), (1.0, "T0 / C^delta")]),
    "04.4": Check(
        "Write shift(y_BPD, start_D): what the global module reads, so that step p knows the patches before p only.",
        6, "Drop the last patch and put the start vector in front, for every sequence.", _shift,
        right=[lambda y, start: __import__("torch").cat([start.expand(len(y), 1, -1), y[:, :-1]], 1)],
        wrong=[(lambda y, start: y, "Nothing moved"), (lambda y, start: y.roll(1, 1), "came round"),
               (lambda y, start: y[:, :-1], "shape"), (lambda y, start: y.roll(1, 1) * 0, "start vector"),
               (lambda y, start: __import__("torch").cat([start.expand(len(y), 1, -1), y[:, 1:]], 1), "patch p - 1")]),
    "04.5": Check(
        "Write double(T, bpb): the best T and bits per byte after a dummy byte is put behind each byte.",
        6, "Nothing is learned from a dummy byte and nothing is lost by it.", _double,
        right=[lambda T, bpb: (2 * T, bpb / 2), lambda T, bpb: [2.0 * T, 0.5 * bpb]],
        wrong=[(lambda T, bpb: (T, bpb), "carry nothing"), (lambda T, bpb: (2 * T, bpb), "twice the bytes"),
               (lambda T, bpb: (T / 2, 2 * bpb), "more bytes"), (lambda T, bpb: (T + 5, bpb), "content of a patch")]),
}
