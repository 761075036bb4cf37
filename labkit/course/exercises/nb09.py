"""Exercises of 09_opd_menu (Rethinking On-Policy Distillation, arXiv 2604.13016)."""

import math

import numpy as np
import torch

from labkit.course.check import Check
from labkit.course.reading import array, called, close, number


def _chance(answer) -> str | None:
    for m, n, V in ((4, 4, 48), (16, 16, 152_000), (3, 10, 48), (48, 5, 48)):
        got = number(called(answer, m, n, V))
        if close(got, m * n / V, within=1e-6):
            continue
        if close(got, n / V, within=1e-6) or close(got, m / V, within=1e-6):
            return "That is the share of one set's tokens that the other has. How many tokens are that?"
        if close(got, m * n / V**2, within=1e-6):
            return "That is the chance that one given token is in both. How many tokens are there?"
        if close(got, min(m, n), within=1e-6):
            return "That is the most that they can share."
        return f"For m={m}, n={n}, V={V} you say {got:.4g}. With which probability is one of the m among the n?"
    return None


def _deceive(answer) -> str | None:
    rows = array(called(answer))
    if rows.shape != (2, 5) or not np.isfinite(rows).all():
        return "Return two rows of five finite logits: student, teacher."
    student, teacher = rows
    log_q, log_p = map(_log_softmax, rows)
    orders = [np.argsort(-row, kind="stable") for row in (student, teacher)]
    if any(row[order[1]] == row[order[2]] for row, order in zip((student, teacher), orders, strict=True)):
        return "The second and the third place are equal: then nobody knows which of them is on the menu."
    if set(orders[0][:2].tolist()) != set(orders[1][:2].tolist()):
        return "The two top-2 menus are not the same tokens: the overlap ratio is below 1."
    kl = float((np.exp(log_q) * (log_q - log_p)).sum())
    if kl <= 1:
        return f"The overlap ratio is 1, but KL(q, p) is only {kl:.2f} nats. The ratio does not see who comes first."
    return None


def _log_softmax(row):
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def _mislead(answer) -> str | None:
    rows = array(called(answer))
    if rows.shape != (3, 5) or not np.isfinite(rows).all():
        return "Return three rows of five finite logits: the student, the first teacher, the second."
    log_q, *log_ps = map(_log_softmax, rows)
    orders = [np.argsort(-row, kind="stable") for row in rows]
    if any(row[order[1]] == row[order[2]] for row, order in zip(rows, orders, strict=True)):
        return "In one row the second and the third place are equal: then nobody knows which of them is on the menu."
    advantages, kls = [], []
    for log_p, order in zip(log_ps, orders[1:], strict=True):
        shared = np.intersect1d(orders[0][:2], order[:2])
        if not len(shared):
            return "A teacher shares no token with the student: its overlap advantage is 0/0."
        inside_q, inside_p = (_log_softmax(log_V[shared]) for log_V in (log_q, log_p))
        advantages.append(float(np.exp(inside_q) @ (inside_p - inside_q)) / len(shared))
        kls.append(float(np.exp(log_q) @ (log_q - log_p)))
    if advantages[0] < advantages[1] + 1e-6:
        return (f"Overlap advantages {advantages[0]:.3f} and {advantages[1]:.3f}: the first should be the larger. "
                "Which is the largest that there can be?")
    if kls[0] <= kls[1] + 1:
        return (f"KL(q, p) is {kls[0]:.2f} with the first teacher and {kls[1]:.2f} with the second: "
                "the first should be larger by over 1. What does the advantage not look at?")
    return None


def _end(answer) -> str | None:
    if close(answer, 0.65 * 0.17 + 0.35 * 0.99, within=0.004):
        return None
    if close(answer, 65 * 0.17 + 35 * 0.99, within=0.4):
        return "That is in percent; give a share between 0 and 1."
    if close(answer, 0.65 + 0.35 * 0.99, within=0.003):
        return "That is the teacher's accuracy. The student copies how often to answer at once, not the skill."
    if close(answer, 0.99, within=0.004):
        return "That is the student before. Which of the teacher's habits are easy to copy?"
    if close(answer, 0.35 * 0.99, within=0.002):
        return "Direct answers of the student are right now and then, too."
    if close(answer, 0.35 * 0.17 + 0.65 * 0.99, within=0.002):
        return "The shares are exchanged: which kind does the teacher use 65 times in 100?"
    return "After distillation the student chooses as the teacher does, and does each kind as well as it can itself."


def _waiting(answer) -> str | None:
    for p, answers in ((1e-3, 64), (0.2, 3), (1e-3, 1024)):
        got, some = number(called(answer, p, answers)), 1 - (1 - p) ** answers
        if close(got, 1 / some, within=1e-6 / some):
            continue
        if close(got, 1 / p, within=1e-6 / p):
            return "That is the number of answers, not of updates."
        if close(got, some, within=1e-6):
            return "That is the probability that one update has such an answer. How long is the wait for the first?"
        if close(got, 1 / (p * answers), within=1e-6):
            return "Nearly, for small p. At p = 0.2 and 3 answers it says 1.67: an update may have two of them."
        return f"At p={p} and {answers} answers you say {got:.4g}. First: how likely is an update without any?"
    return None


