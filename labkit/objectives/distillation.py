"""Distillation objectives: how far a student's next-token distribution q is from a teacher's p, row by row.

    reverse   KL(q, p) = sum_v q_v (log q_v - log p_v)         forward   KL(p, q)
    jsd       beta KL(p, m) + (1 - beta) KL(q, m),  m = (1 - beta) q + beta p
              its ends are, by convention, the two KLs: beta 1 the reverse one, beta 0 the forward one (TRL's GKD)

and over which tokens the sum goes:

    full      all V
    topk      a menu of a few (labkit.objectives.menus). In one of four modes:
              renorm         both sides are made to sum to one on the menu; nothing then pulls mass into it
              tail           both sides get one more bin with the rest of their mass; a lower bound of the full KL
              none           the sum as it stands: it can be negative, and descending the reverse one moves mass out of
                             the menu (the "+1": labkit.kernels.topk_kl says why)
              stop_gradient  sum_S w_v log(q_v/p_v) with w = q renormalised on the menu, and the gradient
                             sum_S w_v log(q_v/p_v) grad log q_v: no "+1", and no centring either
    sampled   one token y that the student drew: the value log q_y - log p_y, unbiased for KL(q, p)

The sampled loss is a policy gradient, with d = log q_y - log p_y as the cost of the sampled token:

    grad KL(q, p) = sum_v (grad q_v)(log q_v - log p_v) + sum_v grad q_v = E_{y~q}[d grad log q_y],   as sum grad q = 0

so the loss has the value d and the gradient d grad log q_y, with d held constant. Differentiating d itself gives
E[grad log q_y] = 0: a gradient that does not see the teacher at all. E[d] = KL(q, p), so d - KL(q, p) is as unbiased a
cost, of smaller variance: the exact baseline (vOPD, arXiv 2605.07865).
"""

import math

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import check_devices, check_float, check_shape
from labkit.kernels.token_logprob import token_logprob
from labkit.kernels.topk_kl import topk_kl
from labkit.objectives.menus import MENUS, TeacherList, menu_of

SUPPORTS = ("full", "topk", "sampled")
DIRECTIONS = ("reverse", "forward", "jsd")
MODES = ("renorm", "tail", "none", "stop_gradient")


def distill_loss(student_logits_NV: Tensor, teacher_logits_NV: Tensor | TeacherList, *, support: str = "full",
                 k: int | None = None, menu: str = "teacher", mode: str | None = None, token_N: Tensor | None = None,
                 baseline: bool = False, direction: str = "reverse", beta: float = 0.5, renormalize: bool = True,
                 mask_N: Tensor | None = None) -> Tensor:
    """Divergence of each row in nats, [N]; the mean over them, or any other weighting, is the caller's.

    Args:
        student_logits_NV, teacher_logits_NV: one row a position. Only the student gets a gradient. A teacher logit of
            -inf forbids a token: the reverse divergence is +inf where the student still allows it. With "topk" the
            teacher may be a TeacherList, which is the menu then; a token that it does not list is not in the menu, and
            a row without any has loss 0.
        support: "full", "topk" or "sampled".
        k: for "topk" with teacher logits: how many tokens of each side, 1 to V.
        menu: whose: "teacher", "student", "union" or "intersection" (which may be empty: loss 0).
        mode: for "topk": "renorm", "tail", "none" or "stop_gradient" (only with "reverse"), as above. Left out, it is
            "renorm", or "none" with renormalize=False.
        token_N: for "sampled": the tokens that the student drew at these positions, at temperature 1.
        baseline: for "sampled": take KL(q, p) off the cost in the gradient; the value stays.
        direction: "reverse", "forward" or "jsd"; with "sampled" only "reverse".
        beta: for "jsd": from 0 to 1, as above.
        mask_N: rows where it is false have loss 0 and no gradient, whatever their logits and tokens are.
    Returns:
        loss_N in fp32, computed in fp32 also for half-precision logits; float64 for float64 student logits.
    Raises:
        LabError: settings, shapes or ids that do not fit. "sampled" has no forward or jsd: a token of the student says
            nothing unbiased about KL(p, q) without weights p/q, which no published objective that we know of uses.
    """
    mode = mode or ("renorm" if renormalize else "none")
    _check_choices(support, menu, mode, direction, beta, baseline)
    _check_tensors(student_logits_NV, teacher_logits_NV, support, k, menu, token_N, mask_N)
    student_NV, teacher = student_logits_NV, _detached(teacher_logits_NV, _result_dtype(student_logits_NV))
    if mask_N is not None:
        off_N = mask_N == 0
        student_NV = student_NV.masked_fill(off_N[:, None], 0.0)  # here too: 0 times the gradient of a NaN is NaN
        token_N = None if token_N is None else token_N.masked_fill(off_N, 0)
    if support == "full":
        loss_N = divergence(_log_softmax(student_NV), teacher.log_softmax(1), direction, beta)
    elif support == "topk":
        listed = teacher if isinstance(teacher, TeacherList) else menu_of(student_NV, teacher, k, menu)
        loss_N = _on_menu(student_NV, listed, mode, direction, beta)
    else:
        loss_N = _on_sample(student_NV, teacher, token_N, baseline)
    return loss_N if mask_N is None else loss_N.masked_fill(off_N, 0.0)


