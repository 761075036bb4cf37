"""Exercises of 07_minimal_rlvr (RELEX, Wei et al., arXiv 2605.21468)."""

import math
from collections.abc import Mapping

import numpy as np
import torch

from labkit.course.check import Check
from labkit.course.reading import alike, called, close, number


def _last_alpha(answer) -> str | None:
    if close(answer, 90 / 14, within=0.03):
        return None
    if close(answer, 10, within=0.02):
        return "That is the secant's. RELEX spreads the weight over all three checkpoints."
    if close(answer, 43 / 3, within=0.02):
        return "That is w_3, the weight of c_3 in the fit. In alpha = u (u . w), the part of w along u is what counts."
    if close(answer, 30 / 14, within=0.02):
        return "That is alpha_1. Here alpha grows with t."
    return "u is (1, 2, 3) divided by its length, and u . w is the fitted line through u, read at T."


def _early_share(answer) -> str | None:
    for p in (0.1, 0.15, 0.5, 1.0):
        got = number(called(answer, p))
        if close(got, p**3, rel=3e-2):
            continue
        if close(got, p, rel=1e-6):
            return "Steps are not equal here: each counts with the square of its distance from the base."
        if close(got, p**2, rel=1e-2):
            return "That is the share of the sum of |m_t|. Explained variance adds squares."
        return f"At p={p} you give {got:.4g}. Sum t^2 up to p N, divide by the sum up to N, and let N grow."
    return None


def _coefficients(N, beta):
    """How much of each noise (columns) is in each step (rows)."""
    age_NN = np.arange(N)[:, None] - np.arange(N)
    return beta ** age_NN.clip(0) * (age_NN >= 0)


def _first_share(rows_NN) -> float:
    value_N = np.linalg.eigvalsh(rows_NN @ rows_NN.T)
    return float(value_N[-1] / value_N.sum())


def _first_length(rows_NN) -> float:
    length_N = np.linalg.svd(rows_NN, compute_uv=False)
    return float(length_N[0] / length_N.sum())


def _momentum_share(answer) -> str | None:
    for N, beta in ((15, 0.9), (100, 0.9), (6, 0.5), (15, 0.0)):
        got, step_NN = number(called(answer, N, beta)), _coefficients(N, beta)
        expected = _first_share(step_NN.cumsum(0))
        if close(got, expected, rel=2e-3):
            continue
        if close(got, 8 / math.pi**2, rel=1e-3):
            return "8/pi^2 is a long walk without momentum."
        if close(got, _first_share(np.tri(N)), rel=2e-3):
            return "That is the plain walk. Each step keeps beta times the step before it."
        if close(got, _first_length(step_NN.cumsum(0)), rel=2e-3):
            return "Those are lengths, the singular values. Explained variance adds their squares."
        if close(got, _first_share(step_NN), rel=2e-3):
            return "That is the share of the steps g_t. The path adds them up."
        return (f"At N={N}, beta={beta} you give {got:.4g}. Write every m_t as a mixture of the noises, and note that "
                "different noises are orthogonal.")
    return None


def _from_two(answer) -> str | None:
    for c_1, c_2, T in ((1.0, 2.0, 10.0), (1.0, 1.5, 7.0), (0.3, 1.0, 2.0), (2.0, 3.0, 1.0)):
        got = number(called(answer, c_1, c_2, T))
        if close(got, c_1 + (c_2 - c_1) * (T - 1), rel=1e-6):
            continue
        if close(got, c_2 * T / 2, rel=1e-6):
            return "That is the secant. Two points determine the fitted line, and it need not pass through the base."
        if close(got, c_1 + (c_2 - c_1) * T, rel=1e-6):
            return "One step too far: the line has the value c_1 at step 1, not at step 0."
        return f"At c_1={c_1}, c_2={c_2}, T={T:g} you give {got:.4g}. The line passes through (1, c_1) and (2, c_2)."
    return None


