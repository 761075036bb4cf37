"""K9, second part. The chosen entries of queries, keys and values, in one launch.

    y_s = base_n (n < T),  coarse_(n - T) (n >= T),  0 (n = -1)        n = index_s, for q, k and v alike

Base and pyramid stay where they are: a row's number says which of the two it is in, and nothing is concatenated.
Keys and values may have fewer heads: head h of the choice takes their head h // (H / J).
No entry is chosen twice in a head. So the gradient is a look-up too, by the inverse of the index: each row of base and
pyramid takes what its one place in the choice has, or 0. Where query heads share a key head, their up to H / J rows are
added in fp32, in the order of the heads. Each element is written once: no zeros to fill in first, no atomics, and equal
bits in every run.

Bytes, with e an element: forward 6 S H K e and 8 S H of the index; backward 3 S H K e read, (H + 2 J) N K e written and
8 N H of the inverse, which torch makes first. FLOPs none, and 2 S H K in the backward.
Three torch.gather read and write the same, after a concatenation that copies everything; their gradients fill zeros and
add with atomics.

Source: arXiv 2605.06554, section 3.
"""

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import check_devices, check_float, check_kernel_dtype, check_shape
from labkit.kernels.cost import Cost
from labkit.kernels.dispatch import choose
from labkit.kernels.language import tl, triton
from labkit.kernels.layout import dense_rows
from labkit.kernels.lighthouse_levels import TakeRows, check_heads, check_places, inverted, tile_settings

NAMES = ("q_BTHK", "k_BTHK", "v_BTHK", "q_BMHK", "k_BMHK", "v_BMHK")
Three = tuple[Tensor, Tensor, Tensor]


def gather_select(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, pyramid: tuple[Tensor, ...], index_BHS: Tensor, *,
                  impl: str = "auto", trusted: bool = False) -> Three:
    """The chosen entries of queries, keys and values, each [B, H, S, K].

    Args:
        q_BTHK, k_BTHK, v_BTHK: as for pyramid_pool; k and v may have fewer heads.
        pyramid: its first three are the pooled entries of q, k and v, [B, M, heads, K].
        index_BHS: int32 or int64 entries 0 ... T + M - 1, none twice in a head; -1 gives a row of 0.
        trusted: the entries are known to be such; on a CPU looking at them takes a tenth of the time.
    Raises:
        LabError: shapes, devices, dtypes or entries that do not fit. On a GPU an entry that is none makes its row NaN.
    """
    tensors = (q_BTHK, k_BTHK, v_BTHK, *pyramid[:3])
    _check(tensors, index_BHS)
    if not trusted:
        check_places("index_BHS", index_BHS, q_BTHK.shape[1] + tensors[3].shape[1])
    if not choose(impl, q_BTHK):
        return reference(*tensors, index_BHS)
    for name, x in zip(NAMES, tensors[:3], strict=False):
        check_kernel_dtype(name, x)
    return _op(*tensors, index_BHS)


