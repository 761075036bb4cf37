"""The two kernels of pyramid_pool (lighthouse_pool.py), and their launches.

Forward: a program climbs from the tokens of ROWS coarsest windows to these windows, and writes every entry on the way.
Backward: a program takes ROWS windows of p tokens, which have the same ancestors and so the same gradient.
In both, the first programs of a position take the heads of q, the next those of k, the last those of v.
"""

import torch
from torch import Tensor

from labkit.kernels.language import tl, triton
from labkit.kernels.lighthouse_levels import Levels, tile_settings


@triton.jit
def _tokens(x, t, child, last, stride, K, P: tl.constexpr, MORE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
            BLOCK_K: tl.constexpr):
    """Sum of tokens t, t + 1, ... [ROWS], MORE of them, and their norms in the last MORE columns of [ROWS, CHUNK].

    Token t is child number `child` of its parent, which has P. All loads are asked for before the first norm.
    """
    k = tl.arange(0, BLOCK_K)[None, :]
    inside = (child < P) & (t < last)
    z = tl.load(x + t[:, None] * stride + k, mask=inside[:, None] & (k < K), other=0.0).to(tl.float32)
    if MORE > 1:
        total, norms = _tokens(x, t + 1, child + 1, last, stride, K, P, MORE - 1, ROWS, CHUNK, BLOCK_K)
    else:
        total, norms = tl.zeros([ROWS, BLOCK_K], tl.float32), tl.zeros([ROWS, CHUNK], tl.float32)
    column = tl.arange(0, CHUNK)[None, :]
    return z + total, tl.where(column == CHUNK - MORE, tl.sqrt(tl.sum(z * z, 1))[:, None], norms)


@triton.jit
def _family(x, score, i, c, last, stride, K, P: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
            BLOCK_K: tl.constexpr):
    """Sum and highest norm of CHUNK children, from c on, of entries i [ROWS] of level 1; writes the norms."""
    total, norms = _tokens(x, i * P + c, c, last, stride, K, P, CHUNK, ROWS, CHUNK, BLOCK_K)
    child = c + tl.arange(0, CHUNK)[None, :]
    t = i[:, None] * P + child
    if score is not None:
        tl.store(score + t, norms, mask=(child < P) & (t < last))
    return total, tl.max(norms, 1)


