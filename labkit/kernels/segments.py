"""Sums over all places that name the same id, without atomics: how the gradient of a gathered table is made.

    out_v = sum over the places (n, s) with ids_ns = v of share_ns rows_n           zero where no place names v

The L = N S ids are sorted together with their places, so that those of one id are neighbours: a segment. One program
per id and block of D writes its row of `out` once, sum or zero, so nothing has to be filled with zeros first. Ids are
not counted equally often: a full stop may fill a third of the batch, and one program would then read for milliseconds.
So segments are cut at every 256th sorted place. What follows a cut is summed beforehand, by a program of its own, into
an fp32 partial row; the program of the id sums its places before the first cut and adds those rows.

The order of additions depends on the ids alone, so two runs give equal bits, which atomics do not. All sizes follow
from N, S and V: no step waits for the GPU to say how many different ids there are (as torch.unique would).
"""

import torch
from torch import Tensor

from labkit.kernels.configs import Row, settings_for
from labkit.kernels.cost import Cost
from labkit.kernels.language import tl, triton

SETTINGS = [  # PIECE: sorted places between two cuts
    Row("any", 1024, {"BLOCK_D": 1024, "PIECE": 256, "num_warps": 4}),
    Row("any", float("inf"), {"BLOCK_D": 4096, "PIECE": 256, "num_warps": 8}),
]


def segment_sums(ids_NS: Tensor, share_NS: Tensor, rows_ND: Tensor, V: int, dtype: torch.dtype) -> Tensor:
    """out_VD in `dtype`, summed in fp32. An id outside [0, V) is left out.

    Args:
        ids_NS: int32 or int64.
        share_NS: fp32, what each place's row is multiplied by.
        rows_ND: fp16, bf16 or fp32, last dimension contiguous.
    """
    D, device = rows_ND.shape[1], rows_ND.device
    out_VD = torch.empty(V, D, dtype=dtype, device=device)
    if not V or not D:
        return out_VD
    sorted_L, row_L, share_L, start_V1 = sort_places(ids_NS, share_NS, V)
    settings = settings_for("segments", SETTINGS, D, device)
    blocks, pieces = -(-D // settings["BLOCK_D"]), -(-len(sorted_L) // settings["PIECE"])
    partial_CD = torch.empty(pieces, D, dtype=torch.float32, device=device)  # row c is for what follows the c-th cut
    if pieces > 1:
        _partial_kernel[(pieces - 1, blocks)](sorted_L, start_V1, row_L, share_L, rows_ND, partial_CD, V, D,
                                              rows_ND.stride(0), **settings)
    _row_kernel[(V, blocks)](start_V1, row_L, share_L, rows_ND, partial_CD, out_VD, D, rows_ND.stride(0), **settings)
    return out_VD


def sort_places(ids_NS: Tensor, share_NS: Tensor, V: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids in order, the row n and the share of each, [L] all; and where every id's segment starts, [V + 1].

    Ids outside [0, V) become V and so end up behind the last segment. The sort is stable: equal ids stay in the order
    of their places.
    """
    ids_L = ids_NS.reshape(-1)
    ids_L = torch.where((ids_L < 0) | (ids_L >= V), V, ids_L)
    sorted_L, place_L = ids_L.sort(stable=True)
    row_L = (place_L // max(ids_NS.shape[1], 1)).int()  # here, as a division of int64 takes a kernel 70 instructions
    every_V1 = torch.arange(V + 1, dtype=sorted_L.dtype, device=sorted_L.device)
    return sorted_L, row_L, share_NS.reshape(-1)[place_L], torch.searchsorted(sorted_L, every_V1, out_int32=True)


def segment_cost(L: int, V: int, D: int, element: int = 2, *, cuts: int = 0, block: int = 4096,
                 piece: int = 256) -> Cost:
    """Bytes of the two kernels, for an id of 8 bytes. (Sorting adds about 100 L: little beside L D e.)

    Read: of each place its row, and its number and share (8) in each block of D; where each segment starts and ends
    (8) in each block. A cut that divides a segment (`cuts` of them, at most L / piece) writes and reads a partial row.
    Written: the whole table. Compulsory are only the N D e of distinct rows, not L D e.
    """
    blocks, extra = -(-D // block), cuts * 4 * D
    return Cost(L * (D * element + 8 * blocks) + (8 * V + 20 * (L // piece)) * blocks + extra, V * D * element + extra,
                2 * L * D)


@triton.jit
def _sum_places(first, last, row, share, rows, stride, d, D):
    """Sum of share * row over sorted places first to last, in that order."""
    total = tl.zeros(d.shape, tl.float32)
    for i in tl.range(first, last, loop_unroll_factor=4):  # four rows on their way at a time
        n = tl.load(row + i).to(tl.int64)  # n * stride passes 2^31 from 524,288 rows of 4096 on
        x = tl.load(rows + n * stride + d, mask=d < D, other=0.0).to(tl.float32)
        total += tl.load(share + i) * x
    return total


@triton.jit
def _partial_kernel(sorted_ids, start, row, share, rows, partial, V, D, stride, PIECE: tl.constexpr,
                    BLOCK_D: tl.constexpr):
    """One program a cut and block of D: what lies between this cut and the next, of a segment that the cut divides."""
    cut = tl.program_id(0) + 1
    v = tl.load(sorted_ids + cut * PIECE)
    if (v < V) & (tl.load(sorted_ids + cut * PIECE - 1) == v):
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        last = tl.minimum(tl.load(start + v + 1), (cut + 1) * PIECE)
        total = _sum_places(cut * PIECE, last, row, share, rows, stride, d, D)
        tl.store(partial + cut.to(tl.int64) * D + d, total, mask=d < D)


@triton.jit
def _row_kernel(start, row, share, rows, partial, out, D, stride, PIECE: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program an id and block of D: its places before the first cut, then the partial row of each cut inside."""
    v = tl.program_id(0).to(tl.int64)  # v * D passes 2^31 from 524,288 ids of 4096 on
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(start + v)
    last = tl.load(start + v + 1)
    cut = first // PIECE + 1
    total = _sum_places(first, tl.minimum(last, cut * PIECE), row, share, rows, stride, d, D)
    for c in range(cut, (last + PIECE - 1) // PIECE):
        total += tl.load(partial + tl.cast(c, tl.int64) * D + d, mask=d < D, other=0.0)
    tl.store(out + v * D + d, total.to(out.dtype.element_ty), mask=d < D)
