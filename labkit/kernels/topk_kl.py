"""K6. KL divergence of student and teacher on the teacher's top-k tokens, from dense student logits.

    reverse  L_n = sum_S q (log q - log p)        forward  L_n = sum_S p (log p - log q)

q is the student, p the teacher, S the row's set of K ids. topk_set has the three modes, their gradients, and how they
are summed; here is what each is for.

renorm  Both sides are renormalised on S. The log-sum-exp over V cancels, so K logits a row decide everything, and the
        gradient outside S is zero. Nothing pulls mass *into* S: watch the student's mass.
tail    Both sides get one more bin with the remaining mass. A lower bound of the KL over all V, never negative.
none    The sum over S as it stands. It can be negative, and its gradient sum q (log q/p + 1) dlog q has a "+1" that
        over all of V would vanish: descending it moves mass out of S, also from tokens that the teacher likes (a
        token gains only where p > e q). Kept as the control that shows this.

Bytes, with e an element: N K (e + 24) + 4 N read on the set (an id of 8 bytes and a log-probability of 4, twice) and
12 N K + 16 N written; on a GPU each single logit costs a sector of 32 bytes. The dense gradient is the real price:
N V e of zeros, then K values a row. tail, none and the student's mass need the log-sum-exp, N V e read; tail and none
also have a gradient everywhere, N V e read and written. mass=False leaves out the first, `topk_kl_gradient` both.
FLOPs about 60 N K + 5 N K^2 (each id is compared with its row, to count equal ones once): little beside the bytes.

Source: renorm, arXiv 2603.25562 (local support matching); the "+1", arXiv 2605.11182 and verl issue 5041; tail, TRL's
server distillation; forward none, verl's forward_kl_topk.
"""

import math

import torch
from torch import Tensor

from labkit.kernels.checks import check_devices, check_float, check_shape
from labkit.kernels.configs import OVER_VOCABULARY, settings_for
from labkit.kernels.cost import Cost
from labkit.kernels.language import tl, triton
from labkit.kernels.layout import dense_rows
from labkit.kernels.token_logprob import launch_forward as launch_token_logprob
from labkit.kernels.topk_set import check_set, launch_set, members, runs_kernel, set_divergence


