"""K10. Exact attention without the [T, T] matrix: a kernel to read, with grouped queries and its backward.

    S = scale Q K^T      P = softmax(S)      O = P V      lse_i = log sum_j exp S_ij
    dV = P^T dO          dP = dO V^T         dS = P (dP - delta + dlse)      delta_i = sum_d dO_id O_id
    dQ = scale dS K      dK = scale dS^T Q

A program holds BLOCK_Q queries and walks over the keys; maximum m, sum l and output are corrected when m grows, as in
cross_entropy. Blocks wholly below the diagonal need no mask and go first; those on it follow. exp2 is one instruction,
so the scale carries log2(e). The backward makes P again from lse: one kernel walks over queries for dK and dV, another
over keys for dQ, so neither needs atomics and two runs give the same bits.

Causal: query i sees keys j <= i + Tk - Tq, so that the last query sees all of a cache. (torch's is_causal aligns the
first ones; the two agree where Tq = Tk.) A query that sees no key gets 0, with lse = -inf.
FLOPs: 4 B Hq Tq Tk D forward, half of it causal; the backward 2.5 times that (10 B Hq Tq Tk D; 14 here, since both
kernels make P). The costs below count each tensor once: a walk reads keys and values again for every block of queries,
mostly from the cache, and its arithmetic takes longer than its bytes.
Source: arXiv 2205.14135, 2307.08691; the two-stage loop as in Triton's tutorial 06. Training uses SDPA by default.
"""

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import check_devices, check_finite, check_float, check_kernel_dtype, check_shape
from labkit.kernels.configs import Row
from labkit.kernels.cost import Cost
from labkit.kernels.dispatch import choose
from labkit.kernels.flash_backward import launch_backward
from labkit.kernels.flash_tiles import LOG2E, flash_settings, store_tile, strides_of, tile
from labkit.kernels.language import tl, triton
from labkit.kernels.layout import dense_rows

# By head size, as large as compiles without spilling. sm_120 has 99 KB of shared memory a block where sm_90 has 227.
FORWARD = [
    Row("sm_90", 64, {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}),
    Row("sm_90", 128, {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}),
    Row("sm_90", 256, {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}),
    Row("any", 64, {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}),
    Row("any", 128, {"BLOCK_Q": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}),
    Row("any", 256, {"BLOCK_Q": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1}),
]


def flash_attention(q_BHTD: Tensor, k_BJUD: Tensor, v_BJUD: Tensor, *, causal: bool = True, scale: float | None = None,
                    impl: str = "auto") -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v and its log-sum-exp, both differentiable: out [B, H, T, D] and lse [B, H, T] in fp32.

    Args:
        q_BHTD: queries of H heads at T places, fp16, bf16 or fp32 (float64 with the reference); D up to 256.
        k_BJUD, v_BJUD: keys and values of J heads at U places; head h reads h // (H / J).
        scale: default 1 / sqrt(D).
    Raises:
        LabError: shapes, devices, dtypes or a scale that do not fit.
    """
    _check(q_BHTD, k_BJUD, v_BJUD, scale)
    scale = q_BHTD.shape[-1] ** -0.5 if scale is None else scale
    if choose(impl, q_BHTD):
        check_kernel_dtype("q_BHTD", q_BHTD)
        return _op(q_BHTD, k_BJUD, v_BJUD, causal, scale)
    return reference(q_BHTD, k_BJUD, v_BJUD, causal, scale)


def reference(q_BHTD: Tensor, k_BJUD: Tensor, v_BJUD: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The same with the whole matrix, in fp32 (float64 for float64)."""
    dtype = torch.promote_types(q_BHTD.dtype, torch.float32)
    group = q_BHTD.shape[1] // k_BJUD.shape[1]
    k_BHUD, v_BHUD = (x.to(dtype).repeat_interleave(group, 1) for x in (k_BJUD, v_BJUD))
    s_BHTU = scale * q_BHTD.to(dtype) @ k_BHUD.transpose(2, 3)
    T, U = s_BHTU.shape[2:]
    if causal:
        seen_TU = torch.ones(T, U, dtype=torch.bool, device=s_BHTU.device).tril(U - T)
        s_BHTU = s_BHTU.masked_fill(~seen_TU, float("-inf"))
    lse_BHT = s_BHTU.logsumexp(3)
    nothing_BHT = lse_BHT == float("-inf")  # softmax of nothing would be NaN
    p_BHTU = (s_BHTU - lse_BHT.masked_fill(nothing_BHT, 0.0)[..., None]).exp()
    return (p_BHTU @ v_BHUD).to(q_BHTD.dtype), lse_BHT


