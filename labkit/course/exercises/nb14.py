"""Exercises of 14_swe_trajectories (SWE-ZERO-12M-trajectories)."""

import math

from labkit.course.check import Check, array, close, number


def _gigabytes(answer) -> str | None:
    for drawn, dropped, kilobytes in ((500_000, 0.155, 62), (1_000, 0.0, 1_000), (12_290_800, 0.5, 10)):
        got, right = number(answer(drawn, dropped, kilobytes)), drawn * (1 - dropped) * kilobytes / 1e6
        if math.isclose(got, right, rel_tol=1e-6):
            continue
        where = f"For {drawn:,} rows, {dropped:.1%} dropped, {kilobytes} KB your function gives {got:.4g}."
        if dropped and math.isclose(got, right / (1 - dropped), rel_tol=1e-6):
            return f"{where} That counts the dropped rows too."
        if dropped and math.isclose(got, right / (1 - dropped) * dropped, rel_tol=1e-6):
            return f"{where} That is the size of what was dropped."
        if math.isclose(got / right, 1000, rel_tol=1e-6) or math.isclose(got / right, 1e-3, rel_tol=1e-6):
            return f"{where} A GB has a million KB."
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
    return hints.get(round(number(answer)), "Add up the texts of the assistant, and what ends them.")


def _pairs(answer) -> str | None:
    for mask in ([False, False, True, True], [True, True, False], [False, True, False, True, True], [False], [True]):
        got, right = [int(t) for t in array(answer(list(mask))).ravel()], [t - 1 for t, m in enumerate(mask) if m and t]
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
    for J, P, b in ((0.5, 128, 32), (0.2, 100, 20), (0.9, 64, 4), (0.5, 8, 1), (0.3, 16, 16)):
        got, r = number(answer(J, P, b)), P / b
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
        got, right = number(answer(p, k)), 0.5 * (1 - (1 - p) ** k)
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
        3, "drawn * (1 - dropped) rows are kept.", _gigabytes,
        right=[lambda n, d, k: n * (1 - d) * k / 1e6, lambda n, d, k: (n - n * d) * k * 1e3 / 1e9],
        wrong=[(lambda n, d, k: n * k / 1e6, "dropped rows too"), (lambda n, d, k: n * d * k / 1e6, "rop"),
               (lambda n, d, k: n * (1 - d) * k / 1e9, "million KB"), (lambda n, d, k: 1.0, "Rows kept")]),
    "14.2": Check(
        "How many tokens of this chat are learned?",
        4, "Two texts, and what ends each of them.", _learned,
        right=[22, 12 + 1 + 8 + 1, 22.0],
        wrong=[(20, "ends of the assistant's turns"), (24, "headers"), (120, "every text"), (130, "every token"),
               (27, "own decision"), (21, "has an end"), (7, "Add up")]),
    "14.3": Check(
        "Write learned_pairs(mask_T): the outputs t that are judged, when output t predicts token t + 1.",
        5, "Shift after masking: the mask belongs to the targets.", _pairs,
        right=[lambda m: [t for t in range(len(m) - 1) if m[t + 1]],
               lambda m: [t - 1 for t in range(1, len(m)) if m[t]]],
        wrong=[(lambda m: [t for t in range(len(m)) if m[t]], "one place before"),
               (lambda m: [t for t in range(len(m) - 1) if m[t]], "shifts the targets"),
               (lambda m: [t - 1 for t in range(len(m)) if m[t]], "Nothing predicts"),
               (lambda m: [], "is judged")]),
    "14.4": Check(
        "Write chance(J, P, b): the probability that a pair of likeness J shares a band.",
        6, "One band agrees with chance J^(P/b); take the chance that none of b does.", _chance,
        right=[lambda J, P, b: 1 - (1 - J ** (P / b)) ** b, lambda J, P, b: 1 - (1 - J ** (P // b)) ** b],
        wrong=[(lambda J, P, b: J ** (P / b), "one band"), (lambda J, P, b: 1 - (1 - J**b) ** (P / b), "exchanged"),
               (lambda J, P, b: (1 - J ** (P / b)) ** b, "not"), (lambda J, P, b: min(1, b * J ** (P / b)), "add up"),
               (lambda J, P, b: 0.123, "no band")]),
    "14.5": Check(
        "Write any_of(p, k): the share of tasks with a success within k attempts, if half of them cannot be solved.",
        5, "Treat the two halves apart.", _any_of,
        right=[lambda p, k: 0.5 * (1 - (1 - p) ** k), lambda p, k: (1 - (1 - p) ** k) / 2],
        wrong=[(lambda p, k: 1 - (1 - p) ** k, "other half counts"),
               (lambda p, k: 1 - (1 - p / 2) ** k, "another world"),
               (lambda p, k: 0.5 * (1 - p) ** k, "no success"), (lambda p, k: 0.5, "half of the tasks")]),
}