CHECKS = {
    "09.1": Check(
        "Write chance(m, n, V): how many tokens two sets of m and n tokens share on average, if drawn blindly from V.",
        4, "easy", "Each of the m tokens is among the n with the same probability. Expectations add up.", _chance,
        right=[lambda m, n, V: m * n / V, lambda m, n, V: np.float64(m) / V * n,
               lambda m, n, V: sum(n / V for _ in range(m)), lambda m, n, V: torch.tensor(m * n / V).half()],
        wrong=[(lambda m, n, V: 1 - (1 - n / V) ** m, "With which"), (lambda m, n, V: n / V, "How many tokens"),
               (lambda m, n, V: m * n / V**2, "one given token"),
               (lambda m, n, V: min(m, n), "the most"), (lambda m, n, V: m * m / V, "With which probability")]),
    "09.2": Check(
        "Where does the accuracy of a student end that copies 65% direct answers without the skill for them?",
        5, "easy",
        "Two kinds of answers: the teacher sets their shares, the student's own skill sets how often each is right.",
        _end, right=[0.65 * 0.17 + 0.35 * 0.99, 0.457, 0.46, torch.tensor(0.457).bfloat16()],
        wrong=[(45.7, "in percent"), (0.17, "chooses as the teacher"), (0.997, "teacher's accuracy"),
               (0.99, "student before"), (0.3465, "now and then"), (0.703, "exchanged"),
               (0.6, "chooses as the teacher")]),
    "09.3": Check(
        "Write updates_until(p, answers): the mean number of updates up to the first that has a direct answer.",
        6, "medium", "An update has none with probability (1 - p)^answers. Such a wait is geometric.", _waiting,
        right=[lambda p, answers: 1 / (1 - (1 - p) ** answers),
               lambda p, answers: -1 / np.expm1(answers * np.log1p(-p)),
               lambda p, answers: 1 / sum(p * (1 - p) ** k for k in range(answers)),
               lambda p, answers: torch.tensor(1 - (1 - p) ** answers).reciprocal()],
        wrong=[(lambda p, answers: 1 / p, "answers, not of updates"),
               (lambda p, answers: 1 - (1 - p) ** answers, "probability that one update"),
               (lambda p, answers: 1 / (p * answers), "Nearly"), (lambda p, answers: answers, "without any"),
               (lambda p, answers: math.ceil(1 / (1 - (1 - p) ** answers)), "without any")]),
    "09.4": Check(
        "Write deceive(): logits of student and teacher for five tokens, the same top 2 and KL(student, teacher) > 1.",
        6, "medium", "Two tokens hold nearly all the mass in both. In which order?", _deceive,
        right=[lambda: ([5.0, 1.0, 0.0, 0.0, 0.0], [1.0, 5.0, 0.0, 0.0, 0.0]),
               lambda: (np.array([0.0, 0, 3, 9, 0]), np.array([0.0, 0, 9, 3, 0])),
               lambda: torch.tensor([[900.0, 500, 0, 0, 0], [500, 900, 0, 0, 0]]).bfloat16(),
               lambda: (torch.tensor([0.9, 0.05, 0.02, 0.02, 0.01]).log(), [-3, -0.1, -5, -6, -6])],
        wrong=[(lambda: ([5.0, 1, 0, 0, 0], [5.0, 1, 0, 0, 0]), "only 0.00"),
               (lambda: ([5.0, 1, 0, 0, 0], [0.0, 0, 0, 5, 1]), "not the same tokens"),
               (lambda: ([5.0, 0, 0, 0, 0], [5.0, 0, 0, 0, 0]), "nobody knows"),
               (lambda: ([5.0, 1], [1.0, 5]), "two rows of five"), (lambda: 5.0, "two rows of five"),
               (lambda: ([5.0, 1, -math.inf, 0, 0], [1.0, 5, 0, 0, 0]), "finite")]),
    "09.5": Check(
        "Write mislead(): logits of a student and two teachers; the first has the better advantage and the worse KL.",
        8, "hard",
        "The advantage looks only at tokens on both menus. What is it if there is just one of them?", _mislead,
        right=[lambda: ([3.0, 2.0, 0.0, 0.0, 0.0], [-3.0, 3.0, 2.0, 0.0, 0.0], [2.0, 2.5, 0.0, 0.0, 0.0]),
               lambda: np.array([[2.0, 1, 0, 0, 0], [2.0, 1, 0, 0, -30], [2.0, 1.5, 0, 0, 0]]),
               lambda: [np.float16(row) for row in ([2.0, 1, 0, 0, 0], [2.0, 1, 0, 0, -30], [2, 1.5, 0, 0, 0])]],
        wrong=[(lambda: ([3.0, 2, 0, 0, 0], [2.0, 2.5, 0, 0, 0], [-3.0, 3, 2, 0, 0]), "the first should be the larger"),
               (lambda: ([3.0, 2, 0, 0, 0], [3.0, 2, 0, 0, 0], [2.0, 2.5, 0, 0, 0]), "does the advantage not look at"),
               (lambda: ([3.0, 2, 0, 0, 0], [-3.0, 0, 3, 2, 0], [2.0, 2.5, 0, 0, 0]), "shares no token"),
               (lambda: ([3.0, 0, 0, 0, 0], [-3.0, 3, 2, 0, 0], [2.0, 2.5, 0, 0, 0]), "nobody knows"),
               (lambda: ([3.0, 2, 0, 0, 0], [-3.0, 3, 2, 0, 0]), "three rows of five")]),
}
