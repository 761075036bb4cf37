"""Exercises of 11_opd_objective (Revisiting On-Policy Distillation, arXiv 2603.25562; verl, thunlp/OPD and TRL)."""

import math

import numpy as np
import torch

from labkit.course.check import Check
from labkit.course.reading import alike, array, called, close, number, slack


def _cubes(answer) -> str | None:
    for T in (1, 2, 5, 40):
        got, right = number(called(answer, T)), T * (T + 1) * (2 * T + 1) / 6
        if close(got, right, within=1e-6 * right):
            continue
        if close(got, T**3, within=1e-6):
            return "Every score then paid for all T costs. Earlier ones drop out: position t pays for T - t + 1."
        if close(got, T * (T + 1) / 2, within=1e-6):
            return "Those are the sums themselves. In a variance each stands squared."
        if close(got, T, within=1e-6):
            return "That is the token-level gradient: each score pays for its own cost only."
        if close(got, (T - 1) * T * (2 * T - 1) / 6, within=1e-6):
            return "The token's own cost belongs to the sum: at the last position it is 1, not 0."
        return f"For T = {T} you say {got:.6g}. Independent scores: add up the squares of what each is multiplied with."
    return None


def _pull(answer) -> str | None:
    q = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    for on in ((0, 1), (2, 4), (0, 1, 2, 3, 4)):
        S = np.isin(np.arange(5), on)
        got = array(called(answer, q, S))
        right = q * (S - q[S].sum())
        if got.shape == (5,) and alike(got, right, within=1e-9):
            continue
        if got.shape == (5,) and alike(got, -right, within=1e-9):
            return "The size is right. This is the gradient of the mass itself; descent then subtracts it."
        if got.shape == (5,) and alike(got, q * S, within=1e-9):
            return "A softmax is coupled: raising any logit lowers all other probabilities. Tokens off it move too."
        if got.shape == (5,) and alike(got, q * (1 - q) * S, within=1e-9):
            return "Those are the diagonal terms. The tokens of the menu also take mass from each other."
        if got.shape != (5,):
            return f"One number for each of the 5 logits is asked for, not the shape {got.shape}."
        return f"For q = {q.tolist()} and the menu {list(on)} you give {got.round(3).tolist()}. Differentiate q(S)."
    return None


def _pull_by_autograd(q_V, S_V):
    logits_V = q_V.log().requires_grad_()
    return torch.autograd.grad(logits_V.softmax(0)[S_V].sum(), logits_V)[0]


def _top_1(answer) -> str | None:
    for q, p in ((0.9, 0.5), (0.2, 0.7)):
        both = array(called(answer, q, p))
        if both.shape != (2,):
            return "Return two numbers: the loss of the renormalised menu, and the cost in the other form."
        renormalised, cost = both[:1], both[1:]
        if close(renormalised, q * math.log(q / p), within=1e-6):
            return "Rescaled to sum to one, what is the probability of the only token on the menu?"
        if not close(renormalised, 0.0, within=1e-9):
            return f"At q = {q}, p = {p} your renormalised loss is {both[0]:.4g}. Rescale both to one first."
        if close(cost, 0.0, within=1e-9):
            return "The weight is rescaled in that form, the log-ratio is not."
        if close(cost, math.log(p / q), within=1e-6):
            return "The sign: a cost is positive where the student likes the token more than the teacher does."
        if not close(cost, math.log(q / p), within=1e-6):
            return f"At q = {q}, p = {p} your cost is {both[1]:.4g}. Its weight is 1; what is the log-ratio?"
    return None


