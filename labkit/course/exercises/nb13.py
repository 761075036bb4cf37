"""Exercises of 13_sft_rl_opd (RL's Razor, arXiv 2509.04259; Retaining by Doing, 2510.18874; a post by wh, 2026)."""

import math

import numpy as np
import torch

from labkit.course.check import Check
from labkit.course.reading import alike, array, called, close, number

BASES = [tuple(np.array(row, dtype=float) for row in pair) for pair in (
    ((0.30, 0.15, 0.10, 0.05, 0.25, 0.15), (1, 1, 1, 1, 0, 0)), ((0.7, 0.2, 0.1), (0, 1, 1)))]


def _nearest(answer) -> str | None:
    for base, right in BASES:
        for a in (0.95, 0.8):
            got = array(called(answer, base, right, a))
            mass = base @ right
            if alike(got, base * (a * right / mass + (1 - a) * (1 - right) / (1 - mass))):
                continue
            if alike(got, base * right / mass):
                return f"That one is right always, not {a:.0%} of the time. Where does the rest of the mass go?"
            if alike(got, a * right / right.sum() + (1 - a) * (1 - right) / (1 - right).sum()):
                return "That spreads the mass evenly. The base likes some right answers, and some wrong ones, more."
            if alike(got, base * (a * right + (1 - a) * (1 - right))):
                return f"The probabilities sum to {got.sum():.2f}. Each side must sum to its share."
            return f"For {base.tolist()} and a = {a} you give {np.round(got, 3).tolist()}. Where is q/p constant?"
    return None


def _nearest_in_place(base_Y, right_Y, a):
    good_Y = right_Y.astype(bool)  # numpy alone can do this
    base_Y[good_Y] *= a / base_Y[good_Y].sum()
    base_Y[~good_Y] *= (1 - a) / base_Y[~good_Y].sum()
    return base_Y


def _least_move(answer) -> str | None:
    for mass, a in ((0.6, 0.95), (0.1, 0.8), (0.01, 0.5)):
        got, left = number(called(answer, mass, a)), (1 - mass) * math.log((1 - mass) / (1 - a))
        if close(got, mass * math.log(mass / a) + left, within=1e-3):
            continue
        if close(got, a * math.log(a / mass) + (1 - a) * math.log((1 - a) / (1 - mass)), within=1e-3):
            return "That is KL(policy, base). K is the other direction: the base draws the answers."
        if close(got, (mass * math.log(mass / a) + left) / math.log(2), within=1e-3):
            return "That is in bits; the course counts in nats, with the natural logarithm."
        if close(got, -math.log(mass), within=1e-3):
            return "That is KL(q, base) for a policy that is always right. Here it is right with probability a only."
        if close(got, mass * math.log(mass / a), within=1e-3) or close(got, left, within=1e-3):
            return "That is one of two terms: the base gives right and wrong answers."
        return f"At mass {mass} and a = {a} you say {got:.4g}. Only two sets matter: right and wrong."
    return None


def _tilted(answer) -> str | None:
    for base, right in BASES:
        for beta in (0.1, 1.0):
            got = array(called(answer, base, right, beta))
            weight = base * np.exp(right / beta)
            if alike(got, weight / weight.sum()):
                continue
            if alike(got, weight):
                return f"The probabilities sum to {got.sum():.3g}."
            if alike(got, np.exp(right / beta) / np.exp(right / beta).sum()):
                return "The base has dropped out: that is where an entropy bonus ends, not a penalty towards the base."
            if alike(got, base * np.exp(beta * right) / (base * np.exp(beta * right)).sum()):
                return "Upside down: a small beta is a weak penalty, and should let the reward win."
            if alike(got, base * right / (base * right).sum()):
                return "That is the limit of beta = 0. A penalty leaves wrong answers a little."
            return f"At beta = {beta} you give {np.round(got, 3).tolist()}. Set R - beta log(q/p) to a constant."
    return None


def _k3(answer) -> str | None:
    base = np.array([0.2, 0.3, 0.5])
    for policy in (np.array([0.6, 0.3, 0.1]), np.array([0.1, 0.2, 0.7])):
        got = array([number(called(answer, math.log(p), math.log(b))) for p, b in zip(policy, base, strict=True)])
        mean, kl = policy @ got, float(policy @ np.log(policy / base))
        within = 1e-6 + got.slack * np.abs(policy * got).sum()
        if close(mean, -kl, within=1e-6):
            return "The sign: your mean is minus the divergence."
        if not close(mean, kl, within=within):
            return f"Over the policy's own tokens your mean is {mean:.3f}, and the divergence is {kl:.3f}."
    low = min(number(called(answer, 0.0, math.log(r))) for r in (0.2, 0.5, 0.9, 1.05, 1.25, 3.0))
    if low < -1e-9 - low.slack:
        return f"Unbiased, but {low:.2f} on one token. How much of which term of mean 0 mends it?"
    return None


