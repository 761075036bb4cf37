"""How far a policy has moved from its base, in several senses, and which of them predicts what it forgot.

    forward KL   E_{y ~ base}   log base(y) / policy(y)      = E sum_t KL(base(.|s_t) || policy(.|s_t)),  s_t along y
    reverse KL   E_{y ~ policy} log policy(y) / base(y)      the same with the two exchanged, and y from the policy
    total variation, weights (L1, L2), weights under the base's Fisher information, activations

The sum over tokens of *exact* KLs at states the first model visits is unbiased for the KL of whole answers (chain
rule) and varies far less than a sum of log-ratios. Prompts are those of the new task, never of the old one.
Then: a parabola through (distance, forgetting), its R^2, and how sure the order of several predictors' R^2 is.
Source: RL's Razor, Shenfeld et al., arXiv 2509.04259, sections 3 and 4 and table 1.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import check_shape
from labkit.models import GPT, answer_logits, generate
from labkit.tasks import answer_mask
from labkit.tasks.alphabet import END

ROWS = 1024  # sequences scored at once


def draw_answers(model: GPT, prompt_NT: Tensor, answer_length: int, generator: torch.Generator | None = None) -> Tensor:
    """One answer a prompt from the model's own distribution (temperature 1), filled with END: [N, answer_length]."""
    drawn = generate(model, prompt_NT, max_new_tokens=answer_length, stop_tokens=(END,), generator=generator)
    return drawn.tokens_BT


def token_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, exact, in nats, float64. A token that p forbids adds 0; one that only q
    forbids makes it infinite."""
    log_p, log_q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1).clamp(min=0)


def token_total_variation(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Half the sum of |p - q| over the last dimension, from 0 to 1, float64."""
    return (p_logits.double().softmax(-1) - q_logits.double().softmax(-1)).abs().sum(-1) / 2


def sequence_kl(p_model: GPT, q_model: GPT, prompt_NT: Tensor, answer_NA: Tensor,
                mask_NA: Tensor | None = None) -> Tensor:
    """sum_t KL(p(.|s_t) || q(.|s_t)) along each answer, [N], float64, in nats.

    Over answers drawn from p its mean is unbiased for the KL of whole answers.
    mask_NA: tokens that count; by default those up to END, that included. An answer with none has 0.
    """
    return _along(token_kl, p_model, q_model, prompt_NT, answer_NA, mask_NA)


def total_variation(p_model: GPT, q_model: GPT, prompt_NT: Tensor, answer_NA: Tensor,
                    mask_NA: Tensor | None = None) -> Tensor:
    """Sum over the tokens of each answer of the total variation of the two next-token distributions, [N], float64.

    A sum like the KL's, so both weigh long answers alike. Over answers drawn from p its mean is an upper bound of the
    total variation of whole answers, and not that itself: total variation has no chain rule.
    """
    return _along(token_total_variation, p_model, q_model, prompt_NT, answer_NA, mask_NA)


def forward_kl(base: GPT, policy: GPT, prompt_NT: Tensor, base_answer_NA: Tensor,
               mask_NA: Tensor | None = None) -> float:
    """KL(base || policy) in nats an answer; the answers must be drawn from the base (`draw_answers`)."""
    return float(sequence_kl(base, policy, prompt_NT, base_answer_NA, mask_NA).mean())


def reverse_kl(base: GPT, policy: GPT, prompt_NT: Tensor, policy_answer_NA: Tensor,
               mask_NA: Tensor | None = None) -> float:
    """KL(policy || base) in nats an answer; the answers must be drawn from the policy."""
    return float(sequence_kl(policy, base, prompt_NT, policy_answer_NA, mask_NA).mean())


@torch.no_grad()
def _along(distance, p_model: GPT, q_model: GPT, prompt_NT: Tensor, answer_NA: Tensor,
           mask_NA: Tensor | None) -> Tensor:
    check_shape("answer_NA", answer_NA, (None, None), "[N, A]")
    check_shape("prompt_NT", prompt_NT, (len(answer_NA), None), "[N, T]")
    mask_NA = answer_mask(answer_NA) if mask_NA is None else mask_NA != 0
    check_shape("mask_NA", mask_NA, tuple(answer_NA.shape), "the shape of answer_NA")
    if not answer_NA.numel():
        raise LabError("There are no answers to compare two models on.", "Give at least one prompt and one token.")
    each = []
    for part in zip(prompt_NT.split(ROWS), answer_NA.split(ROWS), mask_NA.split(ROWS), strict=True):
        distance_NA = distance(answer_logits(p_model, *part[:2]), answer_logits(q_model, *part[:2]))
        each.append(torch.where(part[2], distance_NA, 0.0).sum(1))
    return torch.cat(each)


@torch.no_grad()
def activation_distance(base: GPT, policy: GPT, prompt_NT: Tensor) -> float:
    """Mean L1 distance of the two models' last hidden states, over prompts and positions."""
    hidden = [model.trunk(model.embed(prompt_NT)).double() for model in (base, policy)]
    return float((hidden[0] - hidden[1]).abs().sum(-1).mean())


def weight_distance(state_a: Mapping[str, Tensor], state_b: Mapping[str, Tensor], *, order: int = 2) -> float:
    """L1 or L2 norm of all weights' difference as one vector, from two state dicts of one model."""
    if order not in (1, 2):
        raise LabError(f"There is no weight distance of order {order} here.", "Use 1 or 2.")
    total = sum((change.abs() if order == 1 else change.square()).sum() for change in _changes(state_a, state_b))
    return float(total if order == 1 else total.sqrt())