def _of_d(answer) -> str | None:
    logits_V = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    log_p_V = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    log_q_V = logits_V.log_softmax(0)
    q_V = log_q_V.exp()
    right = torch.autograd.grad((q_V * (log_q_V - log_p_V)).sum(), logits_V, retain_graph=True)[0]
    of_V = called(answer, log_q_V - log_p_V)
    if not isinstance(of_V, torch.Tensor) or of_V.shape != log_q_V.shape:
        return "Give a loss for each value of d: a tensor of d's shape."
    loss = (q_V.detach() * of_V).sum()
    if not loss.requires_grad:
        return "Nothing is left to differentiate: d must stay in the graph."
    got = torch.autograd.grad(loss, logits_V)[0]
    within = 1e-7 + slack(of_V)
    if torch.allclose(got, right, atol=within):
        return None
    if got.abs().max() < 1e-9:
        return "The mean gradient is zero: the teacher has dropped out. The derivative must be d itself."
    if torch.allclose(got, 2 * right, atol=within):
        return "Twice too large."
    if torch.allclose(got, -right, atol=within):
        return "The sign: descending it would move away from the teacher."
    return "The mean gradient is E[f'(d) s]. Which f' makes that E[d s]?"


def _least_gamma(answer) -> str | None:
    for p, L, share in ((0.6, 5.0, 0.05), (0.3, 2.0, 0.1)):
        got, right = number(called(answer, p, L, share)), math.log(p * (1 - share) / ((1 - p) * share)) / L
        if close(got, right, within=1e-4):
            continue
        if close(got, -right, within=1e-4):
            return "The sign: more discounting of the future (a smaller gamma) leaves more direct answers."
        if close(got, math.log(p / share) / L, within=1e-4):
            return "Shares must sum to one: the weight of a chain, 1 - p, stands in the denominator too."
        if close(got, right * L, within=1e-4):
            return "That is gamma times L."
        return f"At p = {p}, L = {L} and a share of {share} you say {got:.4g}. Solve for the odds share / (1 - share)."
    return None


def _two_bins(answer) -> str | None:
    for q, p in ((0.6, 0.9), (0.2, 0.1), (0.5, 0.5)):
        got = number(called(answer, q, p))
        right = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
        if close(got, right, within=1e-6):
            continue
        if close(got, q * math.log(q / p), within=1e-6):
            return "The rest is a bin too."
        if close(got, p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)), within=1e-6):
            return "That is KL(p, q): the student q must be the one that is averaged over."
        return f"At q = {q}, p = {p} you say {got:.4g}. Two terms: the token, and 1 minus it."
    return None