def _left_out(answer) -> str | None:
    rng = np.random.default_rng(0)
    K_N, arm_N = rng.uniform(0, 10, 40), np.array(["a", "b", "c", "d"]).repeat(10)
    lost_N = 0.02 * K_N + 0.004 * K_N**2 + rng.normal(0, 0.02, 40) + 0.3 * (arm_N == "c")
    for arm in "ca":
        got, others = array(called(answer, K_N, lost_N, arm_N, arm)), arm_N != arm
        if got.size == 10:
            got = got.reshape(10)
        if got.shape != (10,):
            return f"The arm has 10 points, and you return the shape {tuple(got.shape)}."
        fits = ((2, others, None), (2, others | True, "The arm itself was in the fit: it is not left out."),
                (2, ~others, "Only the arm itself was in the fit: the others should predict it."),
                (1, others, "That is a straight line; the law is a parabola."))
        predicted = [(what, np.polyval(np.polyfit(K_N[fitted], lost_N[fitted], degree), K_N[~others]))
                     for degree, fitted, what in fits]
        if alike(got, predicted[0][1] - lost_N[~others], within=1e-4):
            return "Those are errors. Return the predictions themselves."
        whats = [what for what, values in predicted if alike(got, values, within=1e-4)]
        if whats[:1] != [None]:
            return whats[0] if whats else f"For arm {arm!r} you begin with {got[0]:.3f}. Which points were fitted?"
    return None


def _matched(answer) -> str | None:
    sft = 0.994 + (0.95 - 0.768) / (0.980 - 0.768) * (0.577 - 0.994)
    opd = 0.985 + (0.95 - 0.730) / (0.983 - 0.730) * (0.548 - 0.985)
    if close(answer, opd - sft, within=0.0012):
        return None
    if close(answer, sft - opd, within=0.0012):
        return "The size is right. OPD minus SFT: which of the two is higher?"
    if close(answer, opd - 0.015, within=0.002) or close(answer, 0.283 - 0.015, within=0.002):
        return "That is the student against its teacher: the comparison without the control."
    if close(answer, 0.283 - 0.337, within=0.0012) or close(answer, 0.548 - 0.577, within=0.0012):
        return "That is at equal steps. Find where each curve crosses new accuracy 0.95, between 20 and 40 steps."
    return "For each method: on the line from step 20 to step 40, how high is old where new is 0.95? Then subtract."