def _through_base(answer) -> str | None:
    for c_N, T in ((np.array([1.0, 2.0, 4.0]), 10.0), (np.array([0.5, 0.4, 1.0, 1.5]), 1.0)):
        step_N = np.arange(1.0, len(c_N) + 1)
        got, expected = number(called(answer, c_N, T)), T * (step_N @ c_N) / (step_N @ step_N)
        if close(got, expected, rel=1e-5):
            continue
        row_N = step_N - 1
        if close(got, T * (row_N @ c_N) / (row_N @ row_N), rel=1e-5) or close(
                got, (T - 1) * (row_N @ c_N) / (row_N @ row_N), rel=1e-5):
            return "You count from 0, so your line is forced through 0 at step 1. The base is one step earlier."
        if close(got, np.polyval(np.polyfit(step_N, c_N, 1), T), rel=1e-5):
            return "That is the fit with a free intercept."
        if close(got, c_N[-1] * T / len(c_N), rel=1e-5):
            return "That is the secant: it looks at the last checkpoint only."
        return f"For c={c_N.tolist()}, T={T:g} you give {got:.4g}. Minimise the sum of (c_t - a t)^2 over a."
    return None


_MATRICES = {"blocks.0.attention.qkv.weight", "blocks.0.ffn.down.weight"}


def _frozen(answer) -> str | None:
    shapes = {"embedding.weight": (4, 3), "blocks.0.attention_norm.weight": (3,),
              "blocks.0.attention.qkv.weight": (9, 3), "blocks.0.ffn.down.weight": (3, 5), "norm.weight": (3,)}
    base, moved = ({name: torch.full(shape, value) for name, shape in shapes.items()} for value in (1.0, 2.0))
    got = called(answer, base, moved)
    if not isinstance(got, Mapping) or set(got) != set(base):
        return "Return a whole state dict: every tensor of the model, frozen or not."
    moves = {name for name in base if alike(got[name], moved[name])}
    if not _MATRICES <= moves:
        return "The matrices inside the blocks have to move, those of attention too."
    if "embedding.weight" in moves:
        return "The embedding is a matrix too, and it should stay at the base."
    if moves != _MATRICES:
        return "A norm moved. Norms are the tensors with one dimension."
    if not all(alike(got[name], base[name]) for name in set(base) - moves):
        return "A tensor that stays has to hold the base's values."
    return None


def _frozen_solution(base, predicted):
    return {name: base[name] if base[name].ndim < 2 or "embedding" in name else w for name, w in predicted.items()}


def _frozen_in_place(base, predicted):
    """Changes the predicted tensors themselves."""
    for name, weight in predicted.items():
        if "norm" in name or name.startswith("embedding"):
            weight.copy_(base[name])
    return predicted


def _through_base_solution(c_N, T):
    step_N = np.arange(1.0, len(c_N) + 1)
    return T * (step_N @ np.asarray(c_N)) / (step_N @ step_N)


def _momentum_by_walking(N, beta):
    """Step by step, in torch and single precision, by singular values."""
    g_N, m_N, path_NN = torch.zeros(N), torch.zeros(N), []
    for t in range(N):
        g_N = beta * g_N
        g_N[t] += 1
        m_N = m_N + g_N
        path_NN.append(m_N)
    share_N = torch.linalg.svdvals(torch.stack(path_NN)) ** 2
    return share_N[0] / share_N.sum()


def _momentum_solution(N, beta):
    return _first_share(_coefficients(N, beta).cumsum(0))


