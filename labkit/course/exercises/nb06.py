"""Exercises of 06_roundpipe (Luo, Gao, Zheng, Lu, Shu, arXiv 2604.27085)."""

import math

import numpy as np
import torch

from labkit.course.check import Check
from labkit.course.reading import called, close, number
from labkit.pipeline import ORDERINGS


def _micro_batches(answer) -> str | None:
    for N, S, bubble in ((8, 16, 0.05), (4, 9, 0.03), (6, 20, 0.1)):
        got, lost = number(called(answer, N, S, bubble)), N * (N - 1)
        enough = lost * (1 - bubble) / bubble / S
        if close(got, math.ceil(enough), within=1e-6):
            continue
        if close(got, enough, within=1e-6):
            return "Micro-batches are whole: the next whole number."
        if close(got, math.floor(enough), within=1e-6):
            return "With so many the bubble is still above the limit: round up."
        if close(got, math.ceil(lost / bubble / S), within=1e-6):
            return "The N (N - 1) stand below the line too: the bubble is a share of all slots, the lost ones included."
        if close(got, math.ceil((N - 1) * (1 - bubble) / bubble), within=1e-6):
            return "That is for GPipe and 1F1B. RoundPipe's formula has S in it."
        return f"At N={N}, S={S}, bubble={bubble:g} you say {got:g}. Solve the closed formula for M."
    return None


def _stall(answer) -> str | None:
    for N, M_R, t in ((4, 2, 1.5), (8, 5, 2.0), (4, 4, 1.0), (4, 9, 3.0)):
        got, expected = number(called(answer, N, M_R, t)), max(0, N - M_R) * t
        if close(got, expected, within=1e-6):
            continue
        if M_R > N and got < 0:
            return f"With N={N} and M_R={M_R} you get {got:g}. Nobody waits for less than no time."
        if close(got, max(0, N - M_R), within=1e-6):
            return "You count slots. Each lasts t."
        return f"At N={N}, M_R={M_R}, t={t:g} you say {got:g}. The data come after N t; until when is the worker busy?"
    return None


def _t_max(answer) -> str | None:
    if close(answer, 6, within=1e-9):
        return None
    if number(answer) < 6:
        return "No slot can be shorter than the head's, since a layer cannot be cut: 2 + 4 in the fused slot."
    if close(answer, 504, within=1e-9):
        return "That is the cost. Which t_max has it?"
    if close(answer, 9, within=1e-9):
        return "At 9: head and one layer fused, 2 forward and 4 backward slots, S = 7, cost (8*7 + 12) * 9 = 612."
    return "For a t_max, fill the fused slot from the last layer, pack the rest, count S, then (8 S + 12) t_max."


def _efficiency(answer) -> str | None:
    if close(answer, 1819.61 / 480.30 / 8, within=0.005):
        return None
    if close(answer, 1819.61 / 480.30, within=0.02):
        return "That is the speed-up. What share is it of eight?"
    if close(answer, 100 * 1819.61 / 480.30 / 8, within=0.3):
        return "That is in percent; give a share between 0 and 1."
    return "Divide the tokens a second of eight cards by those of one, and by eight."


def _gone(answer) -> str | None:
    if not isinstance(answer, str) or (answer := answer.strip().lower()) not in ORDERINGS:
        return f"Give one of the names {', '.join(ORDERINGS)}."
    if answer == "uploaded":
        return None
    if answer == "between":
        return "The P-copy still lies between two steps. Who may be reading the master weights meanwhile?"
    if answer == "renewed":
        return "That one holds back the upload until the P-copy is done. Here the P-copy itself no longer waits."
    return "That one concerns gradients. The P-copy carries weights."


def _size(answer) -> str | None:
    for beta, x in ((0.9, 0.6), (0.5, 0.8), (0.0, 0.6), (0.9, 1.0), (0.5, 1.3)):
        got, squared = number(called(answer, beta, x)), beta + (1 - beta) * x
        if close(got, squared**0.5, within=1e-6):
            continue
        if close(got, squared, within=1e-6):
            return "That is the product of the two roots, so the square of their size."
        if close(got, (beta + x) ** 0.5, within=1e-6):
            return "In the constant term x has the factor 1 - beta."
        if close(got, (1 + beta) / 2, within=1e-6):
            return "That is the real part of the roots. Their size needs the imaginary part too."
        return (f"At beta={beta:g}, x={x:g} you say {got:.4g}. The two roots are complex: "
                "the square of their size is the constant term.")
    return None