CHECKS = {
    "11.1": Check(
        "a menu of one token", 5, "easy",
        "What is softmax of a single number? In the other form only the weight is rescaled.",
        _top_1, right=[lambda q, p: (0.0, math.log(q / p)), lambda q, p: (0, math.log(q) - math.log(p)),
               lambda q, p: np.array([0.0, -np.log(p / q)]), lambda q, p: [0.0 * q, (q / p).log()],
               lambda q, p: torch.tensor([0.0, math.log(q / p)]).bfloat16()],
        wrong=[(lambda q, p: (q * math.log(q / p), math.log(q / p)), "Rescaled"),
               (lambda q, p: (1.0, math.log(q / p)), "Rescale both"), (lambda q, p: (0.0, 0.0), "log-ratio is not"),
               (lambda q, p: (0.0, math.log(p / q)), "sign"), (lambda q, p: (0.0, q), "Its weight is 1"),
               (lambda q, p: (0.0, q * math.log(q / p)), "Its weight is 1"), (lambda q, p: 0.0, "two numbers")]),
    "11.2": Check(
        "the divergence of two bins", 6, "easy", "The two distributions are (q, 1 - q) and (p, 1 - p).", _two_bins,
        right=[lambda q, p: q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)),
               lambda q, p: torch.distributions.kl_divergence(*map(torch.distributions.Bernoulli, (q, p))),
               lambda q, p: sum(a * np.log(a / b) for a, b in zip((q, 1 - q), (p, 1 - p), strict=True))],
        wrong=[(lambda q, p: q * math.log(q / p), "bin too"),
               (lambda q, p: p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)), "averaged"),
               (lambda q, p: abs(q - p), "Two terms"),
               (lambda q, p: q * math.log(q / p) + (1 - p) * math.log((1 - q) / (1 - p)), "Two terms")]),
    "11.3": Check(
        "the variance of a sum of scores, each times the costs still to come", 6, "medium",
        "The score of position t is multiplied with T - t + 1. The scores are independent, so variances add.", _cubes,
        right=[lambda T: sum(n**2 for n in range(1, T + 1)), lambda T: T * (T + 1) * (2 * T + 1) / 6,
               lambda T: np.square(np.arange(T) + 1).sum(),
               lambda T: (torch.ones(T, T).tril().sum(0).bfloat16() ** 2).sum()],
        wrong=[(lambda T: T**3, "Earlier ones drop out"), (lambda T: T * (T + 1) / 2, "squared"),
               (lambda T: T, "token-level"), (lambda T: (T - 1) * T * (2 * T - 1) / 6, "own cost"),
               (lambda T: 2 * T, "add up the squares")]),
    "11.4": Check(
        "the gradient of a menu's mass in the logits", 6, "medium",
        "The gradient of q_v in the logit of u is q_v ([u = v] - q_u). Sum over the v on the menu.", _pull,
        right=[lambda q_V, S_V: q_V * (S_V.double() - q_V[S_V].sum()),
               lambda q_V, S_V: q_V * S_V - q_V * (q_V * S_V).sum(),
               lambda q_V, S_V: (q_V.diag() - q_V.outer(q_V)) @ S_V.double(), _pull_by_autograd,
               lambda q, S: [q[v] * (bool(S[v]) - sum(q[u] for u in range(5) if S[u])) for v in range(5)],
               lambda q, S: (np.diag(q) - np.outer(q, q)) @ S.astype(np.float16)],
        wrong=[(lambda q_V, S_V: -q_V * (S_V.double() - q_V[S_V].sum()), "The size is right"),
               (lambda q_V, S_V: q_V * S_V, "coupled"), (lambda q_V, S_V: q_V * (1 - q_V) * S_V, "diagonal"),
               (lambda q_V, S_V: q_V, "Differentiate"), (lambda q_V, S_V: q_V[S_V].sum(), "each of the 5 logits")]),
    "11.5": Check(
        "the least discount that keeps direct answers rare", 6, "medium",
        "The odds of a direct answer are p e^(-gamma L) / (1 - p). Set them to share / (1 - share).", _least_gamma,
        right=[lambda p, L, share: math.log(p * (1 - share) / ((1 - p) * share)) / L,
               lambda p, L, share: (torch.logit(p) - torch.logit(share)) / L,
               lambda p, L, share: np.float32(-np.log(share / (1 - share) * (1 / p - 1)) / L)],
        wrong=[(lambda p, L, share: -math.log(p * (1 - share) / ((1 - p) * share)) / L, "sign"),
               (lambda p, L, share: math.log(p / share) / L, "denominator"),
               (lambda p, L, share: math.log(p * (1 - share) / ((1 - p) * share)), "times L"),
               (lambda p, L, share: p * L, "odds")]),
    "11.6": Check(
        "a loss of d that may be differentiated through d", 7, "hard",
        "The gradient of d is the score s, for the teacher does not move. You want d times s.", _of_d,
        right=[lambda d: d**2 / 2, lambda d: 0.5 * d * d, lambda d: d.detach() * d,
               lambda d: d.square().float().div(2), lambda d: d.pow(2) / 2 + 3.0, lambda d: (d.half() ** 2) / 2],
        wrong=[(lambda d: d.detach(), "Nothing is left"), (lambda d: d, "dropped out"), (lambda d: d**2, "Twice"),
               (lambda d: -(d**2) / 2, "sign"), (lambda d: d.abs(), "Which f'"),
               (lambda d: (d**2).mean() / 2, "of d's shape"),
               (lambda d: d.exp() - d, "Which f'")]),
}
