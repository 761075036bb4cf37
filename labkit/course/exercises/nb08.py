"""Exercises of 08_holder_policy (Chen, Liang, Chen and others, arXiv 2605.12058)."""

import math

import numpy as np
import torch

from labkit.course.check import Check
from labkit.course.reading import alike, array, called, close, number

CHANGES = (np.array([0.3, -0.2, 0.9, 0.0]), np.array([-1.5, 0.4, 0.1, 0.1, 0.7]), np.array([0.2, 0.2, 0.2]))


def _mean(ratios: np.ndarray, p: float) -> float:
    """Power mean of positive numbers."""
    return float(np.exp(np.log(ratios).mean()) if p == 0 else np.mean(ratios**p) ** (1 / p))


def _stale(answer) -> str | None:
    for minibatches, epochs in ((8, 1), (4, 3), (1, 1), (1, 4)):
        got, expected = number(called(answer, minibatches, epochs)), minibatches * epochs - 1
        if close(got, expected, within=1e-6):
            continue
        if close(got, minibatches * epochs, within=1e-6):
            return "That is the number of updates. For the first of them all ratios are 1: does p change it?"
        if close(got, (minibatches - 1) * epochs, within=1e-6):
            return "You let every epoch begin afresh. The answers are those of the round's start; is the policy?"
        return (f"With {minibatches} minibatches and {epochs} epochs you say {got:g}. Count the updates of a round "
                "that do not start from the policy which drew the answers.")
    return None


def _negative(answer) -> str | None:
    for change in CHANGES:
        ratios = np.exp(change)
        for p in (0.5, 1.0, 3.0):
            got, expected = number(called(answer, _positive_mean, ratios, p)), _mean(ratios, -p)
            if close(got, expected, rel=1e-6):
                continue
            if close(got, _mean(1 / ratios, p), rel=1e-6):
                return "The mean of the inverses is there; now turn it back."
            if close(got, 1 / _mean(ratios, p), rel=1e-6):
                return "You inverted the result only. What has to go into the mean?"
            return f"You give {got:.4f} for the exponent {-p:g}. How is the harmonic mean (exponent -1) made?"
    return None


def _positive_mean(x, p: float) -> float:
    if p <= 0:
        raise ValueError("this mean takes exponents above 0 only")
    return _mean(array(x), p)


def _coefficient(answer) -> str | None:
    for change in (*CHANGES, np.array([0.9, 0.6, 0.4]), -np.array([0.9, 0.6, 0.4])):
        for A in (1.5, -0.5):
            for p in (2.0, 0.0, -3.0):
                got = array(called(answer, change, A, p))
                if got.size != 1 and got.shape != change.shape:
                    return f"The answer has {len(change)} tokens, and your coefficients have the shape {got.shape}."
                got = got + np.zeros_like(change)  # a single number stands for all tokens
                if (problem := _wrong_coefficient(got, change, A, p)) is not None:
                    return problem
    return None


def _wrong_coefficient(got: np.ndarray, change: np.ndarray, A: float, p: float) -> str | None:
    rho, weights = _mean(np.exp(change), p), np.exp(p * change) / np.exp(p * change).sum()
    free, outside = A * rho * weights, not 0.8 <= rho <= 1.2
    cut = rho > 1.2 if A > 0 else rho < 0.8
    if alike(got, np.zeros_like(free) if cut else free, rel=1e-5, within=1e-8):
        return None
    here = f"At p = {p:g}, A = {A:g} and log-ratios {change.tolist()}, rho is {rho:.3f}. "
    if cut and alike(got, free, rel=1e-5):
        return here + "The clip holds this answer: what is the slope of a constant?"
    if outside and not cut and not got.any():
        return here + "You clip on both sides. The minimum only stops a move that A asks for."
    if not outside and alike(got, A * weights, rel=1e-5):
        return here + "A times W is there; the gradient of rho has rho itself as a factor."
    return here + f"Your first coefficient is {got[0]:.4f}, and it is not A times the slope of rho."


def _trips(answer) -> str | None:
    ratios = array(answer).ravel()
    if len(ratios) < 2:
        return "One token alone has the same mean at every p. Give two ratios or more."
    if not (ratios > 0).all():
        return "Ratios of probabilities are above 0."
    high, low = _mean(ratios, 2.0), _mean(ratios, 0.0)
    if high <= 1.2:
        return f"At p = 2 the mean is {high:.3f}: still inside. Let one ratio be larger."
    if low > 1.2:
        return f"At p = 0 the mean is {low:.3f}: clipped as well. The geometric mean forgives one large ratio in many."
    return None