CHECKS = {
    "07.1": Check(
        "On a straight, steady path (c_t proportional to t), N = 3 and T = 30: what is alpha_3?",
        4, "easy",
        "u is (1, 2, 3) divided by its length. The line through u is u itself, so u . w is that line at step 30.",
        _last_alpha,
        right=[6.43, 90 / 14, 6.4, np.float32(90 / 14), torch.tensor(90 / 14).bfloat16()],
        wrong=[(10, "the secant's"), (14.33, "That is w_3"), (2.14, "alpha_1"), (30, "divided by its length")]),
    "07.2": Check(
        "Write early_share(p): the share of the sum of |m_t|^2 in the first share p of a straight, steady path.",
        5, "easy", "With |m_t| = t, the sum of t^2 up to n grows like n^3 / 3.", _early_share,
        right=[lambda p: p**3, lambda p: np.float32(p) ** 3,
               lambda p: sum(t**2 for t in range(1, int(p * 2000) + 1)) / sum(t**2 for t in range(1, 2001))],
        wrong=[(lambda p: p, "not equal here"), (lambda p: p**2, "adds squares"), (lambda p: p / 3, "Sum t^2"),
               (lambda p: 3 * p**2, "Sum t^2"), (0.003, "A function is asked for")]),
    "07.3": Check(
        "Write from_two(c_1, c_2, T): RELEX's coordinate at step T from two checkpoints.",
        8, "medium", "Two points determine a line; least squares goes through both.", _from_two,
        right=[lambda a, b, T: a + (b - a) * (T - 1), lambda a, b, T: (2 - T) * a + (T - 1) * b,
               lambda a, b, T: np.polyval(np.polyfit([1, 2], [a, b], 1), T),
               lambda a, b, T: torch.tensor(b + (b - a) * (T - 2))],
        wrong=[(lambda a, b, T: b * T / 2, "the secant"), (lambda a, b, T: a + (b - a) * T, "One step too far"),
               (lambda a, b, T: b + (b - a) * (T - 1), "One step too far"), (lambda a, b, T: (a + b) / 2 * T, "passes"),
               (lambda a, b, T: b, "passes through")]),
    "07.4": Check(
        "Write through_base(c_N, T): least squares with the line forced through 0 at step 0, read at step T.",
        8, "medium", "Set the derivative of the sum of (c_t - a t)^2 with respect to a to zero; t runs from 1 to N.",
        _through_base,
        right=[_through_base_solution, lambda c, T: np.float32(_through_base_solution(c, T)),
               lambda c, T: np.linalg.lstsq(np.arange(1.0, len(c) + 1)[:, None], c)[0] * T,
               lambda c, T: (torch.arange(1, len(c) + 1) * c).sum() / sum(t**2 for t in range(1, len(c) + 1)) * T],
        wrong=[(lambda c, T: T * float(np.arange(len(c)) @ c) / sum(t * t for t in range(len(c))), "count from 0"),
               (lambda c, T: np.polyval(np.polyfit(np.arange(1, len(c) + 1), c, 1), T), "free intercept"),
               (lambda c, T: c[-1] * T / len(c), "the secant"), (lambda c, T: 0.0, "Minimise"),
               (lambda c, T: T * (c / np.arange(1, len(c) + 1)).mean(), "Minimise")]),
    "07.5": Check(
        "Write frozen(base, predicted): the predicted state with norms and embedding kept at the base.",
        8, "medium", "A norm's weight has one dimension; the embedding has it in its name.", _frozen,
        right=[_frozen_solution, _frozen_in_place],
        wrong=[(lambda base, moved: moved, "embedding is a matrix too"), (lambda base, moved: base, "have to move"),
               (lambda base, moved: {n: w if "ffn" in n else base[n] for n, w in moved.items()}, "attention too"),
               (lambda base, moved: {n: base[n] if "embedding" in n else w for n, w in moved.items()}, "A norm moved"),
               (lambda base, moved: None, "whole state dict"),
               (lambda base, moved: {n: base[n] if w.ndim < 2 else w for n, w in moved.items()}, "matrix too"),
               (lambda base, moved: {n: w if n in _MATRICES else 0 * w for n, w in moved.items()}, "base's values"),
               (lambda base, moved: {n: w for n, w in moved.items() if "down" in n}, "whole state dict")]),
    "07.6": Check(
        "Write momentum_share(N, beta): the explained variance of one direction, in very many dimensions, of a path "
        "that adds the steps g_t = beta g_{t-1} + fresh noise.",
        10, "hard",
        "Row t: how much of each noise is in m_t, a cumulative sum of powers of beta. G is rows times rows.",
        _momentum_share,
        right=[_momentum_solution, _momentum_by_walking,
               lambda N, beta: np.float32(_momentum_solution(N, beta))],
        wrong=[(lambda N, beta: 8 / math.pi**2, "without momentum"),
               (lambda N, beta: _first_share(np.tri(N)), "plain walk"),
               (lambda N, beta: _first_share(_coefficients(N, beta)), "adds them up"),
               (lambda N, beta: _first_length(_coefficients(N, beta).cumsum(0)), "adds their squares"),
               (lambda N, beta: 1 / N, "different noises are orthogonal")]),
}
