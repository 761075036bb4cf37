"""Distillation objectives: how far a student's next-token distribution q is from a teacher's p, row by row.

    reverse   KL(q, p) = sum_v q_v (log q_v - log p_v)         forward   KL(p, q)
    jsd       KL(q, m)/2 + KL(p, m)/2,  m = (q + p)/2          between 0 and log 2

and over which tokens the sum goes:

    full      all V
    topk      the teacher's k likeliest. Renormalised, both sides sum to one on them (local support matching, arXiv
              2603.25562): nothing then pulls mass into the set. Not renormalised, the sum as it stands: it can be
              negative, and descending the reverse one moves mass out of the set (labkit.kernels.topk_kl says why).
    sampled   one token y that the student drew: the value log q_y - log p_y, unbiased for KL(q, p)

The sampled loss is a policy gradient, with d = log q_y - log p_y as the cost of the sampled token:

    grad KL(q, p) = sum_v (grad q_v)(log q_v - log p_v) + sum_v grad q_v = E_{y~q}[d grad log q_y],   as sum grad q = 0

so the loss has the value d and the gradient d grad log q_y, with d held constant. Differentiating d itself gives
E[grad log q_y] = 0: a gradient that does not see the teacher at all.
"""

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import check_devices, check_float, check_shape
from labkit.kernels.token_logprob import token_logprob
from labkit.kernels.topk_kl import topk_kl

SUPPORTS = ("full", "topk", "sampled")
DIRECTIONS = ("reverse", "forward", "jsd")


def distill_loss(student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, support: str = "full", k: int | None = None,
                 token_N: Tensor | None = None, direction: str = "reverse", renormalize: bool = True,
                 mask_N: Tensor | None = None) -> Tensor:
    """Divergence of each row in nats, [N]; the mean over them, or any other weighting, is the caller's.

    Args:
        student_logits_NV, teacher_logits_NV: one row a position. Only the student gets a gradient. A teacher logit of
            -inf forbids a token: the reverse divergence is +inf where the student still allows it.
        support: "full", "topk" or "sampled".
        k: for "topk": how many tokens, 1 to V.
        token_N: for "sampled": the tokens that the student drew at these positions, at temperature 1.
        direction: "reverse", "forward" or "jsd"; with "sampled" only "reverse".
        renormalize: for "topk": whether both sides are made to sum to one on the set.
        mask_N: rows where it is false have loss 0 and no gradient, whatever their logits and tokens are.
    Returns:
        loss_N in fp32, computed in fp32 also for half-precision logits; float64 for float64 student logits.
    Raises:
        LabError: settings, shapes or ids that do not fit. "sampled" has no forward or jsd: a token of the student says
            nothing unbiased about KL(p, q) without weights p/q, which no published objective that we know of uses.
    """
    _check(student_logits_NV, teacher_logits_NV, support, k, token_N, direction, mask_N)
    student_NV, teacher_NV = student_logits_NV, teacher_logits_NV.detach().to(_result_dtype(student_logits_NV))
    if mask_N is not None:
        off_N = mask_N == 0
        student_NV = student_NV.masked_fill(off_N[:, None], 0.0)  # here too: 0 times the gradient of a NaN is NaN
        token_N = None if token_N is None else token_N.masked_fill(off_N, 0)
    if support == "full":
        loss_N = divergence(_log_softmax(student_NV), teacher_NV.log_softmax(1), direction)
    elif support == "topk":
        loss_N = _on_top_k(student_NV, teacher_NV, k, direction, renormalize)
    else:
        loss_N = _on_sample(student_NV, teacher_NV, token_N)
    return loss_N if mask_N is None else loss_N.masked_fill(off_N, 0.0)


