"""Exercises of 14_swe_trajectories (SWE-ZERO-12M-trajectories)."""

import math
from collections.abc import Iterator

import numpy as np
import torch

from labkit.course.check import Check
from labkit.course.reading import array, called, close, known, number


def _gigabytes(answer) -> str | None:
    for drawn, dropped, kilobytes in ((500_000, 0.155, 62), (1_000, 0.0, 1_000), (12_290_800, 0.5, 10)):
        got, right = number(called(answer, drawn, dropped, kilobytes)), drawn * (1 - dropped) * kilobytes / 1e6
        if close(got, right, rel=1e-6):
            continue
        where = f"For {drawn:,} rows, {dropped:.1%} dropped, {kilobytes} KB your function gives {got:.4g}."
        if dropped and close(got, right / (1 - dropped), rel=1e-6):
            return f"{where} That counts the dropped rows too."
        if dropped and close(got, right / (1 - dropped) * dropped, rel=1e-6):
            return f"{where} That is the size of what was dropped."
        if close(got / right, 1000, rel=1e-6) or close(got / right, 1e-3, rel=1e-6):
            return f"{where} A GB has a million KB."
        if close(got, right * 1e6 * 1024 / 2**30, rel=1e-6):
            return f"{where} That is in GiB; a GB has 10⁹ bytes."
        return f"{where} Rows kept, times KB a row, over a million."
    return None


def _learned(answer) -> str | None:
    hints = {20: "The ends of the assistant's turns are learned too: a model that never learns them never stops.",
             24: "Two too many: the loop writes the headers, so the model need not.",
             120: "That is every text. What did the shell and the people write?",
             130: "That is every token of the chat.", 27: "Only the assistant's turns end by the model's own decision.",
             21: "Each of the assistant's two turns has an end."}
    if close(answer, 22, within=1e-6):
        return None
    return known(answer, hints, rel=1e-6) or "Add up the texts of the assistant, and what ends them."


def _listed(answer):
    """A generator or a set as a list; other answers as they are."""
    return list(answer) if isinstance(answer, Iterator | set) else answer


def _is_mask(answer) -> bool:
    values = answer.tolist() if hasattr(answer, "tolist") else list(answer)
    return bool(values) and all(isinstance(value, bool) for value in values)


def _pairs(answer) -> str | None:
    for mask in ([False, False, True, True], [True, True, False], [False, True, False, True, True], [False], [True]):
        answered, right = _listed(called(answer, mask)), [t - 1 for t, m in enumerate(mask) if m and t]
        if array(answered).ndim == 0:
            return f"For {mask} you give one number. A list of positions is asked for."
        if _is_mask(answered):
            return f"For {mask} you give a mask. The positions themselves are asked for."
        got = sorted(int(t) if t % 1 == 0 else t for t in array(answered).ravel().tolist())
        if got == right:
            continue
        where = f"For {mask} you say {got}."
        if got == [t for t, m in enumerate(mask) if m]:
            return f"{where} Those are the learned tokens; the output that predicts a token stands one place before."
        if got == [t for t, m in enumerate(mask[:-1]) if m]:
            return f"{where} That shifts the targets and not the mask: the model would learn the token *behind* each."
        if -1 in got:
            return f"{where} Nothing predicts the first token."
        return f"{where} Token t + 1 is learned: then output t is judged."
    return None


def _chance(answer) -> str | None:
    for J, P, b in ((0.9, 64, 4), (0.5, 128, 32), (0.2, 100, 20), (0.5, 8, 1), (0.3, 16, 16)):
        got, r = number(called(answer, J, P, b)), P / b
        if close(got, 1 - (1 - J**r) ** b, within=1e-9):
            continue
        where = f"At J={J}, P={P}, b={b} your function gives {got:.4g}."
        if close(got, J**r, within=1e-9):
            return f"{where} That is one band. Any of the b bands will do."
        if close(got, 1 - (1 - J**b) ** r, within=1e-9):
            return f"{where} Rows and bands are exchanged: a band has P / b minima, and there are b of them."
        if close(got, (1 - J**r) ** b, within=1e-9):
            return f"{where} That is the chance of *not* being compared."
        if close(got, min(1.0, b * J**r), within=1e-9):
            return f"{where} Chances of several bands don't add up; take the chance that none agrees."
        return f"{where} All r minima of a band agree with chance J^r. When does no band agree?"
    return None


def _any_of(answer) -> str | None:
    for p, k in ((0.3, 1), (0.5, 3), (0.1, 20), (0.9, 100)):
        got, right = number(called(answer, p, k)), 0.5 * (1 - (1 - p) ** k)
        if close(got, right, within=1e-9):
            continue
        where = f"At p={p}, k={k} your function gives {got:.4g}."
        if close(got, 1 - (1 - p) ** k, within=1e-9):
            return f"{where} That is the half that can be solved; the other half counts in the share."
        if close(got, 1 - (1 - p / 2) ** k, within=1e-9):
            return f"{where} The mean chance p/2 for all is another world: its share goes to 1 with k. Here it cannot."
        if close(got, 0.5 * (1 - p) ** k, within=1e-9):
            return f"{where} That is the share of solvable tasks with no success."
        return f"{where} A solvable task has a success with chance 1 - (1 - p)^k, and half of the tasks are solvable."
    return None