def fisher_distance(fisher: Mapping[str, Tensor], base: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> float:
    """sqrt(sum_i F_i (w_i - w0_i)^2) with the base's diagonal (labkit.measure.gradient_variance.fisher_diagonal).

    Half its square is the forward KL to second order, as far as a diagonal can say it.
    """
    changes = _changes({name: base[name] for name in fisher}, {name: state[name] for name in fisher})
    total = sum((F.to(change) * change.square()).sum() for F, change in zip(fisher.values(), changes, strict=True))
    return float(total.sqrt())


def _changes(state_a: Mapping[str, Tensor], state_b: Mapping[str, Tensor]) -> list[Tensor]:
    if state_a.keys() != state_b.keys() or not state_a:
        raise LabError("The two states do not have the same tensors.", "Take both from one model.")
    for name, weight in state_a.items():
        check_shape(name, state_b[name], tuple(weight.shape), "its shape in the other state")
    return [state_b[name].detach().double() - weight.detach().double() for name, weight in state_a.items()]


class QuadraticFit(NamedTuple):
    """y ~ c0 + c1 x + c2 x^2, and the share of y's variance it explains."""

    coefficients: tuple[float, float, float]
    r2: float


def quadratic_fit(x_N: Sequence[float], y_N: Sequence[float]) -> QuadraticFit:
    """The parabola of least squares. R^2 is 0 where y does not vary. Raises LabError for fewer than four points, fewer
    than three different x, or values that are not finite."""
    x_N, y_N = _points(x_N, y_N)
    if len(x_N) < 4 or len(np.unique(x_N)) < 3:
        raise LabError(f"{len(x_N)} points at {len(np.unique(x_N))} places always lie on some parabola.",
                       "Give four or more, at three or more different x.")
    scale = np.abs(x_N).max()  # weight distances in the hundreds would make the columns differ by decades
    scaled, r2_1 = _parabolas(x_N / scale, y_N, np.ones((1, len(x_N))))
    return QuadraticFit(tuple((scaled[0] / scale ** np.arange(3)).tolist()), float(r2_1[0]))


def bootstrap_r2(predictors: Mapping[str, Sequence[float]], y_N: Sequence[float], *, resamples: int = 1000,
                 seed: int = 0, run_N: Sequence | None = None) -> dict[str, np.ndarray]:
    """R^2 of a parabola in each predictor over the *same* resamples, {name: [R]}.

    So the share of resamples in which one predictor beats another is `(r2["forward"] > r2["reverse"]).mean()`.
    run_N: which run each point belongs to; whole runs are drawn then, since the checkpoints of one run are no
        independent evidence. Without it points are drawn.
    Raises LabError as quadratic_fit does, and without predictors.
    """
    if not predictors or resamples < 1:
        raise LabError(f"There is nothing to compare: {len(predictors)} predictors, {resamples} resamples.",
                       "Give at least one of each.")
    for x_N in predictors.values():
        quadratic_fit(x_N, y_N)
    y_N = np.asarray(y_N, dtype=np.float64)
    run_N = np.arange(len(y_N)) if run_N is None else np.unique(np.asarray(run_N), return_inverse=True)[1]
    if len(run_N) != len(y_N):
        raise LabError(f"{len(run_N)} names of runs do not fit {len(y_N)} points.", "Give one a point.")
    runs = int(run_N.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(runs, np.full(runs, 1 / runs), size=resamples)
    count_RN = drawn[:, run_N].astype(np.float64)
    scaled = {name: np.asarray(x_N, dtype=np.float64) for name, x_N in predictors.items()}
    return {name: _parabolas(x_N / np.abs(x_N).max(), y_N, count_RN)[1] for name, x_N in scaled.items()}


def spearman(x_N: Sequence[float], y_N: Sequence[float]) -> float:
    """Spearman's rank correlation; ties share their mean rank. Raises LabError where all values are equal."""
    x_N, y_N = _points(x_N, y_N)
    if len(np.unique(x_N)) < 2 or len(np.unique(y_N)) < 2:
        raise LabError("Values that are all equal have no order.", "Give two or more different ones.")
    return float(np.corrcoef(_ranks(x_N), _ranks(y_N))[0, 1])


def _ranks(x_N: np.ndarray) -> np.ndarray:
    _, place_N, count_U = np.unique(x_N, return_inverse=True, return_counts=True)
    return (count_U.cumsum() - (count_U - 1) / 2)[place_N]


def _parabolas(x_N: np.ndarray, y_N: np.ndarray, count_RN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients [R, 3] and R^2 [R] of R fits, in which point n counts count_RN times."""
    root_RN = np.sqrt(count_RN)
    design_RN3 = root_RN[:, :, None] * x_N[:, None] ** np.arange(3)
    coefficient_R3 = (np.linalg.pinv(design_RN3) @ (root_RN * y_N)[:, :, None])[:, :, 0]
    rest_R = (count_RN * (y_N - coefficient_R3 @ (x_N ** np.arange(3)[:, None])) ** 2).sum(1)
    centred_RN = y_N - (count_RN @ y_N / count_RN.sum(1))[:, None]
    spread_R = (count_RN * centred_RN**2).sum(1)
    varies_R = spread_R > 1e-24 * max(1e-300, float(np.square(y_N).max()))
    return coefficient_R3, np.where(varies_R, 1 - rest_R / np.where(varies_R, spread_R, 1.0), 0.0)


def _points(x_N: Sequence[float], y_N: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x_N, y_N = np.asarray(x_N, dtype=np.float64), np.asarray(y_N, dtype=np.float64)
    if x_N.shape != y_N.shape or x_N.ndim != 1 or not (np.isfinite(x_N).all() and np.isfinite(y_N).all()):
        raise LabError(f"Values of shapes {list(x_N.shape)} and {list(y_N.shape)} are not finite pairs.",
                       "Give one finite x and one finite y a point.")
    return x_N, y_N
