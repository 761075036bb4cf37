"""K7. The renormalised top-k KL divergence straight from hidden states, with K rows of the head for each token.

    q_i = softmax over S of x_i = h . W_i / temperature          S: the K ids that the teacher named for this token

The identity.  Over the whole vocabulary log q_i = x_i - lse(x), and lse needs all V logits. Renormalised on the set,
log q_i = x_i - lse(x) - log sum_S exp(x - lse(x)) = x_i - log sum_S exp(x): the lse over V cancels. So V - K of the
logits decide nothing, neither the loss nor, since its gradient is zero outside S, the gradient:

    dL/dh = sum_S g_i W_i          dL/dW_v = sum over tokens n with v in S_n of g_n,i h_n          g: topk_set's values

Those V - K rows are the head's cost: 6 N H V FLOPs dense. Here K rows are gathered for the loss, again for dh, and K
copies of h are added for dW, about 3 N K H e bytes with e an element (no reuse in a cache), against F FLOP/s and BW
bytes/s:

    time dense / time sparse = (6 N H V / F) / (3 N K H e / BW) = V BW / (K F)   with e = 2     break-even K* = V BW / F

With V = 151,936 and K = 64: 12.9 times on an H200 (4.3 TB/s and 790 TFLOP/s, both measured; K* = 827), 20 times on an
RTX 5090 (1.79 TB/s and 209 TFLOP/s, data sheet; K* = 1,301). These are floors, not timings. Compulsory are 2 U H e
for U distinct ids: their rows in, their gradients out. To that come 2 N H e, and V H e for the zeros of the other
rows of dW. (Adding to dW by fp32 atomics instead would move N K H times 8 bytes, and not repeat its bits.)

Memory: no [N, V] tensor, neither logits nor gradient. What is allocated is dW [V, H], which a dense head has as well,
dh, and 16 N K bytes; the sort of the N K pairs takes about 40 N K for a while. Logits are fp32 and never rounded to
bf16, which at a KL of 1e-3 alone costs 40% of the gradient.

The student's mass on S needs the lse, so it is not returned. The sum for dW (segments) has a fixed order: two runs
give the same bits. With a set larger than K* compute logits and use topk_kl; the result is the same.

Source: the objective, arXiv 2603.25562; skipping the head for it is this course's own.
"""

import math

import torch
from torch import Tensor

from labkit.kernels.checks import check_devices, check_float, check_shape
from labkit.kernels.configs import Row, settings_for
from labkit.kernels.cost import Cost
from labkit.kernels.language import tl, triton
from labkit.kernels.layout import dense_rows
from labkit.kernels.segments import segment_cost, segment_sums
from labkit.kernels.topk_set import check_set, launch_set, members, runs_kernel, set_divergence

DOT_SETTINGS = [  # by K; a tile is 8,192 elements, 16 KB of bf16 in flight
    Row("any", 8, {"BLOCK_K": 8, "BLOCK_H": 1024, "num_warps": 8}),
    Row("any", 16, {"BLOCK_K": 16, "BLOCK_H": 512, "num_warps": 8}),
    Row("any", float("inf"), {"BLOCK_K": 64, "BLOCK_H": 128, "num_warps": 8}),
]
ROW_SETTINGS = [
    Row("any", 8, {"BLOCK_K": 8, "BLOCK_H": 1024, "num_warps": 8}),
    Row("any", float("inf"), {"BLOCK_K": 16, "BLOCK_H": 512, "num_warps": 8}),
]


def sparse_head_topk_kl(hidden_NH: Tensor, weight_VH: Tensor, teacher_ids_NK: Tensor, teacher_logp_NK: Tensor, *,
                        direction: str = "reverse", temperature: float = 1.0, impl: str = "auto") -> Tensor:
    """The loss of `topk_kl(hidden @ weight.T, ids, logp, mode="renorm")`, in nats, without the other V - K logits.

    Args:
        hidden_NH, weight_VH: fp16, bf16 or fp32 (float64 with the reference). The weight may be tied to the embedding.
        teacher_ids_NK, teacher_logp_NK, direction, temperature: as in topk_kl.
    Returns:
        loss_N in fp32, differentiable with respect to hidden and weight. An empty set has loss 0. No masses: the
        teacher's is teacher_logp_NK.exp().sum(1), the student's needs the dense head.
    Raises:
        LabError: shapes, devices, dtypes, ids or settings that do not fit; K > V.
    """
    tensors = (hidden_NH, weight_VH, teacher_ids_NK, teacher_logp_NK)
    _check(*tensors, direction, temperature)
    if runs_kernel(impl, teacher_ids_NK, hidden_NH=hidden_NH, weight_VH=weight_VH, teacher_logp_NK=teacher_logp_NK):
        return _op(*tensors, direction, temperature)[0]
    return reference(*tensors, direction, temperature)


