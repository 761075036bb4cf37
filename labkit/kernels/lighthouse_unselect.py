"""K9, third part. Outputs of chosen entries, summed at the positions that they stand for: a scatter as a gather.

    y_n = sum over l of out[inverse(l, i)]       i = (n - f + 1) // f, f = p^l; nothing where that entry was not chosen
    dout_s = sum of dy_n for n in [i f + f - 1, i f + 2 f - 2], n < T        s stands for entry i of level l

An entry reaches positions from the last token that it sums up, so that none hears of a later one, and as many as it
has tokens. Seen from position n, that is one entry a level: with m = n + 1, the entry before the window of m. So each
position adds at most L rows in a fixed order, in fp32: no zeros to fill in first, no atomics, equal bits in every run.
The gradient is the sum of a contiguous range, again without atomics.

Bytes, with e an element: forward S H K e read, T H K e written, 8 N H of the inverse; rows of pooled entries are read
again by each of their windows of p positions, from the cache. Backward T H K e read (each position once a level whose
entry was chosen; again the cache), S H K e written, and 8 S H of the index, which torch makes of the inverse first.
FLOPs about L T H K. The official code fills T H K e with zeros and adds to it with atomics in the outputs' dtype,
whose order, and so whose result, differs from run to run.

Source: arXiv 2605.06554, section 3.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.kernels.checks import check_devices, check_float, check_kernel_dtype, check_shape
from labkit.kernels.cost import Cost
from labkit.kernels.dispatch import choose
from labkit.kernels.language import tl, triton
from labkit.kernels.layout import dense_rows
from labkit.kernels.lighthouse_levels import (
    Levels,
    TakeRows,
    cascade_sizes,
    check_levels,
    check_places,
    inverted,
    tile_settings,
)


def unselect(out_BHSK: Tensor, inverse_BHN: Tensor, T: int, p: int, levels: int, *, impl: str = "auto",
             trusted: bool = False) -> Tensor:
    """Outputs of chosen entries summed at the positions that they stand for, [B, T, H, K], in their dtype.

    Args:
        out_BHSK: fp16, bf16 or fp32 (float64 with the reference); any strides.
        inverse_BHN: int32 or int64, the row of each entry among the S, none twice in a head; -1 where it has none.
        T, p, levels: the pyramid's. A position without a source gets 0.
        trusted: the rows are known to be such, and are not looked at.
    Raises:
        LabError: shapes, devices, dtypes or rows that do not fit. On a GPU a row that is none makes its positions NaN.
    """
    check_levels(p, levels)
    check_shape("out_BHSK", out_BHSK, (None, None, None, None), "[B, H, S, K]")
    check_shape("inverse_BHN", inverse_BHN, (*out_BHSK.shape[:2], Levels(T, p, levels).starts[-1]), "[B, H, N]")
    check_float("out_BHSK", out_BHSK)
    check_devices(out_BHSK=out_BHSK, inverse_BHN=inverse_BHN)
    if not trusted:
        check_places("inverse_BHN", inverse_BHN, out_BHSK.shape[2])
    if not choose(impl, out_BHSK):
        return reference(out_BHSK, inverse_BHN, T, p, levels)
    check_kernel_dtype("out_BHSK", out_BHSK)
    return _op(out_BHSK, inverse_BHN, T, p, levels)


def reference(out_BHSK: Tensor, inverse_BHN: Tensor, T: int, p: int, levels: int) -> Tensor:
    """The same in plain torch: each level is a repeat and a shift."""
    spread_BHNK = TakeRows.apply(out_BHSK, inverse_BHN).to(torch.promote_types(out_BHSK.dtype, torch.float32))
    total_BHTK = spread_BHNK[:, :, :T]
    for level, (start, end) in enumerate(pairwise(Levels(T, p, levels).starts)):
        if level:
            f = p**level
            wide_BHTK = spread_BHNK[:, :, start:end].repeat_interleave(f, 2)
            total_BHTK = total_BHTK + F.pad(wide_BHTK, (0, 0, f - 1, T))[:, :, :T]
    return total_BHTK.to(out_BHSK.dtype).transpose(1, 2)


def forward_cost(B: int, H: int, T: int, S: int, K: int, p: int, levels: int, element: int = 2, *,
                 sizes: list[int] | None = None) -> Cost:
    """`sizes`: chosen entries of each level, by default as the cascade chooses. A pooled one, and the inverse of one,
    is read by p^(l-1) windows, and from memory once."""
    place = Levels(T, p, levels)
    sizes, above = sizes or cascade_sizes(place, S), place.count - 1 if place.whole else 0
    rows = sizes[0] + sum(size * p ** (level - 1) for level, size in enumerate(sizes) if level)
    windows = place.whole // p * above
    read = B * H * (rows * K * element + 8 * (T + windows))
    cached = B * H * ((rows - sum(sizes)) * K * element + 8 * (T + windows - place.starts[-1]))
    return Cost(read, B * H * T * K * element, B * H * T * K * levels, cached)


def backward_cost(B: int, H: int, T: int, S: int, K: int, p: int, levels: int, element: int = 2, *,
                  sizes: list[int] | None = None) -> Cost:
    """`sizes` as in the forward: an entry of level l reads p^l positions, the last one fewer where T ends before."""
    place = Levels(T, p, levels)
    sizes = sizes or cascade_sizes(place, S)
    reached = sum(min(size * p**level, T - p**level + 1) for level, size in enumerate(sizes) if size)
    once = B * H * K * element
    return Cost(once * reached + 8 * B * H * S, once * S, B * H * K * reached, once * max(0, reached - T))


@triton.jit
def _outputs(out, row, S, stride, k, K):
    """Rows of out; `row` has a last dimension of 1, and -1 is a row of zeros."""
    inside = (row >= 0) & (row < S)
    x = tl.load(out + row * stride + k, mask=inside & (k < K), other=0.0).to(tl.float32)
    return tl.where(inside | (row == -1), x, float("nan"))


@triton.jit
def _forward_kernel(out, inverse, y, T, N, S, H, K, size, tiles, ob, oh, os, P: tl.constexpr, LEVELS: tl.constexpr,
                    ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr):
    """ROWS windows of p positions m = n + 1 of one head: they share their sources in all pooled levels."""
    b = (tl.program_id(0) // H // tiles).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)  # 64 bits, and so has every offset that b or h is in
    w = tl.program_id(0) // H % tiles * ROWS + tl.arange(0, ROWS)
    out += b * ob + h * oh
    inverse += (b * H + h) * N
    k = tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros([ROWS, BLOCK_K], tl.float32)
    window, first, n = w[:, None], T, size
    for _ in tl.static_range(1, LEVELS):
        i = window - 1
        source = tl.load(inverse + first + i, mask=(i >= 0) & (i < n), other=-1).to(tl.int64)
        total += _outputs(out, source, S, os, k, K)
        window, first, n = window // P, first + n, n // P
    for c in range(0, P, CHUNK):
        child = c + tl.arange(0, CHUNK)[None, :]
        t = (w[:, None] * P + child - 1)[:, :, None]
        inside = (child < P)[:, :, None] & (t >= 0) & (t < T)
        row = tl.load(inverse + t, mask=inside, other=-1).to(tl.int64)
        x = total[:, None, :] + _outputs(out, row, S, os, k[None, :, :], K)
        tl.store(y + ((b * T + t) * H + h) * K + k[None, :, :], x.to(y.dtype.element_ty),
                 mask=inside & (k[None, :, :] < K))


@triton.jit
def _backward_kernel(g, index, dout, T, S, H, K, size, tiles, gb, gt, gh, P: tl.constexpr, LEVELS: tl.constexpr,
                     ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """ROWS rows of dout of one head: each the sum of its entry's positions, first to last."""
    b = (tl.program_id(0) // H // tiles).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    s = (tl.program_id(0) // H % tiles * ROWS + tl.arange(0, ROWS))[:, None]
    entry = tl.load(index + (b * H + h) * S + s, mask=s < S, other=-1).to(tl.int64)
    start = entry
    length = tl.where(entry >= 0, 1, 0)
    first, n, f = T, size, 1
    for _ in tl.static_range(1, LEVELS):
        f *= P
        start = tl.where(entry >= first, (entry - first) * f + f - 1, start)
        length = tl.where(entry >= first, f, length)
        first, n = first + n, n // P
    stop = tl.minimum(start + length, T)  # an entry that is none begins behind it
    k = tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for step in tl.range(0, tl.max(length), loop_unroll_factor=4):  # four positions on their way at a time
        t = start + step
        total += tl.load(g + b * gb + h * gh + t * gt + k, mask=(t < stop) & (k < K), other=0.0).to(tl.float32)
    tl.store(dout + ((b * H + h) * S + s) * K + k, total.to(dout.dtype.element_ty), mask=(s < S) & (k < K))


def launch_forward(out_BHSK: Tensor, inverse_BHN: Tensor, T: int, p: int, levels: int) -> Tensor:
    """y [B, T, H, K]; the inverse is contiguous."""
    (B, H, S, K), N, place = out_BHSK.shape, inverse_BHN.shape[2], Levels(T, p, levels)
    y_BTHK = out_BHSK.new_empty(B, T, H, K)
    if y_BTHK.numel():
        P, L = place.in_kernel
        settings = {"CHUNK": min(4, triton.next_power_of_2(P))} | tile_settings(K, out_BHSK.device)
        tiles = -(-(T + 1) // (P * settings["ROWS"]))  # m goes from 1 to T, and windows begin at 0
        _forward_kernel[(tiles * H * B,)](out_BHSK, inverse_BHN, y_BTHK, T, N, S, H, K, place.sizes[1] if N > T else 0,
                                          tiles, *out_BHSK.stride()[:3], P=P, LEVELS=L, **settings)
    return y_BTHK


def launch_backward(grad_BTHK: Tensor, index_BHS: Tensor, p: int, levels: int) -> Tensor:
    """The gradient of the outputs, [B, H, S, K]; the index, which is contiguous, names the entry of each row."""
    (B, T, H, K), S, place = grad_BTHK.shape, index_BHS.shape[2], Levels(grad_BTHK.shape[1], p, levels)
    dout_BHSK = grad_BTHK.new_empty(B, H, S, K)
    if dout_BHSK.numel():
        P, L = place.in_kernel
        settings = tile_settings(K, grad_BTHK.device)
        tiles = -(-S // settings["ROWS"])
        size = place.sizes[1] if place.starts[-1] > T else 0
        _backward_kernel[(tiles * H * B,)](grad_BTHK, index_BHS, dout_BHSK, T, S, H, K, size, tiles,
                                           *grad_BTHK.stride()[:3], P=P, LEVELS=L, **settings)
    return dout_BHSK


@torch.library.custom_op("labkit::unselect", mutates_args=())
def _op(out_BHSK: Tensor, inverse_BHN: Tensor, T: int, p: int, levels: int) -> Tensor:
    return launch_forward(dense_rows(out_BHSK), inverse_BHN.contiguous(), T, p, levels)


@torch.library.custom_op("labkit::unselect_backward", mutates_args=())
def _backward_op(grad_BTHK: Tensor, inverse_BHN: Tensor, S: int, p: int, levels: int) -> Tensor:
    return launch_backward(dense_rows(grad_BTHK), inverted(inverse_BHN, S), p, levels)


@_op.register_fake
def _(out_BHSK, inverse_BHN, T, p, levels):
    B, H, _, K = out_BHSK.shape
    return out_BHSK.new_empty(B, T, H, K)


@_backward_op.register_fake
def _(grad_BTHK, inverse_BHN, S, p, levels):
    B, _, H, K = grad_BTHK.shape
    return grad_BTHK.new_empty(B, H, S, K)


def _save(ctx, inputs, output):
    out_BHSK, inverse_BHN, _, *ctx.pyramid = inputs
    ctx.S = out_BHSK.shape[2]
    ctx.save_for_backward(inverse_BHN)


def _backward(ctx, grad_BTHK):
    (inverse_BHN,) = ctx.saved_tensors
    return _backward_op(grad_BTHK, inverse_BHN, ctx.S, *ctx.pyramid), None, None, None, None


_op.register_autograd(_backward, setup_context=_save)
