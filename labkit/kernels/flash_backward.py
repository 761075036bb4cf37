"""K10's backward: P is made again from lse, one kernel walks over queries for dK and dV, another over keys for dQ.

The equations are in flash_attention.py. Neither kernel needs atomics, so two runs give the same bits; the price is that
P is made twice.
"""

import torch
from torch import Tensor

from labkit.kernels.configs import Row
from labkit.kernels.flash_tiles import LOG2E, flash_settings, store_tile, strides_of, tile
from labkit.kernels.language import tl, triton

# By head size, as large as compiles without spilling. sm_120 has 99 KB of shared memory a block where sm_90 has 227.
BACKWARD = [
    Row("sm_90", 64, {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}),
    Row("sm_90", 128, {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 1}),
    Row("sm_90", 256, {"BLOCK_Q": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 1}),
    Row("any", 64, {"BLOCK_Q": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}),
    Row("any", 128, {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 1}),
    # left to itself, the assembler aims at 128 registers here, and that of triton 3.6 spills 16 bytes
    Row("any", 256, {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1, "maxnreg": 160}),
]


@triton.jit
def _delta_kernel(out, grad_out, grad_lse, delta, rows, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """delta - dlse of each query: what dP is compared with."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o = tile(out, r, rows, D, D, BLOCK_D, True).to(tl.float32)
    g = tile(grad_out, r, rows, D, D, BLOCK_D, True).to(tl.float32)
    tl.store(delta + r, tl.sum(o * g, 1) - tl.load(grad_lse + r, mask=r < rows, other=0.0), mask=r < rows)


@triton.jit
def _probability(s, lse, i, j, T, U, CAUSAL: tl.constexpr):
    """P of a block, made again from its scores in base 2; 0 where a query may not look."""
    log_sum = tl.load(lse + i, mask=i < T, other=float("inf")) * 1.4426950408889634  # beyond T: P = 0
    p = tl.exp2(s - log_sum[:, None])
    seen = (j < U)[None, :]
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None] + U - T)
    return tl.where(seen, p, 0.0)


@triton.jit
def _key_gradient_kernel(q, k, v, grad_out, lse, delta, dk, dv, T, U, H, J, qb, qh, qt, kb, kh, kt, vb, vh, vt, scale,
                         base2, CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
                         BLOCK_K: tl.constexpr):
    """One program: BLOCK_K keys of one key head, over the queries of all heads that read it."""
    head = tl.program_id(0) // tl.cdiv(U, BLOCK_K)
    b = (head // J).to(tl.int64)
    h_k = (head % J).to(tl.int64)
    start_j = tl.program_id(0) % tl.cdiv(U, BLOCK_K) * BLOCK_K
    j = start_j + tl.arange(0, BLOCK_K)
    key = tile(k + b * kb + h_k * kh, j, U, kt, D, BLOCK_D, True)
    value = tile(v + b * vb + h_k * vh, j, U, vt, D, BLOCK_D, True)
    acc_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    first = tl.maximum(start_j - U + T, 0) // BLOCK_Q * BLOCK_Q if CAUSAL else 0
    for member in range(H // J):
        h = h_k * (H // J) + member
        row = (b * H + h) * T
        for start in range(first, T, BLOCK_Q):
            i = start + tl.arange(0, BLOCK_Q)
            query = tile(q + b * qb + h * qh, i, T, qt, D, BLOCK_D, True)
            grad = tile(grad_out + row * D, i, T, D, D, BLOCK_D, True)
            s = tl.dot(query, tl.trans(key), input_precision="ieee") * base2
            p = _probability(s, lse + row, i, j, T, U, CAUSAL)
            acc_v += tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision="ieee")
            dp = tl.dot(grad, tl.trans(value), input_precision="ieee")
            ds = p * (dp - tl.load(delta + row + i, mask=i < T, other=0.0)[:, None])
            acc_k += tl.dot(tl.trans(ds.to(query.dtype)), query, input_precision="ieee")
    place = head.to(tl.int64) * U * D
    store_tile(dk + place, acc_k * scale, j, U, D, D, BLOCK_D)
    store_tile(dv + place, acc_v, j, U, D, D, BLOCK_D)


@triton.jit
def _query_gradient_kernel(q, k, v, grad_out, lse, delta, dq, T, U, H, group, qb, qh, qt, kb, kh, kt, vb, vh, vt, scale,
                           base2, CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
                           BLOCK_K: tl.constexpr):
    """One program: BLOCK_Q queries of one head, over the keys that they see."""
    head = tl.program_id(0) // tl.cdiv(T, BLOCK_Q)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    start_i = tl.program_id(0) % tl.cdiv(T, BLOCK_Q) * BLOCK_Q
    i = start_i + tl.arange(0, BLOCK_Q)
    row = head.to(tl.int64) * T
    query = tile(q + b * qb + h * qh, i, T, qt, D, BLOCK_D, True)
    grad = tile(grad_out + row * D, i, T, D, D, BLOCK_D, True)
    compare = tl.load(delta + row + i, mask=i < T, other=0.0)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    stop = tl.minimum(start_i + BLOCK_Q + U - T, U) if CAUSAL else U
    for start in range(0, stop, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        key = tile(k + b * kb + h // group * kh, j, U, kt, D, BLOCK_D, True)
        value = tile(v + b * vb + h // group * vh, j, U, vt, D, BLOCK_D, True)
        s = tl.dot(query, tl.trans(key), input_precision="ieee") * base2
        p = _probability(s, lse + row, i, j, T, U, CAUSAL)
        ds = p * (tl.dot(grad, tl.trans(value), input_precision="ieee") - compare[:, None])
        acc += tl.dot(ds.to(key.dtype), key, input_precision="ieee")
    store_tile(dq + row * D, acc * scale, i, T, D, D, BLOCK_D)


def launch_backward(grad_out: Tensor, grad_lse: Tensor, q_BHTD: Tensor, k_BJUD: Tensor, v_BJUD: Tensor, out: Tensor,
                    lse: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    (B, H, T, D), (J, U) = q_BHTD.shape, k_BJUD.shape[1:3]
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) if not q_BHTD.numel() else
                  torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_BHTD, k_BJUD, v_BJUD))
    if q_BHTD.numel():
        settings = flash_settings(BACKWARD, "flash_attention_backward", D, q_BHTD.device)
        delta = torch.empty_like(lse)
        _delta_kernel[(-(-lse.numel() // 32),)](out, grad_out, grad_lse, delta, lse.numel(), D=D,
                                                BLOCK_D=settings["BLOCK_D"], ROWS=32)
        shared = (q_BHTD, k_BJUD, v_BJUD, grad_out, lse, delta)
        numbers = (*strides_of(q_BHTD, k_BJUD, v_BJUD), scale, scale * LOG2E)
        if U:
            _key_gradient_kernel[(-(-U // settings["BLOCK_K"]) * B * J,)](*shared, dk, dv, T, U, H, J, *numbers,
                                                                         CAUSAL=causal, **settings)
        _query_gradient_kernel[(-(-T // settings["BLOCK_Q"]) * B * H,)](*shared, dq, T, U, H, H // J, *numbers,
                                                                       CAUSAL=causal, **settings)
    return dq, dk, dv
