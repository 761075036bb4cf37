"""The gradient of a table whose rows were gathered: sum what belongs to each row, in a fixed order, without atomics.

    out[v] = sum over pairs j with key_j = v of  weight_j * rows[source_j]

The pairs are sorted by key (a stable sort), so that each key's pairs lie side by side: a segment. One program starts at
each sorted position and ends at once unless a segment starts there; it adds the segment's rows in fp32, in sorted
order, and rounds once. A token that stands in every row of a batch has a long segment; to keep one program from adding
it all alone, segments are cut at every CHUNK-th position, the parts are written in fp32, and a second launch adds the
parts of a key in order. So two runs give the same bits, and no length is ever read back by the host.

Bytes, with P pairs, D columns, U distinct keys and e bytes an element: P D e + about (60 P) read, U D e written after
V D e of zeros; a cut segment adds 8 D for each part (written and read in fp32, at most two parts a chunk).
Memory: the result, 8 D ceil(P / CHUNK) for the parts, about 40 P for the sort.

Source: the sorted backward of embedding layers (PyTorch's embedding_dense_backward); the cut at fixed positions is ours.
"""

import torch
from torch import Tensor

from labkit.kernels.configs import Row, settings_for
from labkit.kernels.language import tl, triton

SETTINGS = [
    Row("any", 256, {"BLOCK_P": 16, "BLOCK_D": 256, "CHUNK": 256, "num_warps": 4}),
    Row("any", float("inf"), {"BLOCK_P": 8, "BLOCK_D": 1024, "CHUNK": 256, "num_warps": 8}),
]


@triton.jit
def _segment_kernel(rows, key, source, weight, out, part, P, D, stride_rows, BLOCK_P: tl.constexpr,
                    BLOCK_D: tl.constexpr, CHUNK: tl.constexpr):
    """One program a sorted position; it works where a segment, or the part of one that lies in this chunk, starts."""
    first = tl.program_id(0)
    chunk = first // CHUNK
    mine = tl.load(key + first)
    starts = tl.load(key + first - 1, mask=first > 0, other=-1) != mine
    if (mine < 0) | ((first % CHUNK != 0) & (not starts)):
        return
    limit = tl.minimum(P, (chunk + 1) * CHUNK)
    end = first + 1
    while tl.load(key + end, mask=end < limit, other=-1) == mine:
        end += 1
    ends = tl.load(key + end, mask=end < P, other=-1) != mine

    j = tl.arange(0, BLOCK_P)
    mine = mine.to(tl.int64)
    slot = chunk.to(tl.int64) * 2 + tl.where(starts, 1, 0)
    for left in range(0, D, BLOCK_D):
        d = left + tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        for at in range(first, end, BLOCK_P):
            valid = at + j < end
            row = tl.load(source + at + j, mask=valid, other=0).to(tl.int64)
            w = tl.load(weight + at + j, mask=valid, other=0.0)
            x = tl.load(rows + row[:, None] * stride_rows + d[None, :], mask=valid[:, None] & (d < D)[None, :],
                        other=0.0).to(tl.float32)
            total += w[:, None] * x
        column = tl.sum(total, 0)
        if starts & ends:
            tl.store(out + mine * D + d, column.to(out.dtype.element_ty), mask=d < D)
        else:
            tl.store(part + slot * D + d, column, mask=d < D)


@triton.jit
def _join_kernel(key, part, out, P, D, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr):
    """One program a chunk and block of D: if a segment starts in this chunk and leaves it, add its parts in order."""
    chunk = tl.program_id(0)
    first = chunk * CHUNK
    next_first = first + CHUNK
    mine = tl.load(key + next_first - 1, mask=next_first < P, other=-1)
    leaves = tl.load(key + next_first, mask=next_first < P, other=-1) == mine
    came_in = tl.load(key + first - 1, mask=first > 0, other=-1) == mine
    if (mine < 0) | (not leaves) | came_in:
        return
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    slot = chunk.to(tl.int64) * 2
    total = tl.load(part + (slot + 1) * D + d, mask=d < D, other=0.0)
    while leaves:
        slot += 2
        total += tl.load(part + slot * D + d, mask=d < D, other=0.0)
        next_first += CHUNK
        leaves = tl.load(key + next_first, mask=next_first < P, other=-1) == mine
    tl.store(out + mine.to(tl.int64) * D + d, total.to(out.dtype.element_ty), mask=d < D)


def sum_by_key(rows_ND: Tensor, key_NK: Tensor, weight_NK: Tensor, V: int, dtype: torch.dtype) -> Tensor:
    """out [V, D]: row n goes, times weight[n, k], to place key[n, k]; a key of -1 goes nowhere.

    `weight_NK` is fp32. V and N below 2^31.
    """
    D, (N, K) = rows_ND.shape[1], key_NK.shape
    out_VD = torch.zeros(V, D, dtype=dtype, device=rows_ND.device)
    if not N * K:
        return out_VD
    key_P, order_P = key_NK.flatten().int().sort(stable=True)
    launch_segment_sum(rows_ND, key_P, (order_P // K).int(), weight_NK.flatten()[order_P], out_VD)
    return out_VD


def launch_segment_sum(rows_ND: Tensor, key_P: Tensor, source_P: Tensor, weight_P: Tensor, out_VD: Tensor) -> None:
    """Add the sorted pairs into `out_VD`, which holds zeros."""
    (P,), D = key_P.shape, rows_ND.shape[1]
    settings = settings_for("segment_sum", SETTINGS, D, rows_ND.device)
    CHUNK, BLOCK_D = settings["CHUNK"], settings["BLOCK_D"]
    chunks = -(-P // CHUNK)
    part = torch.empty(chunks, 2, D, dtype=torch.float32, device=rows_ND.device)
    _segment_kernel[(P,)](rows_ND, key_P, source_P, weight_P, out_VD, part, P, D, rows_ND.stride(0), **settings)
    if chunks > 1:
        _join_kernel[(chunks - 1, -(-D // BLOCK_D))](key_P, part, out_VD, P, D, BLOCK_D=BLOCK_D, CHUNK=CHUNK,
                                                     num_warps=settings["num_warps"])
