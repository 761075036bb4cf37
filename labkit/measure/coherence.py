"""Do the gradients of a distillation loss add up over positions, or not? Exact gradients, one a position.

    g_n = grad_theta KL(q_n, p_n) = J_n^T l_n      the prefix of position n held fixed; J_n: logits by weights
    l_n(v) = q_v (log q_v - log p_v - KL)          the gradient of the KL with respect to the student's logits
    R = |sum g|^2 / sum |g|^2                      1 orthogonal, N aligned, below 1 cancelling;  coherence C = R / N
    |sum g| / N = rms |l| * (rms |g| / rms |l|) * sqrt(C)      the norm: signal, gain of the Jacobian, coherence

All from the full vocabulary. The noise of a sampled estimator is uncorrelated over positions and would pull R to 1
whatever the teacher is. C falls as 1/N where nothing adds up, so compare equal N only. And G = 0 with |g| > 0 is also
what every minimum looks like: "large advantages, small norm" does not by itself tell cancelling from being done.
Source: the questions of arXiv 2604.13016, sections 6.1 and 6.2; R is the inverse of the gradient diversity of
arXiv 1706.05699.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from labkit.errors import LabError
from labkit.kernels.checks import check_shape
from labkit.measure.distance import token_kl
from labkit.measure.gradient_variance import SCORE_BYTES
from labkit.models import GPT, answer_logits
from labkit.tasks import answer_mask


@dataclass(frozen=True)
class Coherence:
    """How N vectors add up. Where all of them are 0, the quotients are NaN."""

    positions: int  # N
    amplification: float  # R, from 0 to N
    coherence: float  # C = R / N
    norm: float  # |G| / N, G the sum
    rms: float  # sqrt(mean |g|^2)
    projection_index: float  # K = sum a / sum |a|, a_n = <g_n, G / |G|>
    negative_share: float  # the share of positions with a < 0


@dataclass(frozen=True)
class PositionGradients:
    """One row a position that counts, rollout after rollout."""

    grads_NP: Tensor  # over all trainable weights
    ell_NV: Tensor  # the gradients of the student's logits
    rollout_N: Tensor
    position_N: Tensor  # 0 for the first answer token
    blocks: dict[str, slice]  # each tensor's columns of grads_NP


@dataclass(frozen=True)
class GroupCoherence:
    """R of all vectors = within * across, exactly."""

    within: float  # sum over groups of |G_k|^2, over sum |g|^2: R inside the groups, their mean by sum |g|^2
    across: float  # |sum G_k|^2 over sum |G_k|^2: R of the groups' sums
    total: float
    group_K: Tensor  # the groups' names
    amplification_K: Tensor  # R of each


@dataclass(frozen=True)
class NormSplit:
    """log(norm of the first / norm of the second) = signal + gain + coherence, in nats."""

    log_ratio: float
    signal: float  # rms |l|
    gain: float  # rms |g| / rms |l|
    coherence: float  # sqrt(C)


def gradient_coherence(grads_TP: Tensor) -> Coherence:
    """Amplification, coherence and their parts for T gradients [T, P]; any set of columns, such as one block, will do.

    T independent vectors of random directions have R = 1 on average, with a standard deviation of about sqrt(2 / P).
    """
    check_shape("grads_TP", grads_TP, (None, None), "[T, P]")
    G_P = _sum(grads_TP)
    return _coherence(float(G_P.norm()), _squares(grads_TP), grads_TP @ G_P.to(grads_TP))


def head_coherence(ell_NV: Tensor, hidden_ND: Tensor) -> Coherence:
    """The same for the weights of an output head alone, whose gradients l_n h_n^T [N, V * D] are never made.

    |sum l h^T|^2 from one product [V, D], and |l h^T| = |l| |h|. In a model with a tied head this is the part of the
    embedding's gradient that comes through the output.
    """
    check_shape("ell_NV", ell_NV, (len(hidden_ND), None), "[N, V]")
    check_shape("hidden_ND", hidden_ND, (None, None), "[N, D]")
    ell_NV, hidden_ND = ell_NV.double(), hidden_ND.double()
    G_VD = ell_NV.T @ hidden_ND
    return _coherence(float(G_VD.norm()), _squares(ell_NV) * _squares(hidden_ND), ((ell_NV @ G_VD) * hidden_ND).sum(1))


def coherence_by(grads_NP: Tensor, group_N: Tensor) -> GroupCoherence:
    """R inside groups of positions and among the groups' sums.

    group_N: whole numbers, one a position: its rollout (does a rollout add up along itself?), its position (do rollouts
        add up at the same place?), its prompt.
    """
    check_shape("grads_NP", grads_NP, (None, None), "[N, P]")
    check_shape("group_N", group_N, (len(grads_NP),), "[N]")
    if not len(grads_NP):
        raise LabError("There are no gradients to group.", "Give at least one position that counts.")
    group_K, index_N = group_N.unique(return_inverse=True)
    sum_KP = grads_NP.new_zeros(len(group_K), grads_NP.shape[1], dtype=torch.float64)
    for index, part in zip(index_N.split(256), grads_NP.split(256), strict=True):
        sum_KP.index_add_(0, index, part.double())
    apart_N, joint_K = _squares(grads_NP), _squares(sum_KP)
    apart_K = torch.zeros_like(joint_K).index_add_(0, index_N, apart_N)
    total, joint, apart = (float(part.sum()) for part in (sum_KP.sum(0).square(), joint_K, apart_N))
    return GroupCoherence(_ratio(joint, apart), _ratio(total, joint), _ratio(total, apart), group_K, joint_K / apart_K)


def logit_gradient(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """l_v = q_v (log q_v - log p_v - KL(q, p)) over the last dimension, float64: what KL(q, p) sends into the logits.

    Raises LabError where the teacher forbids a token that the student allows: the KL is infinite there.
    """
    log_q, log_p = student_logits.double().log_softmax(-1), teacher_logits.double().log_softmax(-1)
    kl = token_kl(student_logits, teacher_logits)
    if not kl.isfinite().all():
        raise LabError("The KL of some position is not finite.", "Mask positions where the teacher forbids a token "
                       "that the student allows.")
    q = log_q.exp()
    return torch.where(q == 0, 0.0, q * (log_q - log_p - kl[..., None]))


@torch.no_grad()
def position_gradients(student: GPT, teacher: GPT | Tensor, prompt_BT: Tensor, answer_BA: Tensor,
                       mask_BA: Tensor | None = None, *, chunk: int | None = None) -> PositionGradients:
    """g = grad KL(student, teacher) at each answer position, over all weights of the student that train.

    Args:
        teacher: a decoder, or its logits for these answers, [B, A, V].
        mask_BA: positions that count; by default those up to END, that included.
        chunk: rollouts whose gradients [chunk, A, P] are made at once; by default about 64 MB of them.
    The result takes N * P numbers, of the student's precision. Raises LabError for shapes that do not fit, and as
    logit_gradient does.
    """
    mask_BA, ell_BAV = _signal(student, teacher, prompt_BT, answer_BA, mask_BA)
    weights = {name: weight.detach() for name, weight in student.named_parameters() if weight.requires_grad}
    sizes = [weight.numel() for weight in weights.values()]
    chunk = chunk or max(1, SCORE_BYTES // (4 * max(1, answer_BA.shape[1]) * max(1, sum(sizes))))

    def pulled(weights, text_U, ell_AV):
        """<logits, l> with l held fixed: its gradient is J^T l."""
        return (functional_call(student, weights, (text_U[None],))[0, -len(ell_AV):] * ell_AV).sum(1)

    gradients = vmap(jacrev(pulled), in_dims=(None, 0, 0))
    text_BU = torch.cat((prompt_BT, answer_BA[:, :-1]), 1)  # the last token predicts nothing
    rows = [ell_BAV.new_zeros(0, sum(sizes))]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule: vmap would loop, with a warning
        for text_CU, ell_CAV, mask_CA in zip(*(part.split(chunk) for part in (text_BU, ell_BAV, mask_BA)), strict=True):
            if mask_CA.any():
                parts = gradients(weights, text_CU, ell_CAV).values()
                rows.append(torch.cat([part.flatten(2)[mask_CA] for part in parts], 1))
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    blocks = {name: slice(*ends[i : i + 2]) for i, name in enumerate(weights)}
    rollout_N, position_N = mask_BA.nonzero(as_tuple=True)
    return PositionGradients(torch.cat(rows), ell_BAV[mask_BA], rollout_N, position_N, blocks)


@torch.no_grad()
def sketched_gradients(student: GPT, teacher: GPT | Tensor, prompt_BT: Tensor, answer_BA: Tensor,
                       mask_BA: Tensor | None = None, *, directions: int, generator: torch.Generator) -> Tensor:
    """[N, m]: the gradients' projections on m random directions over sqrt(m), for models whose [N, P] does not fit.

    Inner products of rows are those of the gradients on average, with a relative error of about sqrt(2 / m), so
    gradient_coherence and coherence_by read this as gradients. One backward pass a direction; N(0, 1) directions from
    the generator, which is on the student's device.
    """
    if directions < 1:
        raise LabError(f"{directions} directions sketch nothing.", "Use one or more.")
    mask_BA, ell_BAV = _signal(student, teacher, prompt_BT, answer_BA, mask_BA)
    weights = {name: weight.detach() for name, weight in student.named_parameters() if weight.requires_grad}
    text_BU = torch.cat((prompt_BT, answer_BA[:, :-1]), 1)

    def weighted(weights):
        """<logits, l> of each position: its Jacobian is [N, P]."""
        return (functional_call(student, weights, (text_BU,))[:, prompt_BT.shape[1] - 1 :] * ell_BAV).sum(2)[mask_BA]

    columns = []
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        # u -> J^T u is linear, so its own pullback is v -> J v, whatever u is
        project = vjp(lambda u_N: vjp(weighted, weights)[1](u_N)[0], ell_BAV.new_zeros(int(mask_BA.sum())))[1]
        for _ in range(directions):
            columns.append(project({name: torch.randn(weight.shape, generator=generator, dtype=weight.dtype,
                                                      device=weight.device) for name, weight in weights.items()})[0])
    return torch.stack(columns, 1) / math.sqrt(directions)


def permuted_teacher(teacher_BAV: Tensor, mask_BA: Tensor, generator: torch.Generator) -> Tensor:
    """The teacher's rows, at each position permuted at random among the rollouts that count there.

    The null of position_gradients: what teacher rows say at a position stays, to which prefix they belong does not.
    A rollout may keep its own row. Rows that do not count stay where they are.
    """
    check_shape("mask_BA", mask_BA, tuple(teacher_BAV.shape[:2]), "[B, A]")
    off_BA = mask_BA == 0
    key_BA = torch.rand(off_BA.shape, generator=generator, device=generator.device).to(off_BA.device)
    drawn_BA = key_BA.masked_fill(off_BA, 2.0).sort(dim=0, stable=True).indices
    ordered_BA = off_BA.byte().sort(dim=0, stable=True).indices
    source_BA = torch.empty_like(drawn_BA).scatter_(0, ordered_BA, drawn_BA)
    return teacher_BAV.gather(0, source_BA[:, :, None].expand_as(teacher_BAV))


def norm_split(first: PositionGradients, second: PositionGradients) -> NormSplit:
    """Why one teacher's mean gradient is longer than another's: signal, gain or coherence; the three parts add up.

    Raises LabError where N differs, since C depends on it, or where a norm is 0.
    """
    parts = []
    for each in (first, second):
        coherence = gradient_coherence(each.grads_NP)
        parts.append((coherence.norm, _squares(each.ell_NV).mean().sqrt().item(), coherence.rms, coherence.coherence))
    if len(first.grads_NP) != len(second.grads_NP) or not all(value > 0 for part in parts for value in part):
        raise LabError("These two sets of gradients cannot be compared.",
                       "Take both at the same positions of the same answers, where neither mean gradient is 0.")
    norm, signal, rms, coherence = (math.log(a / b) for a, b in zip(*parts, strict=True))
    return NormSplit(norm, signal, rms - signal, coherence / 2)


def _signal(student: GPT, teacher: GPT | Tensor, prompt_BT: Tensor, answer_BA: Tensor,
            mask_BA: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mask, and the gradients of the student's logits in its precision, 0 where the mask is."""
    check_shape("prompt_BT", prompt_BT, (len(answer_BA), None), "[B, T]")
    check_shape("answer_BA", answer_BA, (None, None), "[B, A]")
    mask_BA = answer_mask(answer_BA) if mask_BA is None else mask_BA != 0
    check_shape("mask_BA", mask_BA, tuple(answer_BA.shape), "the shape of answer_BA")
    student_BAV = answer_logits(student, prompt_BT, answer_BA)
    teacher_BAV = teacher if isinstance(teacher, Tensor) else answer_logits(teacher, prompt_BT, answer_BA)
    check_shape("the teacher's logits", teacher_BAV, tuple(student_BAV.shape), "the shape of the student's")
    ell_BAV = torch.zeros_like(student_BAV)
    ell_BAV[mask_BA] = logit_gradient(student_BAV[mask_BA], teacher_BAV[mask_BA]).to(ell_BAV)
    return mask_BA, ell_BAV


def _sum(grads_NP: Tensor) -> Tensor:
    """The sum of the rows in float64, of which a whole copy would be twice as large."""
    return torch.stack([part.sum(0, dtype=torch.float64) for part in grads_NP.split(256)]).sum(0)


def _squares(rows_NK: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows_NK, dim=1, dtype=torch.float64).square()


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else math.nan


def _coherence(norm: float, square_N: Tensor, along_N: Tensor) -> Coherence:
    """From |G|, |g|^2 and <g, G>, which is |G| times a."""
    N, total, along_N = len(square_N), float(square_N.sum()), along_N.double()
    if not N:
        raise LabError("There are no gradients to compare.", "Give at least one position that counts.")
    R = _ratio(norm**2, total)
    index = _ratio(float(along_N.sum()), float(along_N.abs().sum()))
    return Coherence(N, R, R / N, norm / N, math.sqrt(total / N), index, float((along_N < 0).double().mean()))
