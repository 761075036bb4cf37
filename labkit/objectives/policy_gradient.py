"""Policy-gradient objectives: six published ways from token ratios and advantages to one loss.

    l_t  = logp_t - old_logp_t,   r_t = exp(l_t)           the n_b tokens of sequence b that count
    M_b  = ((1/n_b) sum_t r_t^p)^(1/p)                     power mean of the ratios; geometric at p = 0
    loss = -(1/B) sum_b w_b min(M_b A_b, clip(M_b) A_b)    clip: into [1 - clip_low, 1 + clip_high]

    method    p   what is cut   w_b               weight of a token ratio    source
    grpo      1   each r_t      1                 1 / (B n_b)                DeepSeekMath, arXiv 2402.03300
    dr_grpo   1   each r_t      n_b / T           1 / (B T)                  arXiv 2503.20783
    dapo      1   each r_t      B n_b / sum n     1 / sum n                  arXiv 2503.14476
    gmpo      0   each r_t      1                                            arXiv 2507.20673
    gspo      0   M_b           1                                            arXiv 2507.18071
    holder    p   level         1                                            arXiv 2605.12058

A cut is one-sided: a ratio above the upper bound is cut where A > 0, one below the lower bound where A < 0. What is cut
has no gradient. T is the padded width. So the six differ in three things only, and one op computes them all, in log
space: labkit.kernels.holder_objective (the kernel on a GPU). The gradient with respect to logp_t is -(1/B) w_b A_b M_b
W_t with W = softmax(p l), 0 for what is cut. At logp = old_logp all ratios are 1, and every p gives the same gradient.

Not in here: verl's second cut of A < 0 ("dual clip") and its clamps of the log-ratio.
"""

import math

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import check_shape
from labkit.kernels.holder_objective import holder_objective

AGGREGATES = {  # exponent, and what is cut
    "grpo": (1.0, "token"),
    "dr_grpo": (1.0, "token"),
    "dapo": (1.0, "token"),
    "gmpo": (0.0, "token"),
    "gspo": (0.0, "sequence"),
}
METHODS = (*AGGREGATES, "holder")
PUBLISHED_CLIPS = {  # the bounds of each method's authors, as arguments: policy_loss(..., **PUBLISHED_CLIPS["gspo"])
    "grpo": {"clip_low": 0.2, "clip_high": 0.2},
    "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28},
    "gmpo": {"clip_low": 1 - math.exp(-0.4), "clip_high": math.exp(0.4) - 1},  # 0.4 either way in the log-ratio
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
    "holder": {"clip_low": 0.2, "clip_high": 0.2},
}
STD_FLOOR = 1e-6
LARGEST_LOG_RATIO = {torch.float32: 70.0, torch.float64: 650.0}  # the reference divides exp(l) by p, down to eps
LARGEST_EXPONENT = 20.0  # exp(20) is 5e8


