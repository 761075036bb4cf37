"""Exercises of 12_opd_open_questions (Rethinking On-Policy Distillation, arXiv 2604.13016, sections 6 and 8)."""

import math

import numpy as np
import torch

from labkit.course.check import Check
from labkit.course.reading import alike, array, called, close, number


def _expected_R(answer) -> str | None:
    for N, c in ((100, 0.1), (2, 0.5), (4000, 0.01), (50, 0.0)):
        got = number(called(answer, N, c))
        if close(got, 1 + (N - 1) * c, within=1e-6):
            continue
        if close(got, 1 + N * c, within=1e-6):
            return "Nearly: a gradient meets the N - 1 others; its own square is already counted."
        if close(got, N * c, within=1e-6):
            return "That is the mean's part alone. What do orthogonal gradients (c = 0) have?"
        if close(got, c + (1 - c) / N, within=1e-6):
            return "That is the coherence C. R is N times that."
        return f"At N = {N} and c = {c} you say {got:.4g}. Multiply out the square of the sum: N terms and N (N - 1)."
    return None


def _tables() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.dirichlet(np.ones(V), size=K) for K, V in ((2, 3), (5, 7))]


def _best_blind(answer) -> str | None:
    for p_KV in _tables():
        got, log_mean = array(called(answer, p_KV)), np.exp(np.log(p_KV).mean(0))
        if got.shape == log_mean.shape and alike(got, log_mean / log_mean.sum(), within=1e-4):
            continue
        if got.shape != log_mean.shape:
            return f"The shape is {got.shape}; there is one distribution for all prompts, {log_mean.shape}."
        if alike(got, p_KV.mean(0), within=1e-6):
            return "That minimises the forward KL(p, q). Here q stands in front."
        if alike(got, log_mean, within=1e-6):
            return f"The proportions are right, and they sum to {got.sum():.3f}."
        return "The gradient of the mean KL is not 0 there. Set log q minus the mean of log p to a constant."
    return None


def _blind_by_descent(p_KV):
    logits_V = torch.zeros(p_KV.shape[1], dtype=torch.float64, requires_grad=True)
    for _ in range(300):
        q_V = logits_V.softmax(0)
        kl_K = (q_V * (q_V.log() - p_KV.log())).sum(1)
        logits_V.data -= 2 * torch.autograd.grad(kl_K.mean(), logits_V)[0]
    return logits_V.softmax(0)


def _head_gram(answer) -> str | None:
    rng = np.random.default_rng(0)
    for N, V, D in ((4, 5, 3), (3, 3, 3)):
        ell_NV, h_ND = rng.standard_normal((N, V)), rng.standard_normal((N, D))
        outer_NP = (ell_NV[:, :, None] * h_ND[:, None]).reshape(N, -1)
        got, truth = array(called(answer, ell_NV, h_ND)), outer_NP @ outer_NP.T
        if got.shape == truth.shape and alike(got, truth, within=1e-9):
            continue
        if got.shape != truth.shape:
            return f"The shape is {got.shape}; one number for each pair of positions is {truth.shape}."
        if alike(got, ell_NV @ ell_NV.T, within=1e-9):
            return "Those are the products of the signals. The hidden states have a say too."
        if alike(got, ell_NV @ ell_NV.T @ (h_ND @ h_ND.T), within=1e-9):
            return "A matrix product mixes positions. For one pair s, t two numbers are multiplied."
        return "Not the inner products. Write out the sum over v and d of l_s[v] h_s[d] l_t[v] h_t[d]."
    return None


def _delta(answer) -> str | None:
    got, truth = number(answer), 0.351 * 0.844 + 0.649 * (0.045 - 0.131)
    if close(got, truth, within=0.002):
        return None
    if close(got, 0.351 * 0.844, within=0.002):
        return "That leaves out the broken prefixes, where the teacher is behind."
    if close(got, 0.351 * 0.844 + 0.649 * 0.045, within=0.002):
        return "On broken prefixes the student's 0.131 must be taken off."
    return f"You say {got:.3f}. Weigh the two gaps by their shares, 0.351 and 0.649."