def divergence(log_q_NK: Tensor, log_p_NK: Tensor, direction: str, beta: float = 0.5) -> Tensor:
    """The divergence of each row from its log-probabilities, summed over the tokens given. 0 log 0 is 0."""
    if direction == "reverse" or (direction == "jsd" and beta == 1):
        return _kl(log_q_NK, log_p_NK)
    if direction == "forward" or beta == 0:
        return _kl(log_p_NK, log_q_NK)
    tiny = torch.finfo(log_q_NK.dtype).tiny  # not logaddexp, whose gradient is NaN where both sides are -inf
    log_m_NK = ((1 - beta) * log_q_NK.exp() + beta * log_p_NK.exp()).clamp(min=tiny).log()
    return (1 - beta) * _kl(log_q_NK, log_m_NK) + beta * _kl(log_p_NK, log_m_NK)


def _kl(log_a_NK: Tensor, log_b_NK: Tensor) -> Tensor:
    a_NK = log_a_NK.exp()
    return (a_NK * torch.where(a_NK > 0, log_a_NK - log_b_NK, 0.0)).sum(1)


def _on_menu(student_NV: Tensor, listed: TeacherList, mode: str, direction: str, beta: float) -> Tensor:
    if mode != "stop_gradient" and direction != "jsd":
        return topk_kl(student_NV, *listed, mode=mode, direction=direction, mass=False)[0]
    absent_NK = (listed.id_NK < 0) | (listed.logp_NK == -math.inf)  # not in the set, as in topk_kl
    log_p_NK = listed.logp_NK.masked_fill(absent_NK, -math.inf)
    log_q_NK = _log_softmax(student_NV).gather(1, listed.id_NK.clamp(min=0)).masked_fill(absent_NK, -math.inf)
    if mode == "stop_gradient":
        return _stop_gradient(log_q_NK, log_p_NK, absent_NK)
    if mode == "renorm":
        log_q_NK, log_p_NK = (_shares(log_NK, absent_NK) for log_NK in (log_q_NK, log_p_NK))
    if mode == "tail":
        log_q_NK, log_p_NK = (torch.cat((log_NK, _rest(log_NK)), 1) for log_NK in (log_q_NK, log_p_NK))
    return divergence(log_q_NK, log_p_NK, direction, beta)


def _stop_gradient(log_q_NK: Tensor, log_p_NK: Tensor, absent_NK: Tensor) -> Tensor:
    # a token that the student forbids has weight 0; its logarithm must not come near a product
    never_NK = absent_NK | (log_q_NK == -math.inf)
    log_q_NK, log_p_NK = log_q_NK.masked_fill(never_NK, 0.0), log_p_NK.masked_fill(never_NK, 0.0)
    weight_NK = _shares(log_q_NK.detach(), never_NK).exp()
    cost_NK = weight_NK * (log_q_NK - log_p_NK).detach()
    return (cost_NK + cost_NK * (log_q_NK - log_q_NK.detach())).sum(1)  # the bracket is 0, its gradient is not


def _shares(log_NK: Tensor, absent_NK: Tensor) -> Tensor:
    """Renormalised on the menu: -inf for what is absent, also where all are."""
    filled_NK = log_NK.masked_fill(absent_NK, torch.finfo(log_NK.dtype).min)
    return filled_NK.log_softmax(1).masked_fill(absent_NK, -math.inf)