def forward_cost(B: int, H: int, J: int, T: int, U: int, D: int, causal: bool = True, element: int = 2) -> Cost:
    """Two products, half of them where causal; q, k, v in, out and lse out. Each byte once, not as requested."""
    return Cost(B * D * element * (H * T + 2 * J * U), B * H * T * (D * element + 4),
                4.0 * B * H * T * U * D / (2 if causal else 1))


def backward_cost(B: int, H: int, J: int, T: int, U: int, D: int, causal: bool = True, element: int = 2) -> Cost:
    """Five products; q, k, v, out, lse and the gradients of these two in, three gradients out. Each byte once."""
    return Cost(B * D * element * (3 * H * T + 2 * J * U) + 8 * B * H * T, B * D * element * (H * T + 2 * J * U),
                10.0 * B * H * T * U * D / (2 if causal else 1))


@triton.jit
def _walk_keys(acc, m, total, q, k, v, start, stop, U, limit, stride_k, stride_v, scale, D: tl.constexpr,
               BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr):
    """Keys start..stop for one block of queries; query i may see keys below limit[i]."""
    for first in range(start, stop, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        s = tl.dot(q, tl.trans(tile(k, j, U, stride_k, D, BLOCK_D, MASKED)), input_precision="ieee") * scale
        if MASKED:
            s = tl.where(j[None, :] < limit[:, None], s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(new_m == float("-inf"), 0.0, new_m)  # a query that has seen no key yet
        p = tl.exp2(s - shift[:, None])
        keep = tl.exp2(m - shift)
        total = total * keep + tl.sum(p, 1)
        value = tile(v, j, U, stride_v, D, BLOCK_D, MASKED)
        acc = acc * keep[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        m = new_m
    return acc, m, total


@triton.jit
def _forward_kernel(q, k, v, out, lse, T, U, H, group, qb, qh, qt, kb, kh, kt, vb, vh, vt, scale, CAUSAL: tl.constexpr,
                    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """One program: BLOCK_Q queries of one head. Stride names: tensor and dimension.

    The grid has one axis, a head's blocks side by side: a second one could hold 65,535 heads at most.
    """
    head = tl.program_id(0) // tl.cdiv(T, BLOCK_Q)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    i = tl.program_id(0) % tl.cdiv(T, BLOCK_Q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    k += b * kb + h // group * kh
    v += b * vb + h // group * vh
    query = tile(q + b * qb + h * qh, i, T, qt, D, BLOCK_D, True)
    limit = tl.minimum(i + U - T + 1, U) if CAUSAL else i * 0 + U
    full = tl.maximum(tl.min(limit, 0), 0) // BLOCK_K * BLOCK_K
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    acc, m, total = _walk_keys(acc, m, total, query, k, v, 0, full, U, limit, kt, vt, scale, D, BLOCK_D, BLOCK_K, False)
    acc, m, total = _walk_keys(acc, m, total, query, k, v, full, tl.max(limit, 0), U, limit, kt, vt, scale, D, BLOCK_D,
                               BLOCK_K, True)
    total = tl.where(total == 0, 1.0, total)  # a query without keys: 0 / 1, and lse = m = -inf
    row = head.to(tl.int64) * T
    store_tile(out + row * D, acc / total[:, None], i, T, D, D, BLOCK_D)
    tl.store(lse + row + i, (m + tl.log2(total)) * 0.6931471805599453, mask=i < T)


def launch_forward(q_BHTD: Tensor, k_BJUD: Tensor, v_BJUD: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """out like q (contiguous) and lse [B, H, T]."""
    (B, H, T, D), (J, U) = q_BHTD.shape, k_BJUD.shape[1:3]
    out_BHTD = torch.empty(B, H, T, D, dtype=q_BHTD.dtype, device=q_BHTD.device)
    lse_BHT = torch.empty(B, H, T, dtype=torch.float32, device=q_BHTD.device)
    if out_BHTD.numel():
        settings = flash_settings(FORWARD, "flash_attention", D, q_BHTD.device)
        _forward_kernel[(-(-T // settings["BLOCK_Q"]) * B * H,)](
            q_BHTD, k_BJUD, v_BJUD, out_BHTD, lse_BHT, T, U, H, H // J, *strides_of(q_BHTD, k_BJUD, v_BJUD),
            scale * LOG2E, CAUSAL=causal, **settings)
    return out_BHTD, lse_BHT


@torch.library.custom_op("labkit::flash_attention", mutates_args=())
def _op(q_BHTD: Tensor, k_BJUD: Tensor, v_BJUD: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return launch_forward(dense_rows(q_BHTD), dense_rows(k_BJUD), dense_rows(v_BJUD), causal, scale)


@torch.library.custom_op("labkit::flash_attention_backward", mutates_args=())
def _backward_op(grad_out: Tensor, grad_lse: Tensor, q_BHTD: Tensor, k_BJUD: Tensor, v_BJUD: Tensor, out: Tensor,
                 lse: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(grad_out.contiguous(), grad_lse.contiguous(), dense_rows(q_BHTD), dense_rows(k_BJUD),
                           dense_rows(v_BJUD), out, lse, causal, scale)


@_op.register_fake
def _(q_BHTD, k_BJUD, v_BJUD, causal, scale):
    return q_BHTD.new_empty(q_BHTD.shape), q_BHTD.new_empty(q_BHTD.shape[:3], dtype=torch.float32)


@_backward_op.register_fake
def _(grad_out, grad_lse, q_BHTD, k_BJUD, v_BJUD, *arguments):
    return tuple(x.new_empty(x.shape) for x in (q_BHTD, k_BJUD, v_BJUD))


def _save(ctx, inputs, output):
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_out, grad_lse):
    return *_backward_op(grad_out, grad_lse, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None


_op.register_autograd(_backward, setup_context=_save)


def _check(q_BHTD: Tensor, k_BJUD: Tensor, v_BJUD: Tensor, scale: float | None) -> None:
    check_shape("q_BHTD", q_BHTD, (None, None, None, None), "[B, H, T, D]")
    check_shape("k_BJUD", k_BJUD, (q_BHTD.shape[0], None, None, q_BHTD.shape[3]), "[B, J, U, D]")
    check_shape("v_BJUD", v_BJUD, tuple(k_BJUD.shape), "the shape of k")
    check_float("q_BHTD", q_BHTD)
    check_devices(q_BHTD=q_BHTD, k_BJUD=k_BJUD, v_BJUD=v_BJUD)
    if scale is not None:
        check_finite("scale", scale)
    H, J, D = q_BHTD.shape[1], k_BJUD.shape[1], q_BHTD.shape[3]
    if not J or H % J:
        raise LabError(f"{H} query heads cannot share {J} key heads evenly.", "Use a number of heads that J divides.")
    if not 1 <= D <= 256:
        raise LabError(f"A head size of {D} does not fit on the chip.", "Use head sizes up to 256.")
    if len({x.dtype for x in (q_BHTD, k_BJUD, v_BJUD)}) > 1:
        raise LabError(f"q, k and v are {q_BHTD.dtype}, {k_BJUD.dtype} and {v_BJUD.dtype}.", "Give all one dtype.")