CHECKS = {
    "13.1": Check(
        "OPD's old accuracy minus SFT's where both first reach new accuracy 0.95, from the pilot's numbers.",
        6, "easy",
        "Each method crosses 0.95 between 20 and 40 steps: interpolate old against new accuracy there.", _matched,
        right=[np.interp(0.95, [0.730, 0.983], [0.985, 0.548]) - np.interp(0.95, [0.768, 0.980], [0.994, 0.577]),
               0.985 + 0.22 / 0.253 * -0.437 - (0.994 + 0.182 / 0.212 * -0.417), -0.031],
        wrong=[(0.268, "without the control"), (-0.054, "equal steps"), (0.031, "which of the two"),
               (0.5, "subtract")]),
    "13.2": Check(
        "Write nearest(base_Y, right_Y, a): the q nearest to the base that is right with probability a.",
        6, "medium",
        "Two sums are fixed, so there are two multipliers: q/p is one constant on right answers, another on wrong.",
        _nearest,
        right=[lambda p, r, a: p * (a * r / (p @ r) + (1 - a) * (1 - r) / (1 - p @ r)),
               lambda p, r, a: torch.where(r > 0, a * p / p[r > 0].sum(), (1 - a) * p / p[r == 0].sum()),
               lambda p, r, a: [x * (a / sum(p[r == 1]) if good else (1 - a) / sum(p[r == 0]))
                                for x, good in zip(p, r, strict=True)], _nearest_in_place],
        wrong=[(lambda p, r, a: p * r / (p @ r), "right always"), (lambda p, r, a: p, "Where is"),
               (lambda p, r, a: a * r / r.sum() + (1 - a) * (1 - r) / (1 - r).sum(), "evenly"),
               (lambda p, r, a: p * (a * r + (1 - a) * (1 - r)), "sum to")]),
    "13.3": Check(
        "Write least_K(mass, a): the least KL(base, policy) from a base right with `mass` to a policy right with a.",
        6, "medium",
        "The nearest policy scales right and wrong answers by a/mass and (1-a)/(1-mass): log(p/q) has two values.",
        _least_move,
        right=[lambda m, a: m * math.log(m / a) + (1 - m) * math.log((1 - m) / (1 - a)),
               lambda m, a: torch.distributions.kl_divergence(*map(torch.distributions.Bernoulli, (m, a))),
               lambda m, a: float(np.dot([m, 1 - m], np.log([m / a, (1 - m) / (1 - a)])))],
        wrong=[(lambda m, a: a * math.log(a / m) + (1 - a) * math.log((1 - a) / (1 - m)), "other direction"),
               (lambda m, a: -math.log(m), "always right"), (lambda m, a: m * math.log(m / a), "two terms"),
               (lambda m, a: a - m, "Only two sets"),
               (lambda m, a: m * np.log2(m / a) + (1 - m) * np.log2((1 - m) / (1 - a)), "in bits")]),
    "13.4": Check(
        "Write left_out(K_N, lost_N, arm_N, arm): predictions for one arm from a parabola fitted to all others.",
        8, "medium", "A mask arm_N != arm, np.polyfit of degree 2, np.polyval.", _left_out,
        right=[lambda K, F, a, arm: np.polyval(np.polyfit(K[a != arm], F[a != arm], 2), K[a == arm]),
               lambda K, F, a, arm: np.polynomial.Polynomial.fit(K[a != arm], F[a != arm], 2)(K[a == arm]),
               lambda K, F, a, arm: torch.linalg.lstsq(torch.stack([K[a != arm] ** n for n in range(3)], 1),
                                                       F[a != arm, None]).solution.T
               @ torch.stack([K[a == arm] ** n for n in range(3)])],
        wrong=[(lambda K, F, a, arm: np.polyval(np.polyfit(K, F, 2), K[a == arm]), "not left out"),
               (lambda K, F, a, arm: np.polyval(np.polyfit(K[a != arm], F[a != arm], 1), K[a == arm]), "straight line"),
               (lambda K, F, a, arm: np.polyval(np.polyfit(K[a == arm], F[a == arm], 2), K[a == arm]), "Only the arm"),
               (lambda K, F, a, arm: np.polyval(np.polyfit(K[a != "c"], F[a != "c"], 2), K[a == arm]), "Which points"),
               (lambda K, F, a, arm: K, "shape")]),
    "13.5": Check(
        "Write k3(logp, base_logp): an unbiased estimate of KL(policy, base) that is never negative.",
        6, "hard",
        "With r = base/policy at the drawn token, E[r] = 1. Start from -log r and add something of mean 0.", _k3,
        right=[lambda a, b: math.exp(b - a) - 1 - (b - a), lambda a, b: np.expm1(b - a) - b + a,
               lambda a, b: torch.exp(b - a) - (b - a) - 1,
               lambda a, b: (r := math.exp(b) / math.exp(a)) - math.log(r) - 1],
        wrong=[(lambda a, b: a - b, "Unbiased, but"), (lambda a, b: b - a, "sign"),
               (lambda a, b: (a - b) + 0.7 * (math.exp(b - a) - 1), "How much"), (lambda a, b: 0.4975, "your mean"),
               (lambda a, b: (a - b) ** 2 / 2, "your mean")]),
    "13.6": Check(
        "Write tilted(base_Y, right_Y, beta): the policy with the largest E[reward] - beta KL(policy, base).",
        7, "hard", "Differentiate sum q R - beta sum q log(q/p) with the condition that q sums to 1.", _tilted,
        right=[lambda p, r, b: p * (r / b).exp() / (p * (r / b).exp()).sum(),
               lambda p, r, b: torch.softmax(p.log() + r / b, -1),
               lambda p, r, b: np.exp(np.log(p) + (r - 1) / b) / (p * np.exp((r - 1) / b)).sum()],
        wrong=[(lambda p, r, b: p * (r / b).exp(), "sum to"), (lambda p, r, b: (r / b).softmax(0), "dropped out"),
               (lambda p, r, b: p * (r * b).exp() / (p * (r * b).exp()).sum(), "Upside down"),
               (lambda p, r, b: p * r / (p @ r), "limit"), (lambda p, r, b: p, "Set R"),
               (lambda p, r, b: p * (1 + r / b) / (p * (1 + r / b)).sum(), "Set R")]),
}