def topk_kl(student_logits_NV: Tensor, teacher_ids_NK: Tensor, teacher_logp_NK: Tensor, *, mode: str = "renorm",
            direction: str = "reverse", temperature: float = 1.0, mass: bool = True,
            impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """KL divergence of each row in nats, and how much of student and teacher lies on the set.

    Args:
        student_logits_NV: fp16, bf16 or fp32 (float64 with the reference). Close distributions need fp32: at a KL of
            1e-3, rounding the logits to bf16 alone spoils the gradient by some 40%.
        teacher_ids_NK: the set, in any order; -1 fills rows with fewer tokens. A token that stands twice counts once,
            with the larger log-probability.
        teacher_logp_NK: the teacher's log-probabilities, at the same temperature as the student's: log_softmax(teacher
            logits / temperature). With "renorm" an added constant changes nothing. -inf: not in the set.
        mode: "renorm", "tail" or "none", as above.
        direction: "reverse", KL(student, teacher); "forward", KL(teacher, student): +inf where the student forbids a
            token (-inf) that the teacher uses.
        temperature: divides the student's logits; above 0. The loss is not multiplied by its square.
        mass: False saves "renorm" the pass over V that only the student's mass needs; it is NaN then.
    Returns:
        (loss_N, student_mass_N, teacher_mass_N) in fp32. The loss is differentiable with respect to the student's
        logits; the masses are not. An empty set has loss 0.
    Raises:
        LabError: shapes, devices, dtypes, ids or settings that do not fit; K > V.
    """
    tensors = (student_logits_NV, teacher_ids_NK, teacher_logp_NK)
    _check(*tensors, mode, direction, temperature)
    if runs_kernel(impl, teacher_ids_NK, student_logits_NV=student_logits_NV, teacher_logp_NK=teacher_logp_NK):
        loss_N, *masses = _op(*tensors, mode, direction, temperature, mass or mode != "renorm")[:3]
    else:
        loss_N, *masses = reference(*tensors, mode, direction, temperature, mass)
    return loss_N, *(mass_N.detach() for mass_N in masses)


@torch.no_grad()
def topk_kl_gradient(student_logits_NV: Tensor, teacher_ids_NK: Tensor, teacher_logp_NK: Tensor, *,
                     direction: str = "reverse", temperature: float = 1.0, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Gradient of each row's "renorm" loss as (ids, values), both [N, K]: no [N, V] tensor is written.

    An id of -1 marks an entry that is not in the set (its value is 0); each other id stands once in its row. The other
    modes have no such gradient, since theirs reaches every token.

    Raises:
        LabError: as topk_kl.
    """
    tensors = (student_logits_NV, teacher_ids_NK, teacher_logp_NK)
    _check(*tensors, "renorm", direction, temperature)
    if runs_kernel(impl, teacher_ids_NK, student_logits_NV=student_logits_NV, teacher_logp_NK=teacher_logp_NK):
        return _op(*tensors, "renorm", direction, temperature, False)[3:5]
    member_NK = members(teacher_ids_NK, teacher_logp_NK)
    with torch.enable_grad():
        z_NK = _gathered(student_logits_NV.detach(), teacher_ids_NK).requires_grad_()
        loss_N, _ = set_divergence(z_NK / temperature, None, teacher_logp_NK, member_NK, "renorm", direction)
        values_NK = torch.autograd.grad(loss_N.sum(), z_NK)[0]
    return teacher_ids_NK.where(member_NK, -1), values_NK.to(_result_dtype(student_logits_NV))


def reference(student_logits_NV: Tensor, teacher_ids_NK: Tensor, teacher_logp_NK: Tensor, mode: str = "renorm",
              direction: str = "reverse", temperature: float = 1.0, mass: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The same three in plain torch: fp32 over V, float64 on the set (float64 throughout for float64 logits)."""
    result_dtype = _result_dtype(student_logits_NV)
    member_NK = members(teacher_ids_NK, teacher_logp_NK)
    x_NK = _gathered(student_logits_NV, teacher_ids_NK) / temperature
    needed = mass or mode != "renorm"
    lse_N = (student_logits_NV.to(result_dtype) / temperature).logsumexp(1) if needed else None
    loss_N, student_mass_N = set_divergence(x_NK, lse_N, teacher_logp_NK, member_NK, mode, direction)
    teacher_mass_N = torch.where(member_NK, teacher_logp_NK.double().exp(), 0.0).sum(1)
    return tuple(column_N.to(result_dtype) for column_N in (loss_N, student_mass_N, teacher_mass_N))


def _gathered(logits_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """The set's logits in float64; NaN for an id outside the vocabulary, like the kernel."""
    V = logits_NV.shape[1]
    z_NK = logits_NV.gather(1, ids_NK.clamp(0, V - 1).long()).double()
    return z_NK.masked_fill((ids_NK < -1) | (ids_NK >= V), math.nan)


def _result_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def forward_cost(N: int, V: int, K: int, element: int = 2, mode: str = "renorm", mass: bool = True) -> Cost:
    """The set (ids and log-probabilities twice), its logits, one lse a row; and K4's pass where it is needed."""
    on_the_set = Cost(N * K * (element + 24) + 4 * N, 12 * N * K + 16 * N, 60 * N * K + 5 * N * K * K)
    if not mass and mode == "renorm":
        return on_the_set
    return on_the_set.plus(Cost(N * V * element + N * (8 + element), 12 * N, 7 * N * V))


def backward_cost(N: int, V: int, K: int, element: int = 2, mode: str = "renorm") -> Cost:
    """Every logit's gradient (zeros, or from the logits) and then K values a row: id and value in, gradient out."""
    on_the_set = Cost(N * K * 12 + 4 * N, N * K * element, N * K)
    if mode == "renorm":
        return on_the_set.plus(Cost(0, N * V * element, 0))
    return on_the_set.plus(Cost(N * V * element + 12 * N * -(-V // 4096), N * V * element, 4 * N * V))


@triton.jit
def _fill_kernel(logits, lse, upstream, outside, gradient, V, stride, inverse_temperature, BLOCK_V: tl.constexpr):
    """One program a row and block of V: what every token gets that is not in the set."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z = tl.load(logits + row * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
    scale = tl.load(upstream + row) * tl.load(outside + row)
    dz = scale * tl.exp(z * inverse_temperature - tl.load(lse + row))
    tl.store(gradient + row * V + v, dz.to(gradient.dtype.element_ty), mask=v < V)


@triton.jit
def _scatter_kernel(kept, values, upstream, gradient, V, K, BLOCK_K: tl.constexpr):
    """One program a row. Kept ids differ within a row, so no two stores meet and no atomics are needed."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    i = tl.load(kept + row * K + k, mask=k < K, other=-1)
    dz = tl.load(upstream + row) * tl.load(values + row * K + k, mask=k < K, other=0.0)
    tl.store(gradient + row * V + i, dz.to(gradient.dtype.element_ty), mask=i >= 0)


def launch_forward(logits_NV: Tensor, ids_NK: Tensor, logp_NK: Tensor, mode: str, direction: str, temperature: float,
                   with_lse: bool) -> tuple[Tensor, ...]:
    """What launch_set returns, and lse [N] (NaN where nobody asked for it)."""
    N, V = logits_NV.shape
    if with_lse:
        first_N = torch.zeros(N, dtype=torch.int64, device=logits_NV.device)  # K4 wants a token; its lse is for all
        lse_N = launch_token_logprob(logits_NV, first_N, temperature, -1)[2]
    else:
        lse_N = torch.full((N,), math.nan, dtype=torch.float32, device=logits_NV.device)
    return *launch_set(logits_NV, ids_NK, logp_NK, lse_N, V, mode, direction, temperature), lse_N


def launch_fill(grad_loss_N: Tensor, logits_NV: Tensor, lse_N: Tensor, outside_N: Tensor,
                temperature: float) -> Tensor:
    """The gradient [N, V] as if no token were in the set."""
    N, V = logits_NV.shape
    out_NV = torch.empty(N, V, dtype=logits_NV.dtype, device=logits_NV.device)
    settings = settings_for("topk_kl", OVER_VOCABULARY, V, logits_NV.device)
    if N:
        _fill_kernel[(N, -(-V // settings["BLOCK_V"]))](logits_NV, lse_N, grad_loss_N, outside_N, out_NV, V,
                                                        logits_NV.stride(0), 1 / temperature, **settings)
    return out_NV


def launch_scatter(grad_loss_N: Tensor, kept_NK: Tensor, values_NK: Tensor, out_NV: Tensor) -> Tensor:
    """Put the set's gradients in their places in `out_NV`, and return it."""
    N, K = kept_NK.shape
    if N and K:
        BLOCK_K = triton.next_power_of_2(K)
        _scatter_kernel[(N,)](kept_NK, values_NK, grad_loss_N, out_NV, out_NV.shape[1], K, BLOCK_K=BLOCK_K,
                              num_warps=max(1, min(BLOCK_K // 64, 8)))
    return out_NV


@torch.library.custom_op("labkit::topk_kl", mutates_args=())
def _op(logits_NV: Tensor, ids_NK: Tensor, logp_NK: Tensor, mode: str, direction: str, temperature: float,
        with_lse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return launch_forward(dense_rows(logits_NV), ids_NK.contiguous(), logp_NK.contiguous(), mode, direction,
                          temperature, with_lse)


@_op.register_fake
def _(logits_NV, ids_NK, logp_NK, mode, direction, temperature, with_lse):
    loss_N, student_N, teacher_N, outside_N, lse_N = (
        logits_NV.new_empty(logits_NV.shape[0], dtype=torch.float32) for _ in range(5))
    values_NK = logits_NV.new_empty(ids_NK.shape, dtype=torch.float32)
    return loss_N, student_N, teacher_N, ids_NK.new_empty(ids_NK.shape), values_NK, outside_N, lse_N


@torch.library.custom_op("labkit::topk_kl_sparse_backward", mutates_args=())
def _sparse_backward_op(grad_loss_N: Tensor, kept_NK: Tensor, values_NK: Tensor, V: int, dtype: torch.dtype) -> Tensor:
    zeros_NV = torch.zeros(kept_NK.shape[0], V, dtype=dtype, device=kept_NK.device)
    return launch_scatter(grad_loss_N.contiguous(), kept_NK, values_NK, zeros_NV)


@_sparse_backward_op.register_fake
def _(grad_loss_N, kept_NK, values_NK, V, dtype):
    return values_NK.new_empty(kept_NK.shape[0], V, dtype=dtype)


@torch.library.custom_op("labkit::topk_kl_dense_backward", mutates_args=())
def _dense_backward_op(grad_loss_N: Tensor, kept_NK: Tensor, values_NK: Tensor, logits_NV: Tensor, lse_N: Tensor,
                       outside_N: Tensor, temperature: float) -> Tensor:
    grad_loss_N = grad_loss_N.contiguous()
    out_NV = launch_fill(grad_loss_N, dense_rows(logits_NV), lse_N, outside_N, temperature)
    return launch_scatter(grad_loss_N, kept_NK, values_NK, out_NV)


@_dense_backward_op.register_fake
def _(grad_loss_N, kept_NK, values_NK, logits_NV, lse_N, outside_N, temperature):
    return logits_NV.new_empty(logits_NV.shape)


def _save(ctx, inputs, output):
    logits_NV, _, _, mode, _, ctx.temperature, _ = inputs
    _, _, _, kept_NK, values_NK, outside_N, lse_N = output
    ctx.sparse, ctx.V, ctx.dtype = mode == "renorm", logits_NV.shape[1], logits_NV.dtype
    # "renorm" does not hold on to the logits, so that [N, V] can be freed before the backward
    ctx.save_for_backward(kept_NK, values_NK, *(() if ctx.sparse else (logits_NV, lse_N, outside_N)))


def _backward(ctx, grad_loss_N, *_):
    if ctx.sparse:
        out_NV = _sparse_backward_op(grad_loss_N, *ctx.saved_tensors, ctx.V, ctx.dtype)
    else:
        out_NV = _dense_backward_op(grad_loss_N, *ctx.saved_tensors, ctx.temperature)
    return out_NV, None, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_save)


def _check(logits_NV: Tensor, ids_NK: Tensor, logp_NK: Tensor, mode: str, direction: str, temperature: float) -> None:
    check_shape("student_logits_NV", logits_NV, (None, None), "[N, V]")
    check_float("student_logits_NV", logits_NV)
    check_devices(student_logits_NV=logits_NV, teacher_ids_NK=ids_NK, teacher_logp_NK=logp_NK)
    check_set(*logits_NV.shape, ids_NK, logp_NK, mode, direction, temperature)