CHECKS = {
    "14.1": Check(
        "Write gigabytes(drawn, dropped, kilobytes): the size of the rows that are kept, in GB.",
        3, "easy", "drawn * (1 - dropped) rows are kept.", _gigabytes,
        right=[lambda n, d, k: n * (1 - d) * k / 1e6, lambda n, d, k: (n - n * d) * k * 1e3 / 1e9,
               lambda n, d, k: n * k / 1e6 - n * d * k / 1e6],
        wrong=[(lambda n, d, k: n * k / 1e6, "dropped rows too"), (lambda n, d, k: n * d * k / 1e6, "what was dropped"),
               (lambda n, d, k: n * (1 - d) * k * 1024 / 2**30, "10⁹"),
               (lambda n, d, k: n * (1 - d) * k / 1e9, "million KB"), (lambda n, d, k: 1.0, "Rows kept")]),
    "14.2": Check(
        "How many tokens of this chat are learned?",
        4, "easy", "Two texts, and what ends each of them.", _learned,
        right=[22, 12 + 1 + 8 + 1, 22.0, sum(text + 1 for text in (12, 8))],
        wrong=[(lambda: 22, "not a function"), (20, "ends of the assistant's turns"), (24, "headers"),
               (120, "every text"), (130, "every token"),
               (27, "own decision"), (21, "has an end"), (7, "Add up")]),
    "14.3": Check(
        "Write learned_pairs(mask_T): the outputs t that are judged, when output t predicts token t + 1.",
        5, "medium", "Shift after masking: the mask belongs to the targets.", _pairs,
        right=[lambda m: [t for t in range(len(m) - 1) if m[t + 1]],
               lambda m: [t - 1 for t in range(1, len(m)) if m[t]],
               lambda m: np.flatnonzero(m[1:]), lambda m: torch.tensor(m[1:]).nonzero(),
               lambda m: (t for t, learned in enumerate(m[1:]) if learned),
               lambda m: {t for t, learned in enumerate(m[1:]) if learned},
               lambda m: tuple(t - 1 for t in reversed(range(1, len(m))) if m[t])],
        wrong=[(lambda m: [t for t in range(len(m)) if m[t]], "one place before"),
               (lambda m: [t for t in range(len(m) - 1) if m[t]], "shifts the targets"),
               (lambda m: [t - 1 for t in range(len(m)) if m[t]], "Nothing predicts"),
               (lambda m: [], "is judged"), (lambda m: m[1:], "a mask"), (lambda m: sum(m[1:]), "one number"),
               (lambda m: [t + 1 for t in range(len(m)) if m[t]], "is judged")]),
    "14.4": Check(
        "Write any_of(p, k): the share of tasks with a success within k attempts, if half of them cannot be solved.",
        5, "medium", "Treat the two halves apart.", _any_of,
        right=[lambda p, k: 0.5 * (1 - (1 - p) ** k), lambda p, k: (1 - (1 - p) ** k) / 2,
               lambda p, k: sum(0.5 * p * (1 - p) ** n for n in range(k)),
               lambda p, k: torch.tensor(-0.5 * math.expm1(k * math.log1p(-p)))],
        wrong=[(lambda p, k: 1 - (1 - p) ** k, "other half counts"),
               (lambda p, k: 1 - (1 - p / 2) ** k, "another world"),
               (lambda p, k: 0.5 * (1 - p) ** k, "no success"), (lambda p, k: 0.5, "half of the tasks"),
               (lambda p, k: min(0.5, 0.5 * p * k), "half of the tasks")]),
    "14.5": Check(
        "Write chance(J, P, b): the probability that a pair of likeness J shares a band.",
        6, "hard", "One band agrees with chance J^(P/b); take the chance that none of b does.", _chance,
        right=[lambda J, P, b: 1 - (1 - J ** (P / b)) ** b, lambda J, P, b: 1 - (1 - J ** (P // b)) ** b,
               lambda J, P, b: 1 - math.prod(1 - J ** (P / b) for _ in range(b)),
               lambda J, P, b: -np.expm1(b * np.log1p(-(J ** (P / b))))],
        wrong=[(lambda J, P, b: J ** (P / b), "one band"), (lambda J, P, b: 1 - (1 - J**b) ** (P / b), "exchanged"),
               (lambda J, P, b: (1 - J ** (P / b)) ** b, "not"), (lambda J, P, b: min(1, b * J ** (P / b)), "add up"),
               (lambda J, P, b: J**P, "no band"), (lambda J, P, b: 1 - (1 - J) ** b, "no band")]),
}