CHECKS = {
    "06.1": Check(
        "The scaling efficiency of Qwen3-235B on eight cards, as a share.",
        3, "easy", "Speed-up divided by the number of cards.", _efficiency,
        right=[0.4736, np.float64(1819.61 / 480.30 / 8), 0.47, torch.tensor(0.4736).half()],
        wrong=[(3.79, "speed-up"), (47.4, "percent"), (0.92, "eight cards")]),
    "06.2": Check(
        "Which ordering is gone if the P-copy runs as soon as the optimizer has stepped?",
        4, "easy", "What might a worker still be doing with the old weights?", _gone,
        right=["uploaded", np.str_("uploaded"), " Uploaded "],
        wrong=[("between", "two steps"), ("renewed", "holds back"), ("collected", "gradients"), (1, "names")]),
    "06.3": Check(
        "Write micro_batches(N, S, bubble): the fewest micro-batches with which RoundPipe's bubble is within a limit.",
        6, "medium", "Solve N (N - 1) / (M S + N (N - 1)) <= bubble for M.", _micro_batches,
        right=[lambda N, S, bubble: math.ceil(N * (N - 1) * (1 - bubble) / (bubble * S)),
               lambda N, S, bubble: np.ceil(N * (N - 1) * (1 / bubble - 1) / S),
               lambda N, S, bubble: next(M for M in range(1, 10**6) if N * (N - 1) <= bubble * (M * S + N * (N - 1))),
               lambda N, S, bubble: torch.tensor(N * (N - 1) * (1 - bubble) / bubble / S).ceil().int()],
        wrong=[(lambda N, S, bubble: N * (N - 1) * (1 - bubble) / (bubble * S), "next whole number"),
               (lambda N, S, bubble: int(N * (N - 1) * (1 - bubble) / (bubble * S)), "round up"),
               (lambda N, S, bubble: math.ceil(N * (N - 1) / (bubble * S)), "below the line"),
               (lambda N, S, bubble: math.ceil((N - 1) * (1 - bubble) / bubble), "GPipe"),
               (lambda N, S, bubble: N, "Solve the closed formula"), (67, "A function is asked for")]),
    "06.4": Check(
        "Write stall(N, M_R, t): how long a worker waits between slot i and slot i + N.",
        6, "medium", "It is busy for M_R t from its start; the data have come N t after its start.", _stall,
        right=[lambda N, M_R, t: max(0, N - M_R) * t, lambda N, M_R, t: max(0.0, N * t - M_R * t),
               lambda N, M_R, t: 0 if M_R >= N else (N - M_R) * t, lambda N, M_R, t: np.clip(N - M_R, 0, None) * t],
        wrong=[(lambda N, M_R, t: (N - M_R) * t, "less than no time"), (lambda N, M_R, t: max(0, N - M_R), "lasts t"),
               (lambda N, M_R, t: 0, "The data come"), (lambda N, M_R, t: abs(N - M_R) * t, "The data come")]),
    "06.5": Check(
        "The t_max of least cost (M S + N (N - 1)) t_max for 12 layers and a head of 6.",
        8, "hard", "Try 6 first, then the next sums that a slot can have: 7, 8, 9, 12.", _t_max,
        right=[6, np.float32(6.0), torch.tensor([6])],
        wrong=[(7, "count S"), (4, "cannot be cut"), (9, "612"), (504, "That is the cost"), (12, "count S")]),
    "06.6": Check(
        "Write size(beta, x): by what an update multiplies the oscillation of a late step, at x = eta * lambda.",
        10, "hard", "The roots of z^2 - b z + c with b^2 < 4 c have the size sqrt(c).", _size,
        right=[lambda beta, x: (beta + (1 - beta) * x) ** 0.5, lambda beta, x: math.sqrt(beta + x - beta * x),
               lambda beta, x: abs(np.roots([1, -(1 + beta), beta + (1 - beta) * x])).max(),
               lambda beta, x: torch.tensor(beta + (1 - beta) * x).sqrt().half()],
        wrong=[(lambda beta, x: beta + (1 - beta) * x, "square of their size"),
               (lambda beta, x: (beta + x) ** 0.5, "factor 1 - beta"), (lambda beta, x: (1 + beta) / 2, "real part"),
               (lambda beta, x: x, "constant term"), (1.0, "A function is asked for")]),
}