@triton.jit
def _entries(x, coarse, score, i, first, size, T, last, stride, row, K, P: tl.constexpr, LEVEL: tl.constexpr,
             ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and highest norm of entries i [ROWS] of LEVEL, which are written, after all that they sum up.

    The level has `size` entries, and its first one is number `first` of the pooled ones. Tokens end before `last`.
    """
    total = tl.zeros([ROWS, BLOCK_K], tl.float32)
    high = tl.zeros([ROWS], tl.float32)  # no norm is smaller
    for c in range(0, P, CHUNK if LEVEL == 1 else 1):
        if LEVEL == 1:
            part, norm = _family(x, score, i, c, last, stride, K, P, ROWS, CHUNK, BLOCK_K)
        else:
            part, norm = _entries(x, coarse, score, i * P + c, first - size * P, size * P, T, last, stride, row, K,
                                  P, LEVEL - 1, ROWS, CHUNK, BLOCK_K)
        total += part
        high = tl.maximum(high, norm)
    mean = total / P
    k = tl.arange(0, BLOCK_K)[None, :]
    out = coarse + (first + i)[:, None] * row + k
    tl.store(out, mean.to(coarse.dtype.element_ty), mask=(i < size)[:, None] & (k < K))
    if score is not None:
        tl.store(score + T + first + i, high, mask=i < size)
    return mean, high


@triton.jit
def _forward_kernel(q, k, v, q_coarse, k_coarse, v_coarse, q_score, k_score, T, whole, M, size, H, J, K, tiles,
                    qb, qt, qh, kb, kt, kh, vb, vt, vh, heads, P: tl.constexpr, LEVELS: tl.constexpr,
                    ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr):
    """ROWS coarsest windows of one head of q, k or v. Stride names: tensor and dimension.

    Programs of neighbouring heads run together: at one position their rows lie side by side.
    """
    b = (tl.program_id(0) // heads // tiles).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    i = (tl.program_id(0) // heads % tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # i * stride passes 2^31
    first = M - size
    if h < H:
        _entries(q + b * qb + h * qh, q_coarse + (b * M * H + h) * K, q_score + (b * H + h) * (T + M), i, first, size,
                 T, T, qt, H * K, K, P, LEVELS - 1, ROWS, CHUNK, BLOCK_K)
    elif h < H + J:
        j = h - H
        _entries(k + b * kb + j * kh, k_coarse + (b * M * J + j) * K, k_score + (b * J + j) * (T + M), i, first, size,
                 T, T, kt, J * K, K, P, LEVELS - 1, ROWS, CHUNK, BLOCK_K)
    else:
        j = h - H - J
        _entries(v + b * vb + j * vh, v_coarse + (b * M * J + j) * K, None, i, first, size, T, whole, vt, J * K, K,
                 P, LEVELS - 1, ROWS, CHUNK, BLOCK_K)


@triton.jit
def _hand_down(g, dx, i, T, M, size, row, K, P: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr,
               BLOCK_K: tl.constexpr):
    """The p tokens of each entry i [ROWS] of level 1 get 1/p of what the level has, 1/p^2 of the next, and so on."""
    k = tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros([ROWS, BLOCK_K], tl.float32)
    first, n, share = 0, size, 1.0
    above = i
    for _ in tl.static_range(1, LEVELS):
        share /= P
        mask = (above < n)[:, None] & (k < K)
        total += share * tl.load(g + (first + above)[:, None] * row + k, mask=mask, other=0.0).to(tl.float32)
        first += n
        n = n // P
        above = above // P
    for c in range(P):
        t = i * P + c
        tl.store(dx + t[:, None] * row + k, total.to(dx.dtype.element_ty), mask=(t < T)[:, None] & (k < K))


@triton.jit
def _backward_kernel(q_grad, k_grad, v_grad, dq, dk, dv, T, M, size, H, J, K, tiles, heads, P: tl.constexpr,
                     LEVELS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """ROWS windows of p tokens of one head of q, k or v; the tail's tokens, which no level knows, get 0."""
    b = (tl.program_id(0) // heads // tiles).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    i = (tl.program_id(0) // heads % tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    if h < H:
        _hand_down(q_grad + (b * M * H + h) * K, dq + (b * T * H + h) * K, i, T, M, size, H * K, K, P, LEVELS, ROWS,
                   BLOCK_K)
    elif h < H + J:
        at = h - H
        _hand_down(k_grad + (b * M * J + at) * K, dk + (b * T * J + at) * K, i, T, M, size, J * K, K, P, LEVELS, ROWS,
                   BLOCK_K)
    else:
        at = h - H - J
        _hand_down(v_grad + (b * M * J + at) * K, dv + (b * T * J + at) * K, i, T, M, size, J * K, K, P, LEVELS, ROWS,
                   BLOCK_K)


def launch_forward(q_BTHK: Tensor, k_BTJK: Tensor, v_BTJK: Tensor, p: int, levels: int) -> tuple[Tensor, ...]:
    """Pooled entries of q, k and v, [B, M, heads, K], and the scores of q and k, [B, heads, N]."""
    (B, T, H, K), J, place = q_BTHK.shape, k_BTJK.shape[2], Levels(q_BTHK.shape[1], p, levels)
    N = place.starts[-1]
    coarse = [x.new_empty(B, N - T, x.shape[2], K) for x in (q_BTHK, k_BTJK, v_BTJK)]
    scores = [x.new_empty(B, x.shape[2], N, dtype=torch.float32) for x in (q_BTHK, k_BTJK)]
    if B and T:
        P, L = place.in_kernel
        settings = {"CHUNK": min(4, triton.next_power_of_2(P))} | tile_settings(K, q_BTHK.device)
        tiles, heads = -(-T // (P ** (L - 1) * settings["ROWS"])), H + J + (J if N > T else 0)
        strides = (stride for x in (q_BTHK, k_BTJK, v_BTJK) for stride in x.stride()[:3])
        _forward_kernel[(tiles * heads * B,)](
            q_BTHK, k_BTJK, v_BTJK, *coarse, *scores, T, place.whole, N - T, place.sizes[-1] if N > T else 0, H, J, K,
            tiles, *strides, heads, P=P, LEVELS=L, **settings)
    return *coarse, *scores


def launch_backward(grads: tuple[Tensor, Tensor, Tensor], T: int, p: int, levels: int) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, [B, T, heads, K], from those of their pooled entries (contiguous)."""
    (B, M, H, K), J, place = grads[0].shape, grads[1].shape[2], Levels(T, p, levels)
    outs = [g.new_empty(B, T, g.shape[2], K) for g in grads]
    if B and T:
        P, L = place.in_kernel
        settings = tile_settings(K, grads[0].device)
        tiles, heads = -(-T // (P * settings["ROWS"])), H + 2 * J
        _backward_kernel[(tiles * heads * B,)](*grads, *outs, T, M, place.sizes[1] if M else 0, H, J, K, tiles, heads,
                                               P=P, LEVELS=L, **settings)
    return tuple(outs)