def reference(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, q_BMHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor,
              index_BHS: Tensor) -> Three:
    """The same in plain torch: concatenated, and looked up row by row."""
    H, pairs = index_BHS.shape[1], ((q_BTHK, q_BMHK), (k_BTHK, k_BMHK), (v_BTHK, v_BMHK))
    whole = [torch.cat(parts, 1).transpose(1, 2) for parts in pairs]
    whole = [x if x.shape[1] == H else x.repeat_interleave(H // x.shape[1], 1) for x in whole]  # even once is a copy
    return tuple(TakeRows.apply(x_BHNK, index_BHS) for x_BHNK in whole)


def forward_cost(B: int, H: int, S: int, K: int, element: int = 2) -> Cost:
    """S rows of q, k and v in and out, and the index."""
    return Cost(B * H * S * (3 * K * element + 8), B * H * S * 3 * K * element, 0)


def backward_cost(B: int, H: int, J: int, S: int, N: int, K: int, element: int = 2) -> Cost:
    """S rows of three gradients and the inverse in, the gradients of all N entries out."""
    return Cost(B * H * (S * 3 * K * element + 8 * N), B * N * (H + 2 * J) * K * element, 2 * B * H * S * K)


@triton.jit
def _row(base, coarse, n, T, N, stride, row, k, K):
    """Rows n [ROWS, 1] of base and pyramid: of the two loads at most one reads."""
    near = (n >= 0) & (n < T)
    far = (n >= T) & (n < N)
    x = tl.load(base + n * stride + k, mask=near & (k < K), other=0.0).to(tl.float32)
    y = tl.load(coarse + (n - T) * row + k, mask=far & (k < K), other=0.0).to(tl.float32)
    return tl.where(near | far | (n == -1), tl.where(near, x, y), float("nan"))


@triton.jit
def _forward_kernel(q, k, v, q_coarse, k_coarse, v_coarse, index, q_out, k_out, v_out, T, N, S, H, J, K, tiles,
                    qb, qt, qh, kb, kt, kh, vb, vt, vh, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """ROWS places of the choice of one head. Stride names: tensor and dimension."""
    b = (tl.program_id(0) // H // tiles).to(tl.int64)  # 64 bits, and so has every offset that b is in
    h = (tl.program_id(0) % H).to(tl.int64)
    j = h // (H // J)
    s = (tl.program_id(0) // H % tiles * ROWS + tl.arange(0, ROWS))[:, None]
    n = tl.load(index + (b * H + h) * S + s, mask=s < S, other=-1).to(tl.int64)
    c = tl.arange(0, BLOCK_K)[None, :]
    out = ((b * H + h) * S + s) * K + c
    mask = (s < S) & (c < K)
    M = N - T
    x = _row(q + b * qb + h * qh, q_coarse + (b * M * H + h) * K, n, T, N, qt, H * K, c, K)
    y = _row(k + b * kb + j * kh, k_coarse + (b * M * J + j) * K, n, T, N, kt, J * K, c, K)
    z = _row(v + b * vb + j * vh, v_coarse + (b * M * J + j) * K, n, T, N, vt, J * K, c, K)
    tl.store(q_out + out, x.to(q_out.dtype.element_ty), mask=mask)  # after all loads, none of which may pass a store
    tl.store(k_out + out, y.to(k_out.dtype.element_ty), mask=mask)
    tl.store(v_out + out, z.to(v_out.dtype.element_ty), mask=mask)


@triton.jit
def _give(base, coarse, x, n, b, h, heads, T, N, k, K):
    """Row n of a gradient, to base or pyramid [B, T or M, heads, K]."""
    near = (n < T) & (k < K)
    far = (n >= T) & (n < N) & (k < K)
    tl.store(base + ((b * T + n) * heads + h) * K + k, x.to(base.dtype.element_ty), mask=near)
    tl.store(coarse + ((b * (N - T) + n - T) * heads + h) * K + k, x.to(coarse.dtype.element_ty), mask=far)


@triton.jit
def _backward_kernel(q_grad, k_grad, v_grad, inverse, dq, dk, dv, dq_coarse, dk_coarse, dv_coarse, T, N, S, H, J, K,
                     tiles, qb, qh, qs, kb, kh, ks, vb, vh, vs, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """ROWS entries of one key head, and of the query heads that share it."""
    b = (tl.program_id(0) // J // tiles).to(tl.int64)
    j = (tl.program_id(0) % J).to(tl.int64)
    n = (tl.program_id(0) // J % tiles * ROWS + tl.arange(0, ROWS))[:, None]
    c = tl.arange(0, BLOCK_K)[None, :]
    k_total = tl.zeros([ROWS, BLOCK_K], tl.float32)
    v_total = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for member in range(0, H // J):
        h = j * (H // J) + member
        s = tl.load(inverse + (b * H + h) * N + n, mask=n < N, other=-1).to(tl.int64)
        mask = (s >= 0) & (c < K)
        x = tl.load(q_grad + b * qb + h * qh + s * qs + c, mask=mask, other=0.0).to(tl.float32)
        k_total += tl.load(k_grad + b * kb + h * kh + s * ks + c, mask=mask, other=0.0).to(tl.float32)
        v_total += tl.load(v_grad + b * vb + h * vh + s * vs + c, mask=mask, other=0.0).to(tl.float32)
        _give(dq, dq_coarse, x, n, b, h, H, T, N, c, K)
    _give(dk, dk_coarse, k_total, n, b, j, J, T, N, c, K)
    _give(dv, dv_coarse, v_total, n, b, j, J, T, N, c, K)


def launch_forward(q_BTHK: Tensor, k_BTJK: Tensor, v_BTJK: Tensor, q_BMHK: Tensor, k_BMJK: Tensor, v_BMJK: Tensor,
                   index_BHS: Tensor) -> Three:
    """Rows of q, k and v, [B, H, S, K]; pyramid and index are contiguous."""
    (B, T, H, K), J, S = q_BTHK.shape, k_BTJK.shape[2], index_BHS.shape[2]
    base = (q_BTHK, k_BTJK, v_BTJK)
    outs = [x.new_empty(B, H, S, K) for x in base]
    if outs[0].numel():
        settings = tile_settings(K, q_BTHK.device)
        tiles = -(-S // settings["ROWS"])
        _forward_kernel[(tiles * H * B,)](
            *base, q_BMHK, k_BMJK, v_BMJK, index_BHS, *outs, T, T + q_BMHK.shape[1], S, H, J, K, tiles,
            *(stride for x in base for stride in x.stride()[:3]), **settings)
    return tuple(outs)


def launch_backward(grads: Three, inverse_BHN: Tensor, T: int, J: int) -> tuple[Tensor, ...]:
    """Gradients of q, k, v [B, T, heads, K] and of their pooled entries [B, M, heads, K]."""
    (B, H, S, K), N = grads[0].shape, inverse_BHN.shape[2]
    outs = [g.new_empty(B, rows, heads, K) for rows in (T, N - T)
            for g, heads in zip(grads, (H, J, J), strict=True)]
    if B and N and K:  # any of the six may be empty for itself
        settings = tile_settings(K, inverse_BHN.device)
        tiles = -(-N // settings["ROWS"])
        _backward_kernel[(tiles * J * B,)](*grads, inverse_BHN, *outs, T, N, S, H, J, K, tiles,
                                           *(stride for g in grads for stride in g.stride()[:3]), **settings)
    return tuple(outs)


@torch.library.custom_op("labkit::gather_select", mutates_args=())
def _op(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, q_BMHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor,
        index_BHS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(dense_rows(q_BTHK), dense_rows(k_BTHK), dense_rows(v_BTHK), q_BMHK.contiguous(),
                          k_BMHK.contiguous(), v_BMHK.contiguous(), index_BHS.contiguous())


@torch.library.custom_op("labkit::gather_select_backward", mutates_args=())
def _backward_op(q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, index_BHS: Tensor, T: int, M: int,
                 J: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = tuple(dense_rows(g) for g in (q_grad, k_grad, v_grad))
    return launch_backward(grads, inverted(index_BHS, T + M), T, J)


@_op.register_fake
def _(q_BTHK, k_BTHK, v_BTHK, q_BMHK, k_BMHK, v_BMHK, index_BHS):
    return tuple(x.new_empty(*index_BHS.shape, x.shape[3]) for x in (q_BTHK, k_BTHK, v_BTHK))


@_backward_op.register_fake
def _(q_grad, k_grad, v_grad, index_BHS, T, M, J):
    B, H, _, K = q_grad.shape
    return tuple(g.new_empty(B, rows, heads, K) for rows in (T, M)
                 for g, heads in ((q_grad, H), (k_grad, J), (v_grad, J)))


def _save(ctx, inputs, output):
    q_BTHK, k_BTHK, _, q_BMHK, _, _, index_BHS = inputs
    ctx.sizes = q_BTHK.shape[1], q_BMHK.shape[1], k_BTHK.shape[2]
    ctx.save_for_backward(index_BHS)


def _backward(ctx, q_grad, k_grad, v_grad):
    return *_backward_op(q_grad, k_grad, v_grad, *ctx.saved_tensors, *ctx.sizes), None


_op.register_autograd(_backward, setup_context=_save)


def _check(tensors: tuple[Tensor, ...], index_BHS: Tensor) -> None:
    check_heads(*tensors[:3])
    B, _, H, K = tensors[0].shape
    M = tensors[3].shape[1] if tensors[3].ndim == 4 else None
    named = dict(zip(NAMES, tensors, strict=True))
    for name, base, pooled, coarse in zip(NAMES[:3], tensors[:3], NAMES[3:], tensors[3:], strict=True):
        check_shape(pooled, coarse, (B, M, base.shape[2], K), "[B, M, heads, K]")
        check_float(name, base)
        if coarse.dtype != base.dtype:
            raise LabError(f"{name} is {base.dtype} and {pooled} {coarse.dtype}.", "Give both one dtype.")
    check_shape("index_BHS", index_BHS, (B, H, None), "[B, H, S]")
    check_devices(**named, index_BHS=index_BHS)