def policy_loss(logp_BT: Tensor, old_logp_BT: Tensor, advantage_B: Tensor, mask_BT: Tensor, *, method: str = "grpo",
                clip_low: float = 0.2, clip_high: float = 0.2, p: float = 1.0,
                level: str = "sequence") -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to descend, and what to watch. The methods are in the table above.

    Args:
        logp_BT: log-probabilities of the sampled tokens in nats; the only input that gets a gradient.
        old_logp_BT: the same under the policy that sampled them.
        advantage_B: one a sequence. Dr. GRPO wants it without division by the standard deviation; DAPO wants groups of
            equal rewards dropped beforehand, since their tokens count in its mean. Both are the caller's to do (TRL's
            loss_type "dapo" doesn't drop them either).
        mask_BT: true where a token counts: the answer with its stop token, not the prompt, not the padding. What
            stands where it is false may be NaN.
        clip_low, clip_high: ratios count from 1 - clip_low to 1 + clip_high, for every method; the authors' own
            bounds are in PUBLISHED_CLIPS.
        p, level: of "holder" only: the exponent, and whether its mean ("sequence") or each ratio ("token") is cut.
    Returns:
        (loss, stats). The loss is a mean over all B sequences, where one without a counted token adds 0; in fp32
        (float64 for float64 logp_BT). It and its gradient stay finite: a ratio above exp(70) counts as exp(70), in its
        gradient too (in fp32 exp(88) overflows; float64 goes on until exp(650)). stats holds detached scalars:
        clip_fraction: of the tokens (sequences, where M is cut), those whose gradient the clip cuts off.
        ratio_max, ratio_min, log_ratio_mean: over the counted tokens, before any cut; 1, 1 and 0 if there are none.
        weight_entropy, effective_tokens: H(W) in nats and 1 / sum W^2 with W = softmax(p l) before any cut, the
            tokens' weights in the gradient of M. Means over the sequences with a counted token.
        entropy: -mean logp over the counted tokens. Its expectation is the policy's entropy only while the tokens
            are drawn from this policy at temperature 1; on older samples it is a cross-entropy.
    Raises:
        LabError: an unknown method, p or level beside another method than "holder", shapes or bounds that do not fit.
    """
    p, level = _aggregate(method, p, level)
    check_shape("logp_BT", logp_BT, (None, None), "[B, T]")
    check_shape("old_logp", old_logp_BT, tuple(logp_BT.shape), "the shape of logp_BT")
    check_shape("mask_BT", mask_BT, tuple(logp_BT.shape), "the shape of logp_BT")
    check_shape("advantage_B", advantage_B, (logp_BT.shape[0],), "[B]")
    dtype, counts_BT = _result_dtype(logp_BT), mask_BT != 0
    weighted_B = advantage_B.to(dtype) * _length_weight(method, counts_BT, dtype)
    l_BT = _difference(logp_BT, old_logp_BT, counts_BT)
    beyond_BT = (l_BT.detach() - LARGEST_LOG_RATIO[dtype]).clamp(min=0)
    loss, kept = holder_objective(logp_BT - beyond_BT, old_logp_BT.to(dtype), weighted_B, None, p, clip_low, clip_high,
                                  level, mask=counts_BT)
    return loss, {"clip_fraction": kept["clip_fraction"]} | _token_stats(logp_BT, l_BT.detach(), counts_BT, p)


def group_advantage(reward_NG: Tensor, *, scale_by_std: bool = True) -> Tensor:
    """(R - mean) / (std + 1e-6) within each group of G answers to one prompt: GRPO. Without the division: Dr. GRPO.

    std is the unbiased one (sum of squares over G - 1), as in TRL (which adds 1e-4), verl (1e-6, taken here) and oat,
    on which GMPO and HölderPO build (1e-8). Equal rewards give exactly 0, and so does a group of one (verl gives it
    its raw reward). Returns fp32, or float64 for float64 rewards.
    """
    check_shape("reward_NG", reward_NG, (None, None), "[N, G]")
    reward_NG = reward_NG.to(_result_dtype(reward_NG))
    above_first_NG = reward_NG - reward_NG[:, :1]  # a mean of equal rewards may round, a mean of zeros does not
    centred_NG = above_first_NG - above_first_NG.mean(1, keepdim=True)
    if not scale_by_std:
        return centred_NG
    std_N1 = (centred_NG.square().sum(1, keepdim=True) / max(reward_NG.shape[1] - 1, 1)).sqrt()
    return centred_NG / (std_N1 + STD_FLOOR)


def reference_kl(logp_BT: Tensor, reference_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The "k3" estimate of KL(policy, reference): exp(r) - r - 1 with r = reference_logp - logp, in nats a token.

    A mean over the counted tokens of a sequence, then over all B sequences (one without tokens adds 0), as GRPO's paper
    has it (arXiv 2402.03300, equations 3 and 4). Only logp_BT gets a gradient, (1 - exp(r)) a token.

    On tokens drawn from the policy the *value* is an unbiased estimate of KL(policy, reference), and never negative.
    The expectation of its *gradient* is another one: that of KL(reference, policy).
    From r = 20 on exp goes on as its tangent, so that value and gradient stay finite and still pull a token back that
    the policy has all but forgotten. (verl caps the term at 10; from there on it has no gradient.)
    """
    check_shape("logp_BT", logp_BT, (None, None), "[B, T]")
    for name, tensor in (("reference_logp_BT", reference_logp_BT), ("mask_BT", mask_BT)):
        check_shape(name, tensor, tuple(logp_BT.shape), "the shape of logp_BT")
    counts_BT = mask_BT != 0
    r_BT = _difference(reference_logp_BT.detach(), logp_BT, counts_BT)
    beyond_BT = (r_BT - LARGEST_EXPONENT).clamp(min=0)
    k3_BT = r_BT.clamp(max=LARGEST_EXPONENT).expm1() + math.exp(LARGEST_EXPONENT) * beyond_BT - r_BT
    return (k3_BT.sum(1) / counts_BT.sum(1).clamp(min=1)).sum() / max(len(logp_BT), 1)