def _at_4k(answer) -> str | None:
    got, rate = number(answer), math.log(0.3659 / 0.0237) / 15
    if close(got, 0.3659 * math.exp(-3 * rate), within=0.003):
        return None
    if close(got, 0.3659 * math.exp(-4 * rate), within=0.003):
        return "From 1K to 4K are three thousand tokens."
    if close(got, 0.3659 + (0.0237 - 0.3659) * 3 / 15, within=0.003):
        return "That is a straight line. A constant rate of errors takes the same share away in each thousand tokens."
    return f"You say {got:.3f}. In 15K tokens the log falls by ln(0.3659 / 0.0237); how much in 3K?"


CHECKS = {
    "12.1": Check("R of N gradients with a common mean", 5, "easy",
                  "E|sum g|^2 = N E|g|^2 + N (N - 1) |mu|^2.", _expected_R,
                  right=[lambda N, c: 1 + (N - 1) * c, lambda N, c: N * c + (1 - c),
                         lambda N, c: (N + N * (N - 1) * c) / N, lambda N, c: np.full(N, c).sum() + 1 - c],
                  wrong=[(lambda N, c: 1 + N * c, "its own square"), (lambda N, c: N * c, "mean's part alone"),
                         (lambda N, c: c + (1 - c) / N, "coherence C"),
                         (lambda N, c: N, "Multiply out"), (lambda N, c: N + N * (N - 1) * c, "Multiply out")]),
    "12.2": Check("The advantage from its two parts", 5, "easy", "Delta = pi * gap_ok + (1 - pi) * gap_broken.", _delta,
                  right=[0.24, 0.2404, 0.351 * 0.844 - 0.649 * 0.086],
                  wrong=[(24.0, "Weigh"), (0.844 + 0.045 - 0.131, "by their shares"), (0.296, "leaves out"),
                         (0.3254, "taken off"), (0.5, "Weigh")]),
    "12.3": Check("A fall at a constant rate", 8, "medium",
                  "Solve the rate from the two ends, then go three thousand tokens from the first.", _at_4k,
                  right=[0.2117, 0.212, 0.21, 0.3659 * (0.0237 / 0.3659) ** 0.2],
                  wrong=[(0.1764, "three thousand"), (0.29746, "straight line"), (0.1, "log falls"),
                         (21.2, "log falls"), (0.2709, "log falls")]),
    "12.4": Check("All inner products of the head's gradients", 7, "medium",
                  "<l h^T, m k^T> = (l . m)(h . k).", _head_gram,
                  right=[lambda ell_NV, h_ND: (ell_NV @ ell_NV.T) * (h_ND @ h_ND.T),
                         lambda ell, h: torch.einsum("nv,mv,nd,md->nm", ell, ell, h, h),
                         lambda ell, h: [[np.dot(a, b) * np.dot(c, d) for b, d in zip(ell, h, strict=True)]
                                       for a, c in zip(ell, h, strict=True)]],
                  wrong=[(lambda ell_NV, h_ND: ell_NV @ ell_NV.T, "hidden states"),
                         (lambda ell_NV, h_ND: (ell_NV @ ell_NV.T) @ (h_ND @ h_ND.T), "mixes positions"),
                         (lambda ell_NV, h_ND: ell_NV.T @ h_ND, "shape"),
                         (lambda ell, h: ell @ ell.T + h @ h.T, "Not the inner products")]),
    "12.5": Check("The best distribution that cannot see the prompt", 7, "hard",
                  "The gradient of KL(q, p_k) in the logits is q (log q - log p_k - KL_k). Its mean over k must be 0.",
                  _best_blind,
                  right=[lambda p_KV: p_KV.log().mean(0).softmax(0),
                         lambda p_KV: p_KV.prod(0) ** (1 / len(p_KV)) / (p_KV.prod(0) ** (1 / len(p_KV))).sum(),
                         lambda p_KV: (q := np.exp(np.mean(np.log(p_KV), axis=0))) / np.sum(q), _blind_by_descent],
                  wrong=[(lambda p_KV: p_KV.mean(0), "forward KL"), (lambda p_KV: p_KV.log().mean(0).exp(), "sum to"),
                         (lambda p_KV: p_KV[0], "not 0"),
                         (lambda p_KV: p_KV.log().softmax(1), "The shape is"),
                         (lambda p_KV: (q := 1 / (1 / p_KV).mean(0)) / q.sum(), "not 0")]),
}