def reference(hidden_NH: Tensor, weight_VH: Tensor, teacher_ids_NK: Tensor, teacher_logp_NK: Tensor,
              direction: str = "reverse", temperature: float = 1.0) -> Tensor:
    """The loss [N] in plain torch: rows [N, K, H] gathered, products in fp32, the set's arithmetic in float64."""
    dtype = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
    V = weight_VH.shape[0]
    rows_NKH = weight_VH[teacher_ids_NK.clamp(0, V - 1).long()].to(dtype)
    x_NK = torch.einsum("nh,nkh->nk", hidden_NH.to(dtype), rows_NKH).double() / temperature
    x_NK = x_NK.masked_fill((teacher_ids_NK < -1) | (teacher_ids_NK >= V), math.nan)
    member_NK = members(teacher_ids_NK, teacher_logp_NK)
    return set_divergence(x_NK, None, teacher_logp_NK, member_NK, "renorm", direction)[0].to(dtype)


def forward_cost(N: int, V: int, K: int, H: int, element: int = 2) -> Cost:
    """K rows of the head a token, its hidden state once for every 64 of them, the set (ids three times)."""
    read = N * K * H * element + N * -(-K // 64) * H * element + N * K * 36 + 4 * N
    return Cost(read, N * K * 16 + 16 * N, 2 * N * K * H, cached=N * (-(-K // 64) - 1) * H * element)


def backward_cost(N: int, V: int, K: int, H: int, element: int = 2, *, cuts: int = 0) -> Cost:
    """dh: K rows a token, and the set once for each block of H. dW: a hidden state a pair, `cuts` as in segments."""
    for_hidden = Cost(N * K * H * element + N * -(-H // 512) * (12 * K + 4), N * H * element, 2 * N * K * H)
    return for_hidden.plus(segment_cost(N * K, V, H, element, cuts=cuts))


@triton.jit
def _dot_kernel(hidden, weight, ids, logits, V, H, K, stride_hidden, stride_weight, BLOCK_K: tl.constexpr,
                BLOCK_H: tl.constexpr):
    """One program a token and BLOCK_K ids. Products stay in their lanes: one reduction at the end, not H / BLOCK_H."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    i = tl.load(ids + row * K + k, mask=k < K, other=-1).to(tl.int64)  # id * stride passes 2^31 for 152k rows of 14k
    inside = (i >= 0) & (i < V)
    total = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        x = tl.load(hidden + row * stride_hidden + h, mask=h < H, other=0.0).to(tl.float32)
        w = tl.load(weight + i[:, None] * stride_weight + h[None, :], mask=inside[:, None] & (h < H)[None, :],
                    other=0.0).to(tl.float32)
        total += w * x[None, :]
    tl.store(logits + row * K + k, tl.sum(total, 1), mask=k < K)


@triton.jit
def _rows_kernel(upstream, values, kept, weight, gradient, H, K, stride_weight, BLOCK_K: tl.constexpr,
                 BLOCK_H: tl.constexpr):
    """One program a token and block of H: the same rows again, each times its gradient."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    scale = tl.load(upstream + row)
    total = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        i = tl.load(kept + row * K + k, mask=k < K, other=-1).to(tl.int64)
        g = scale * tl.load(values + row * K + k, mask=k < K, other=0.0)
        w = tl.load(weight + i[:, None] * stride_weight + h[None, :], mask=(i >= 0)[:, None] & (h < H)[None, :],
                    other=0.0).to(tl.float32)
        total += g[:, None] * w
    tl.store(gradient + row * H + h, tl.sum(total, 0).to(gradient.dtype.element_ty), mask=h < H)


def launch_forward(hidden_NH: Tensor, weight_VH: Tensor, ids_NK: Tensor, logp_NK: Tensor, direction: str,
                   temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """loss [N]; kept ids and gradients with respect to the logits of the set, [N, K]."""
    (N, K), (V, H) = ids_NK.shape, weight_VH.shape
    logits_NK = torch.empty(N, K, dtype=torch.float32, device=hidden_NH.device)
    settings = settings_for("sparse_head_dots", DOT_SETTINGS, K, hidden_NH.device)
    if N and K:
        _dot_kernel[(N, -(-K // settings["BLOCK_K"]))](hidden_NH, weight_VH, ids_NK, logits_NK, V, H, K,
                                                       hidden_NH.stride(0), weight_VH.stride(0), **settings)
    unknown_N = torch.full((N,), math.nan, dtype=torch.float32, device=hidden_NH.device)  # the lse that cancels
    loss_N, _, _, kept_NK, values_NK, _ = launch_set(logits_NK, ids_NK, logp_NK, unknown_N, V, "renorm", direction,
                                                     temperature, gathered=True)
    return loss_N, kept_NK, values_NK


def launch_hidden_gradient(grad_loss_N: Tensor, values_NK: Tensor, kept_NK: Tensor, weight_VH: Tensor,
                           dtype: torch.dtype) -> Tensor:
    """dL/dhidden, [N, H] in `dtype`."""
    (N, K), H = kept_NK.shape, weight_VH.shape[1]
    out_NH = torch.empty(N, H, dtype=dtype, device=weight_VH.device)
    settings = settings_for("sparse_head_rows", ROW_SETTINGS, K, weight_VH.device)
    if N and H:
        _rows_kernel[(N, -(-H // settings["BLOCK_H"]))](grad_loss_N, values_NK, kept_NK, weight_VH, out_NH, H, K,
                                                        weight_VH.stride(0), **settings)
    return out_NH


@torch.library.custom_op("labkit::sparse_head_topk_kl", mutates_args=())
def _op(hidden_NH: Tensor, weight_VH: Tensor, ids_NK: Tensor, logp_NK: Tensor, direction: str,
        temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(dense_rows(hidden_NH), dense_rows(weight_VH), ids_NK.contiguous(), logp_NK.contiguous(),
                          direction, temperature)


@_op.register_fake
def _(hidden_NH, weight_VH, ids_NK, logp_NK, direction, temperature):
    return (hidden_NH.new_empty(hidden_NH.shape[0], dtype=torch.float32), ids_NK.new_empty(ids_NK.shape),
            hidden_NH.new_empty(ids_NK.shape, dtype=torch.float32))


@torch.library.custom_op("labkit::sparse_head_hidden_backward", mutates_args=())
def _hidden_op(grad_loss_N: Tensor, values_NK: Tensor, kept_NK: Tensor, weight_VH: Tensor,
               dtype: torch.dtype) -> Tensor:
    return launch_hidden_gradient(grad_loss_N.contiguous(), values_NK, kept_NK, dense_rows(weight_VH), dtype)


@_hidden_op.register_fake
def _(grad_loss_N, values_NK, kept_NK, weight_VH, dtype):
    return weight_VH.new_empty(kept_NK.shape[0], weight_VH.shape[1], dtype=dtype)


@torch.library.custom_op("labkit::sparse_head_weight_backward", mutates_args=())
def _weight_op(grad_loss_N: Tensor, values_NK: Tensor, kept_NK: Tensor, hidden_NH: Tensor, V: int,
               dtype: torch.dtype) -> Tensor:
    return segment_sums(kept_NK, grad_loss_N[:, None] * values_NK, dense_rows(hidden_NH), V, dtype)


@_weight_op.register_fake
def _(grad_loss_N, values_NK, kept_NK, hidden_NH, V, dtype):
    return hidden_NH.new_empty(V, hidden_NH.shape[1], dtype=dtype)


def _save(ctx, inputs, output):
    hidden_NH, weight_VH = inputs[:2]
    ctx.save_for_backward(hidden_NH, weight_VH, *output[1:])


def _backward(ctx, grad_loss_N, *_):
    hidden_NH, weight_VH, kept_NK, values_NK = ctx.saved_tensors
    grad_hidden_NH = grad_weight_VH = None
    if ctx.needs_input_grad[0]:
        grad_hidden_NH = _hidden_op(grad_loss_N, values_NK, kept_NK, weight_VH, hidden_NH.dtype)
    if ctx.needs_input_grad[1]:
        grad_weight_VH = _weight_op(grad_loss_N, values_NK, kept_NK, hidden_NH, weight_VH.shape[0], weight_VH.dtype)
    return grad_hidden_NH, grad_weight_VH, None, None, None, None


_op.register_autograd(_backward, setup_context=_save)


def _check(hidden_NH: Tensor, weight_VH: Tensor, ids_NK: Tensor, logp_NK: Tensor, direction: str,
           temperature: float) -> None:
    check_shape("hidden_NH", hidden_NH, (None, None), "[N, H]")
    check_shape("weight_VH", weight_VH, (None, hidden_NH.shape[1]), "[V, H]")
    check_float("hidden_NH", hidden_NH)
    check_float("weight_VH", weight_VH)
    check_devices(hidden_NH=hidden_NH, weight_VH=weight_VH, teacher_ids_NK=ids_NK, teacher_logp_NK=logp_NK)
    check_set(hidden_NH.shape[0], weight_VH.shape[0], ids_NK, logp_NK, "renorm", direction, temperature)