def _gmpo(answer) -> str | None:
    for change in (*CHANGES, np.array([0.9, 0.6, -0.8])):
        for A in (1.5, -0.5):
            cut = np.minimum(change, 0.4) if A > 0 else np.maximum(change, -0.4)
            got, expected = number(called(answer, change, A)), A * math.exp(cut.mean())
            if close(got, expected, rel=1e-5):
                continue
            if close(got, A * math.exp(np.clip(change, -0.4, 0.4).mean()), rel=1e-5):
                return f"You cut both sides at A = {A}. The clip only stops a move that A asks for."
            if close(got, -expected, rel=1e-5):
                return "The gain is to be raised, so it has the sign of A."
            return f"At A = {A} and log-ratios {change.tolist()} you give {got:.4f}. Which of them are cut, and where?"
    return None


def _moment(answer) -> str | None:
    for change in CHANGES:
        for norm in (np.linspace(0.5, 3.0, len(change)), np.linspace(4.0, 1.0, len(change))):
            for p in (2.0, 0.0, -1.0):
                got = number(called(answer, change, norm, p))
                if (problem := _wrong_moment(got, change, norm, p)) is not None:
                    return problem
    return None


def _wrong_moment(got: float, change: np.ndarray, norm: np.ndarray, p: float) -> str | None:
    W, rho = np.exp(p * change) / np.exp(p * change).sum(), _mean(np.exp(change), p)
    expected = rho**2 * ((W * norm) ** 2).sum()
    if close(got, expected, rel=1e-4):
        return None
    if close(got, rho**2 * (W**2).sum(), rel=1e-4):
        return "That is the moment of scores of length 1. Where do the lengths come in?"
    if close(got, rho**2 * (W**2 * norm).sum(), rel=1e-4):
        return "The lengths are there, but not squared: |a g|^2 is a^2 |g|^2."
    if close(got, ((W * norm) ** 2).sum(), rel=1e-4):
        return "The mean's own size is missing: the coefficients are rho W, not W."
    return f"At p = {p:g} and log-ratios {change.tolist()} you give {got:.4f}. Add up |rho W_t g_t|^2 over tokens."


def _softmax(change, p):
    return torch.softmax(p * change, -1)


def _held(change, A, p):
    """Whether the clip of 0.2 on the sequence holds an answer."""
    return bool(_torch_mean(change, p) > 1.2 if A > 0 else _torch_mean(change, p) < 0.8)


def _slope(change, A, p):
    """The coefficients by autograd through the objective."""
    change = change.clone().requires_grad_()
    rho = _torch_mean(change, p)
    return torch.autograd.grad(torch.minimum(rho * A, rho.clamp(0.8, 1.2) * A), change)[0]


def _free(change, A, p):
    """The coefficients without a clip."""
    return A * _torch_mean(change, p) * _softmax(change, p)


def _both_sides(change, A, p):
    """The coefficients with a clip that cuts whatever A asks for."""
    return _free(change, A, p) * bool(0.8 <= _torch_mean(change, p) <= 1.2)


def _torch_mean(change, p):
    return change.mean().exp() if p == 0 else (p * change).exp().mean() ** (1 / p)