def _aggregate(method: str, p: float, level: str) -> tuple[float, str]:
    """Exponent and level of a method. A p that would not be used is refused: a sweep over it would show nothing."""
    if method not in METHODS:
        raise LabError(f"There is no method {method!r}.", f"Choose one of {', '.join(METHODS)}.")
    if method == "holder":
        return p, level
    own_p, own_level = AGGREGATES[method]
    if p not in (1.0, own_p) or level not in ("sequence", own_level):
        raise LabError(f'p={p} and level="{level}" are settings of "holder"; {method} has p = {own_p:g} at the level '
                       f'"{own_level}".', 'Leave both out, or use method="holder".')
    return own_p, own_level


def _length_weight(method: str, counts_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """w_b of the table: how a sequence's number of tokens enters."""
    n_B, (B, T) = counts_BT.sum(1).to(dtype), counts_BT.shape
    if method == "dr_grpo":
        return n_B / max(T, 1)
    if method == "dapo":
        return n_B * B / n_B.sum().clamp(min=1)
    return torch.ones_like(n_B)


@torch.no_grad()
def _token_stats(logp_BT: Tensor, l_BT: Tensor, counts_BT: Tensor, p: float) -> dict[str, Tensor]:
    n_B = counts_BT.sum(1)
    tokens, filled = n_B.sum().clamp(min=1), (n_B > 0).sum().clamp(min=1)
    mean = l_BT.sum() / tokens
    # the mean is no extreme, so it may stand in for tokens that do not count; once more for a batch without any
    extremes = torch.cat((torch.where(counts_BT, l_BT, mean).flatten(), mean[None])).aminmax()
    floor = torch.finfo(l_BT.dtype).min  # not -inf, whose softmax is NaN in a sequence without tokens
    W_BT = (p * l_BT).masked_fill(~counts_BT, floor).softmax(1) * counts_BT
    concentration_B = torch.where(n_B > 0, W_BT.square().sum(1), math.inf)
    return {
        "ratio_max": extremes.max.exp(),
        "ratio_min": extremes.min.exp(),
        "log_ratio_mean": mean,
        "weight_entropy": torch.special.entr(W_BT).sum() / filled,
        "effective_tokens": (1 / concentration_B).sum() / filled,
        "entropy": -torch.where(counts_BT, logp_BT.to(l_BT.dtype), 0.0).sum() / tokens,
    }


def _difference(a_BT: Tensor, b_BT: Tensor, counts_BT: Tensor) -> Tensor:
    """a - b where a token counts, else 0 without gradient: times the mask would keep a NaN."""
    dtype = torch.promote_types(_result_dtype(a_BT), _result_dtype(b_BT))
    return torch.where(counts_BT, a_BT.to(dtype) - b_BT.to(dtype), 0.0)


def _result_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