def _rest(log_NK: Tensor) -> Tensor:
    """log(1 - sum), [N, 1]; at least that of 2^-20, which fp32 still resolves, as in topk_kl."""
    return (1 - log_NK.exp().sum(1, keepdim=True)).clamp(min=2.0**-20).log()


def _on_sample(student_NV: Tensor, teacher_NV: Tensor, token_N: Tensor, baseline: bool) -> Tensor:
    log_q_N, log_p_N = (token_logprob(logits_NV, token_N)[0] for logits_NV in (student_NV, teacher_NV))
    d_N = cost_N = (log_q_N - log_p_N).detach()
    if baseline:
        cost_N = d_N - divergence(_log_softmax(student_NV.detach()), teacher_NV.log_softmax(1), "reverse")
    return d_N + cost_N * (log_q_N - log_q_N.detach())


def _detached(teacher: Tensor | TeacherList, dtype: torch.dtype) -> Tensor | TeacherList:
    if isinstance(teacher, TeacherList):
        return TeacherList(teacher.id_NK, teacher.logp_NK.detach().to(dtype))
    return teacher.detach().to(dtype)


def _log_softmax(logits_NV: Tensor) -> Tensor:
    return logits_NV.log_softmax(1, dtype=_result_dtype(logits_NV))


def _result_dtype(logits_NV: Tensor) -> torch.dtype:
    return torch.float64 if logits_NV.dtype == torch.float64 else torch.float32


def _check_choices(support: str, menu: str, mode: str, direction: str, beta: float, baseline: bool) -> None:
    for name, value, choices in (("support", support, SUPPORTS), ("menu", menu, MENUS), ("mode", mode, MODES),
                                 ("direction", direction, DIRECTIONS)):
        if value not in choices:
            raise LabError(f"There is no {name} {value!r}.", f"Choose one of {', '.join(choices)}.")
    if support == "sampled" and direction != "reverse":
        raise LabError(f'support="sampled" has no direction "{direction}": the student\'s own token says nothing '
                       "unbiased about it.", 'Use direction="reverse", or support="full" or "topk".')
    if mode == "stop_gradient" and direction != "reverse":
        raise LabError(f'mode="stop_gradient" has no direction "{direction}".', 'Use direction="reverse".')
    if baseline and support != "sampled":
        raise LabError("Only a sampled cost has a baseline.", 'Use support="sampled", or leave baseline out.')
    if not 0 <= beta <= 1:
        raise LabError(f"A divergence between the two KLs has no beta={beta}.", "Use a beta from 0 to 1.")


def _check_tensors(student_NV: Tensor, teacher: Tensor | TeacherList, support: str, k: int | None, menu: str,
                   token_N: Tensor | None, mask_N: Tensor | None) -> None:
    check_shape("student_logits_NV", student_NV, (None, None), "[N, V]")
    check_float("student_logits_NV", student_NV)
    check_devices(student_logits_NV=student_NV, token_N=token_N, mask_N=mask_N)
    if mask_N is not None:
        check_shape("mask_N", mask_N, (len(student_NV),), "[N]")
    if isinstance(teacher, TeacherList):
        return _check_list(support, menu)
    check_devices(student_logits_NV=student_NV, teacher_logits_NV=teacher)
    check_shape("teacher_logits_NV", teacher, tuple(student_NV.shape), "the shape of the student's logits")
    check_float("teacher_logits_NV", teacher)
    N, V = student_NV.shape
    if support == "topk" and (k is None or not 1 <= k <= V):
        raise LabError(f'support="topk" cannot use k={k} with a vocabulary of {V}.', f"Give k a value from 1 to {V}.")
    if support == "sampled" and token_N is None:
        raise LabError('support="sampled" needs the sampled tokens.', "Pass them as token_N, one a row.")
    if support == "sampled":
        check_shape("token_N", token_N, (N,), "[N]")


def _check_list(support: str, menu: str) -> None:
    if support != "topk" or menu != "teacher":
        raise LabError(f'A TeacherList does not say what support="{support}" with menu="{menu}" needs.',
                       'Use support="topk" and menu="teacher", or give the teacher\'s logits.')