CHECKS = {
    "08.1": Check(
        "Write can_matter(minibatches, epochs): in how many of a round's updates can the exponent change anything?",
        3, "easy", "What are the ratios in the very first update?", _stale,
        right=[lambda m, e: m * e - 1, lambda minibatches, epochs: np.int64(minibatches * epochs) - 1,
               lambda m, e: len(range(1, m * e)), lambda m, e: torch.tensor(m * e - 1.0).half()],
        wrong=[(lambda m, e: m * e, "number of updates"), (lambda m, e: (m - 1) * e, "begin afresh"),
               (lambda m, e: m + e, "Count the updates"), (lambda m, e: e - 1, "Count the updates"),
               (7, "A function")]),
    "08.2": Check(
        "Give ratios of a right answer (A > 0) that the clip 1.2 cuts at p = 2 and not at p = 0.",
        4, "easy", "One large ratio among many ones.", _trips,
        right=[[1.0, 1.0, 1.0, 2.0], np.array([0.2, 2.0]), torch.tensor([1.0, 1.0, 1.0, 2.0]).bfloat16(), (1, 1, 1, 2)],
        wrong=[([1.1, 1.1], "still inside"), ([2.0, 2.0], "clipped as well"), ([1.3], "One token"),
               ([-1.0, 3.0], "above 0"), (lambda: [1.0, 2.0], "not a function")]),
    "08.3": Check(
        "Write negative(mean, ratios, p): the power mean of exponent -p, when mean(x, q) takes q > 0 only.",
        5, "medium", "The harmonic mean is the inverse of the arithmetic mean of what?", _negative,
        right=[lambda mean, r, p: 1 / mean(1 / r, p), lambda mean, r, p: mean([1 / x for x in r], p) ** -1,
               lambda mean, r, p: mean(r**-p, 1) ** (-1 / p),
               lambda mean, r, p: torch.as_tensor(mean(r.reciprocal(), p)).reciprocal().float()],
        wrong=[(lambda mean, r, p: mean(1 / r, p), "turn it back"),
               (lambda mean, r, p: 1 / mean(r, p), "into the mean"),
               (lambda mean, r, p: mean(r, p), "the exponent"), (lambda mean, r, p: -mean(r, p), "the exponent"),
               (lambda mean, r, p: mean(r, -p), "raised ValueError")]),
    "08.4": Check(
        "Write coefficient(change_T, A, p): the factor of each token's score in the gradient of J, clip 0.2 included.",
        6, "medium",
        "Where the clip does not hold: A times the gradient of rho. When does the minimum pick the constant?",
        _coefficient,
        right=[lambda change, A, p: _free(change, A, p) * (not _held(change, A, p)),
               lambda change, A, p: 0.0 if _held(change, A, p) else _free(change, A, p),
               _slope, lambda change, A, p: _slope(change, A, p).float()],
        wrong=[(_free, "slope of a constant"), (_both_sides, "both sides"),
               (lambda change, A, p: A * _softmax(change, p) * (not _held(change, A, p)), "rho itself"),
               (lambda change, A, p: -_free(change, A, p), "slope of rho"),
               (lambda change, A, p: _free(change, A, p) / A, "slope of rho"),
               (lambda change, A, p: change[:2], "shape")]),
    "08.5": Check(
        "Write gmpo_gain(change_T, A): GMPO's objective of one answer, with its clip of 0.4 on each log-ratio.",
        7, "medium", "Cut from above where A > 0, from below where A < 0; then the geometric mean times A.", _gmpo,
        right=[lambda change, A: A * (change.clamp(max=0.4) if A > 0 else change.clamp(min=-0.4)).mean().exp(),
               lambda change, A: A * np.exp(np.mean(np.where(A * change > abs(A) * 0.4, np.sign(A) * 0.4, change))),
               lambda change, A: A * math.prod(min(r, math.exp(0.4)) if A > 0 else max(r, math.exp(-0.4))
                                               for r in change.exp().tolist()) ** (1 / len(change))],
        wrong=[(lambda change, A: A * change.clamp(-0.4, 0.4).mean().exp(), "both sides"),
               (lambda change, A: -A * (change.clamp(max=0.4) if A > 0 else change.clamp(min=-0.4)).mean().exp(),
                "sign of A"),
               (lambda change, A: A * change.mean().exp(), "Which of them"),
               (lambda change, A: A * (change.exp().clamp(max=1.4) if A > 0 else change.exp().clamp(min=0.6)).mean(),
                "Which of them")]),
    "08.6": Check(
        "Write moment(change_T, norm_T, p): one answer's second moment, A = 1, orthogonal scores of lengths norm_T.",
        8, "hard", "G = sum_t rho W_t g_t with orthogonal g_t: what is |G|^2?", _moment,
        right=[lambda change, norm, p: _torch_mean(change, p) ** 2 * (_softmax(change, p) * norm).square().sum(),
               lambda change, norm, p: (_free(change, 1, p).diag() @ norm.diag()).sum(0).norm() ** 2,
               lambda change, norm,
               p: sum((a * g) ** 2 for a, g in zip(_free(change, 1.0, p), norm, strict=True)).float()],
        wrong=[(lambda change, norm, p: _torch_mean(change, p) ** 2 * _softmax(change, p).square().sum(), "length 1"),
               (lambda change, norm, p: _torch_mean(change, p) ** 2 * (_softmax(change, p).square() * norm).sum(),
                "not squared"),
               (lambda change, norm, p: (_softmax(change, p) * norm).square().sum(), "own size"),
               (lambda change, norm, p: (_free(change, 1.0, p) * norm).sum() ** 2, "over tokens")]),
}