def divergence(log_q_NK: Tensor, log_p_NK: Tensor, direction: str) -> Tensor:
    """The divergence of each row from its log-probabilities, summed over the tokens given. 0 log 0 is 0."""
    if direction == "reverse":
        return _kl(log_q_NK, log_p_NK)
    if direction == "forward":
        return _kl(log_p_NK, log_q_NK)
    tiny = torch.finfo(log_q_NK.dtype).tiny  # not logaddexp, whose gradient is NaN where both sides are -inf
    log_m_NK = ((log_q_NK.exp() + log_p_NK.exp()) / 2).clamp(min=tiny).log()
    return (_kl(log_q_NK, log_m_NK) + _kl(log_p_NK, log_m_NK)) / 2


def _kl(log_a_NK: Tensor, log_b_NK: Tensor) -> Tensor:
    a_NK = log_a_NK.exp()
    return (a_NK * torch.where(a_NK > 0, log_a_NK - log_b_NK, 0.0)).sum(1)


def _on_top_k(student_NV: Tensor, teacher_NV: Tensor, k: int, direction: str, renormalize: bool) -> Tensor:
    top_NK, id_NK = teacher_NV.topk(k, dim=1)
    log_p_NK = top_NK - teacher_NV.logsumexp(1, keepdim=True)
    if direction != "jsd":
        mode = "renorm" if renormalize else "none"
        return topk_kl(student_NV, id_NK, log_p_NK, mode=mode, direction=direction, mass=False)[0]
    forbidden_NK = log_p_NK == -torch.inf  # not in the set, as in topk_kl
    log_q_NK = _log_softmax(student_NV).gather(1, id_NK).masked_fill(forbidden_NK, -torch.inf)
    if renormalize:
        log_q_NK, log_p_NK = log_q_NK.log_softmax(1), log_p_NK.log_softmax(1)
    return divergence(log_q_NK, log_p_NK, direction)


def _on_sample(student_NV: Tensor, teacher_NV: Tensor, token_N: Tensor) -> Tensor:
    log_q_N, log_p_N = (token_logprob(logits_NV, token_N)[0] for logits_NV in (student_NV, teacher_NV))
    d_N = (log_q_N - log_p_N).detach()
    return d_N + d_N * (log_q_N - log_q_N.detach())  # the bracket is 0, its gradient is not


def _log_softmax(logits_NV: Tensor) -> Tensor:
    return logits_NV.log_softmax(1, dtype=_result_dtype(logits_NV))


def _result_dtype(logits_NV: Tensor) -> torch.dtype:
    return torch.float64 if logits_NV.dtype == torch.float64 else torch.float32


def _check(student_NV: Tensor, teacher_NV: Tensor, support: str, k: int | None, token_N: Tensor | None,
           direction: str, mask_N: Tensor | None) -> None:
    for name, value, choices in (("support", support, SUPPORTS), ("direction", direction, DIRECTIONS)):
        if value not in choices:
            raise LabError(f"There is no {name} {value!r}.", f"Choose one of {', '.join(choices)}.")
    check_shape("student_logits_NV", student_NV, (None, None), "[N, V]")
    check_shape("teacher_logits_NV", teacher_NV, tuple(student_NV.shape), "the shape of the student's logits")
    check_float("student_logits_NV", student_NV)
    check_float("teacher_logits_NV", teacher_NV)
    check_devices(student_logits_NV=student_NV, teacher_logits_NV=teacher_NV, token_N=token_N, mask_N=mask_N)
    N, V = student_NV.shape
    if mask_N is not None:
        check_shape("mask_N", mask_N, (N,), "[N]")
    if support == "topk" and (k is None or not 1 <= k <= V):
        raise LabError(f'support="topk" cannot use k={k} with a vocabulary of {V}.', f"Give k a value from 1 to {V}.")
    if support == "sampled" and direction != "reverse":
        raise LabError(f'support="sampled" has no direction "{direction}": the student\'s own token says nothing '
                       "unbiased about it.", 'Use direction="reverse", or support="full" or "topk".')
    if support == "sampled" and token_N is None:
        raise LabError('support="sampled" needs the sampled tokens.', "Pass them as token_N, one a row.")
    if support == "sampled":
        check_shape("token_N", token_N, (N,), "[N]")
