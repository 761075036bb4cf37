"""K2. Cross-entropy of one target or a bag of targets, from logits that are read twice and never copied.

    lse_n  = log sum_v exp z_nv                                    online: running maximum m and sum of exp(z - m)
    loss_n = lse_n - sum_s w_s z_n,target(n,s) + z_loss * lse_n^2      w = 1/S, or the given weights
    dz_nv  = softmax(z_n)_v (g_n (1 + 2 z_loss lse_n) + h_n) - g_n sum_s w_s [v = target(n,s)]

g and h are the gradients that arrive at loss and lse. A token that stands twice in a bag counts twice.

Bytes, with e bytes an element: forward N V e read; backward N V e read and N V e written. (3 N V e in all; 2 N V e
would do if a row stayed on the chip between the two, but a bf16 row of 152k logits is 304 KB and an SM keeps 228.)
FLOPs: about 4 N V forward (max, subtract, exp, add) and 4 N V backward: far below every ridge, so memory decides.

Sources: online softmax, arXiv 1805.02867; z-loss, PaLM, arXiv 2204.02311, section 5; bags, arXiv 2605.06546. The
gradient over the logits is Liger's habit (arXiv 2410.10989); a whole row in one block is not copied from there, since
a block of 65,536 spills registers.
"""

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import check_devices, check_finite, check_float, check_ids, check_kernel_dtype, check_shape
from labkit.kernels.configs import OVER_VOCABULARY, settings_for
from labkit.kernels.cost import Cost
from labkit.kernels.dispatch import choose
from labkit.kernels.language import tl, triton
from labkit.kernels.layout import dense_rows


def cross_entropy(logits_NV: Tensor, target: Tensor, *, ignore_index: int = -100, z_loss: float = 0.0,
                  weight: Tensor | None = None, reduction: str = "mean", inplace: bool = False,
                  impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats and the log-sum-exp, both in fp32 and both differentiable.

    Args:
        logits_NV: fp16, bf16 or fp32 (float64 with the reference); any strides.
        target: token ids [N], or bags of ids [N, S]. An id equal to `ignore_index` does not count; a row with none
            left has loss 0 and gradient 0.
        z_loss: weight of lse^2, which keeps the logits from drifting.
        weight: [S], weights by place in the bag; they are scaled to sum to one over the ids that count. Default 1/S.
        reduction: "mean" over the rows that count (0 where none does), "sum", or "none" for loss [N].
        inplace: the kernel's backward writes the gradient over the logits, so that no second [N, V] is allocated.
            The logits are then gone; only for logits that nothing else needs.
    Returns:
        (loss, lse_N): loss a scalar or [N].
    Raises:
        LabError: shapes, devices, dtypes or ids that do not fit.
    """
    check_shape("logits_NV", logits_NV, (None, None), "[N, V]")
    check_float("logits_NV", logits_NV)
    check_devices(logits_NV=logits_NV, target=target, weight=weight)
    check_labels(*logits_NV.shape, target, weight, ignore_index, z_loss, reduction)
    target_NS = target[:, None] if target.ndim == 1 else target
    share_NS = bag_shares(target_NS, ignore_index, weight)
    if choose(impl, logits_NV):
        check_kernel_dtype("logits_NV", logits_NV)
        loss_N, lse_N = _op(logits_NV, target_NS, share_NS, z_loss, inplace)
    else:
        loss_N, lse_N = reference(logits_NV, target_NS, share_NS, z_loss)
    if reduction == "none":
        return loss_N, lse_N
    total = loss_N.sum()
    return (total if reduction == "sum" else total / (share_NS != 0).any(1).sum().clamp(min=1)), lse_N


def bag_shares(target_NS: Tensor, ignore_index: int, weight_S: Tensor | None) -> Tensor:
    """What part of its row's loss each id has: weights scaled to sum to one over the ids that count, fp32 [N, S]."""
    counts_NS = target_NS != ignore_index
    weight_NS = counts_NS.float() if weight_S is None else torch.where(counts_NS, weight_S.detach().float(), 0.0)
    total_N1 = weight_NS.sum(1, keepdim=True)
    return torch.where(total_N1 != 0, weight_NS / total_N1, 0.0)


def reference(logits_NV: Tensor, target_NS: Tensor, share_NS: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Loss [N] and lse [N] in plain torch, in fp32 (in float64 for float64 logits)."""
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    lse_N = logits_NV.logsumexp(1)
    picked_NS = logits_NV.gather(1, target_NS.clamp(0, logits_NV.shape[1] - 1))
    score_N = torch.where(share_NS != 0, share_NS * picked_NS, 0.0).sum(1)  # 0 * -inf must not become NaN
    counts_N = (share_NS != 0).any(1)
    return torch.where(counts_N, lse_N - score_N + z_loss * lse_N**2, 0.0), lse_N


def forward_cost(N: int, V: int, S: int = 1, element: int = 2) -> Cost:
    """Logits once; of each target its id (8 bytes), share (4) and logit; loss and lse out."""
    return Cost(N * V * element + N * S * (12 + element), 8 * N, 4 * N * V)


def backward_cost(N: int, V: int, S: int = 1, element: int = 2) -> Cost:
    """Logits once, their gradient out; lse and the two arriving gradients; ids and shares once more a block."""
    return Cost(N * V * element + 12 * N * (1 + S) * -(-V // 4096), N * V * element, 4 * N * V)


@triton.jit
def _forward_kernel(logits, target, share, loss, lse, V, S, stride_logits, z_loss,
                    BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr):
    """One program a row: online log-sum-exp over blocks of V, then the S targets."""
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31 from 14,000 rows of 152k on
    logits += row * stride_logits
    maximum = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits + v, mask=v < V, other=float("-inf")).to(tl.float32)
        new_maximum = tl.maximum(maximum, tl.max(z, 0))
        # a row of forbidden tokens so far (-inf), or a +inf logit: shifting by it would give inf - inf = NaN
        shift = tl.where(tl.abs(new_maximum) == float("inf"), 0.0, new_maximum)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(z - shift), 0)
        maximum = new_maximum
    log_total = tl.log(total)
    row_lse = maximum + log_total

    s = tl.arange(0, BLOCK_S)
    ids = tl.load(target + row * S + s, mask=s < S, other=0)
    w = tl.load(share + row * S + s, mask=s < S, other=0.0)
    inside = (ids >= 0) & (ids < V)
    z = tl.load(logits + ids, mask=(w != 0) & inside, other=0.0).to(tl.float32)
    # relative to the maximum: of lse and logit both near 10,000, the difference has lost four digits
    score = tl.sum(tl.where(w != 0, w * (tl.where(inside, z, float("nan")) - maximum), 0.0), 0)
    counts = tl.sum(tl.where(w != 0, 1, 0), 0) > 0
    tl.store(loss + row, tl.where(counts, log_total - score + z_loss * row_lse * row_lse, 0.0))
    tl.store(lse + row, row_lse)


@triton.jit
def _backward_kernel(logits, target, share, lse, grad_loss, grad_lse, gradient, V, S, stride_logits, stride_gradient,
                     z_loss, BLOCK_V: tl.constexpr):
    """One program a row and block of V, in fp32 until the store: p - 1 near p = 1 keeps its digits."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z = tl.load(logits + row * stride_logits + v, mask=v < V).to(tl.float32)
    row_lse = tl.load(lse + row)
    g = tl.load(grad_loss + row)
    h = tl.load(grad_lse + row)
    scale = 0.0
    onehot = tl.zeros([BLOCK_V], tl.float32)
    for s in range(S):
        w = tl.load(share + row * S + s)
        onehot += tl.where(v == tl.load(target + row * S + s), w, 0.0)
        scale = tl.where(w != 0, g * (1.0 + 2.0 * z_loss * row_lse), scale)  # stays 0 for a row that does not count
    scale += h
    p = tl.exp(z - row_lse)
    dz = tl.where(scale != 0, scale * p, 0.0) - g * onehot
    tl.store(gradient + row * stride_gradient + v, dz.to(gradient.dtype.element_ty), mask=v < V)


def launch_forward(logits_NV: Tensor, target_NS: Tensor, share_NS: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """loss [N] and lse [N], fp32."""
    N, V = logits_NV.shape
    loss_N, lse_N = (torch.empty(N, dtype=torch.float32, device=logits_NV.device) for _ in range(2))
    if N:
        S = target_NS.shape[1]

        def launch(settings):
            _forward_kernel[(N,)](logits_NV, target_NS, share_NS, loss_N, lse_N, V, S, logits_NV.stride(0), z_loss,
                                  BLOCK_S=triton.next_power_of_2(S), **settings)

        launch(settings_for("cross_entropy", OVER_VOCABULARY, V, logits_NV.device, launch))
    return loss_N, lse_N


def launch_backward(grad_loss_N: Tensor, grad_lse_N: Tensor, logits_NV: Tensor, target_NS: Tensor, share_NS: Tensor,
                    lse_N: Tensor, z_loss: float, out_NV: Tensor) -> None:
    """Write the gradient to `out_NV`, which may be the logits themselves."""
    N, V = logits_NV.shape
    if N:
        def launch(settings):
            _backward_kernel[(N, -(-V // settings["BLOCK_V"]))](
                logits_NV, target_NS, share_NS, lse_N, grad_loss_N, grad_lse_N, out_NV, V, target_NS.shape[1],
                logits_NV.stride(0), out_NV.stride(0), z_loss, **settings)

        over_itself = out_NV.data_ptr() == logits_NV.data_ptr()  # a search would feed gradients back in as logits
        launch(settings_for("cross_entropy", OVER_VOCABULARY, V, logits_NV.device, None if over_itself else launch))


@torch.library.custom_op("labkit::cross_entropy", mutates_args=())
def _op(logits_NV: Tensor, target_NS: Tensor, share_NS: Tensor, z_loss: float, inplace: bool) -> tuple[Tensor, Tensor]:
    return launch_forward(dense_rows(logits_NV), target_NS.contiguous(), share_NS.contiguous(), z_loss)


@torch.library.custom_op("labkit::cross_entropy_backward", mutates_args={"out_NV"})
def _backward_op(grad_loss_N: Tensor, grad_lse_N: Tensor, logits_NV: Tensor, target_NS: Tensor, share_NS: Tensor,
                 lse_N: Tensor, z_loss: float, out_NV: Tensor) -> None:
    launch_backward(grad_loss_N.contiguous(), grad_lse_N.contiguous(), dense_rows(logits_NV), target_NS.contiguous(),
                    share_NS.contiguous(), lse_N, z_loss, out_NV)


@_op.register_fake
def _(logits_NV, target_NS, share_NS, z_loss, inplace):
    N = logits_NV.shape[0]
    return tuple(logits_NV.new_empty(N, dtype=torch.float32) for _ in range(2))


@_backward_op.register_fake
def _(grad_loss_N, grad_lse_N, logits_NV, target_NS, share_NS, lse_N, z_loss, out_NV):
    return None


def _save(ctx, inputs, output):
    logits_NV, target_NS, share_NS, ctx.z_loss, ctx.inplace = inputs
    ctx.save_for_backward(logits_NV, target_NS, share_NS, output[1])


def _backward(ctx, grad_loss_N, grad_lse_N):
    logits_NV, target_NS, share_NS, lse_N = ctx.saved_tensors
    rows_apart = logits_NV.stride(1) == 1 and logits_NV.stride(0) >= logits_NV.shape[1]  # not so where expanded
    over_itself = ctx.inplace and rows_apart
    out_NV = logits_NV.detach() if over_itself else torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    _backward_op(grad_loss_N, grad_lse_N, logits_NV.detach(), target_NS, share_NS, lse_N, ctx.z_loss, out_NV)
    return out_NV, None, None, None, None


_op.register_autograd(_backward, setup_context=_save)


def check_labels(N: int, V: int, target: Tensor, weight: Tensor | None, ignore_index: int, z_loss: float,
                 reduction: str) -> None:
    """Everything beside the logits, also for linear_cross_entropy."""
    if not V:
        raise LabError("There is no vocabulary: V is 0.", "Pass logits [N, V] or a head [V, H] with V of 1 or more.")
    if target.ndim not in (1, 2) or 0 in target.shape[1:]:
        raise LabError(f"target has shape {list(target.shape)}.", "Use ids [N], or bags of one or more ids [N, S].")
    check_shape("target", target, (N, None)[: target.ndim], "[N]" if target.ndim == 1 else "[N, S]")
    check_ids("target", target, V, skip=ignore_index)
    if weight is not None:
        check_shape("weight", weight, (1 if target.ndim == 1 else target.shape[1],), "[S]")
        check_float("weight", weight)
    check_finite("z_loss", z_loss)
    if reduction not in ("mean", "sum", "none"):
        raise LabError(f"There is no reduction {reduction!r}.", 'Choose "mean", "sum" or "none".')
