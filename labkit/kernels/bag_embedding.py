"""K8. The mean of the embeddings of a bag of tokens, and its gradient for the table.

    mean_r  = (1/n_r) sum_s weight[ids_rs]        over the n_r places of bag r that are no pad; 0 where there are none
    dweight_v = sum over the places (r, s) with ids_rs = v of g_r / n_r

A token that stands twice in a bag counts twice. Sums are in fp32 and rounded once. With S = 1 the mean equals the plain
embedding bit for bit.

Bytes, with R bags of S ids, width D and e bytes an element: forward R S D e read and R D e written, of which U D e (U
different ids) and R D e are compulsory. Backward R S D e read (R D e compulsory) and V D e written: the gradient has
the size of the table. FLOPs R S D each way. Plain torch (gather, then mean) writes and reads the gathered
R S D e once more each way. The gradient is summed in a fixed order (segments.py): equal bits in every run.

Launches: forward one; backward two, and about ten small ones for counting and sorting the R S ids.

Source: Token-Superposition Training, arXiv 2605.06546. torch has F.embedding_bag(mode="mean"), which wants the bags of
one length or with offsets, and serves as the tests' oracle.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from labkit.errors import LabError
from labkit.kernels.checks import check_devices, check_float, check_ids, check_kernel_dtype, check_shape
from labkit.kernels.configs import Row, settings_for
from labkit.kernels.cost import Cost
from labkit.kernels.dispatch import choose
from labkit.kernels.language import tl, triton
from labkit.kernels.layout import dense_rows
from labkit.kernels.segments import segment_cost, segment_sums

SETTINGS = [Row("any", float("inf"), {"BLOCK_D": 1024, "num_warps": 4})]


def bag_embedding(ids: Tensor, weight_VD: Tensor, *, pad: int | None = None, impl: str = "auto") -> Tensor:
    """Mean embedding of each bag, in the table's dtype.

    Args:
        ids: int32 or int64 [..., S], bags of S ids.
        weight_VD: the table: fp16, bf16 or fp32 (float64 with the reference).
        pad: an id that does not count, in the table or not; a bag of pads has mean 0.
    Returns:
        [..., D], differentiable with respect to the table.
    Raises:
        LabError: shapes, devices, dtypes or ids that do not fit. On a GPU an id outside the table makes its bag NaN.
    """
    _check(ids, weight_VD)
    check_ids("ids", ids, weight_VD.shape[0], skip=pad)
    shape = (*ids.shape[:-1], weight_VD.shape[1])
    ids_RS = ids.reshape(math.prod(ids.shape[:-1]), ids.shape[-1])
    if choose(impl, weight_VD):
        check_kernel_dtype("weight_VD", weight_VD)
        return _op(ids_RS, weight_VD, pad).reshape(shape)
    return reference(ids_RS, weight_VD, pad).reshape(shape)


def reference(ids_RS: Tensor, weight_VD: Tensor, pad: int | None = None) -> Tensor:
    """The same in plain torch: gather, then mean in fp32 (in float64 for a float64 table)."""
    counts_RS = ids_RS == ids_RS if pad is None else ids_RS != pad
    rows_RSD = F.embedding(torch.where(counts_RS, ids_RS, 0), weight_VD)
    rows_RSD = rows_RSD if weight_VD.dtype == torch.float64 else rows_RSD.float()
    sum_RD = torch.where(counts_RS[..., None], rows_RSD, 0.0).sum(1)
    return (sum_RD / counts_RS.sum(1, keepdim=True).clamp(min=1)).to(weight_VD.dtype)


def forward_cost(R: int, S: int, D: int, element: int = 2, ids: int = 8, block: int = 1024) -> Cost:
    """R S D e of the table, the ids once for each block of D, and R D e out."""
    return Cost(R * S * (D * element + ids * -(-D // block)), R * D * element, R * S * D)


def backward_cost(R: int, S: int, D: int, V: int, element: int = 2, *, cuts: int = 0) -> Cost:
    """That of segments.segment_cost: each place's row of the arriving gradient, and the table's gradient out."""
    return segment_cost(R * S, V, D, element, cuts=cuts)


@triton.jit
def _forward_kernel(ids, weight, out, S, V, D, stride, pad, BLOCK_D: tl.constexpr):
    """One program a bag and block of D."""
    r = tl.program_id(0).to(tl.int64)  # r * D passes 2^31 from 524,288 bags of 4096 on
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32) * -1.0  # -0.0 + x is x, also for x = -0.0; 0.0 + -0.0 would be 0.0
    n = 0
    for s in tl.range(0, S, loop_unroll_factor=4):  # four rows on their way at a time
        v = tl.load(ids + r * S + s).to(tl.int64)  # v * stride passes 2^31, as r * D does
        counts = v >= v  # always; a plain True has no type here
        if pad is not None:
            counts = v != pad
        inside = counts & (v >= 0) & (v < V)
        x = tl.load(weight + v * stride + d, mask=d < tl.where(inside, D, 0), other=0.0).to(tl.float32)
        total += tl.where(counts & (inside == 0), float("nan"), x)
        n += tl.where(counts, 1, 0)
    mean = tl.where(n > 0, total / tl.maximum(n, 1), 0.0)
    tl.store(out + r * D + d, mean.to(out.dtype.element_ty), mask=d < D)


def launch_forward(ids_RS: Tensor, weight_VD: Tensor, pad: int | None) -> Tensor:
    """mean [R, D]."""
    (R, S), (V, D) = ids_RS.shape, weight_VD.shape
    out_RD = torch.empty(R, D, dtype=weight_VD.dtype, device=weight_VD.device)
    if R and D:
        settings = settings_for("bag_embedding", SETTINGS, D, weight_VD.device)
        _forward_kernel[(R, -(-D // settings["BLOCK_D"]))](ids_RS, weight_VD, out_RD, S, V, D, weight_VD.stride(0), pad,
                                                           **settings)
    return out_RD


def launch_backward(grad_RD: Tensor, ids_RS: Tensor, V: int, pad: int | None) -> Tensor:
    """The gradient of the table, [V, D]. A pad becomes an id that no row has, -1."""
    if pad is not None:
        ids_RS = torch.where(ids_RS == pad, -1, ids_RS)
    share_R1 = 1.0 / (ids_RS != -1).sum(1, keepdim=True)  # a bag of pads has 1/0, which no row asks for
    return segment_sums(ids_RS, share_R1.expand(ids_RS.shape), grad_RD, V, grad_RD.dtype)


@torch.library.custom_op("labkit::bag_embedding", mutates_args=())
def _op(ids_RS: Tensor, weight_VD: Tensor, pad: int | None) -> Tensor:
    return launch_forward(ids_RS.contiguous(), dense_rows(weight_VD), pad)


@torch.library.custom_op("labkit::bag_embedding_backward", mutates_args=())
def _backward_op(grad_RD: Tensor, ids_RS: Tensor, V: int, pad: int | None) -> Tensor:
    return launch_backward(dense_rows(grad_RD), ids_RS.contiguous(), V, pad)


@_op.register_fake
def _(ids_RS, weight_VD, pad):
    return weight_VD.new_empty(ids_RS.shape[0], weight_VD.shape[1])


@_backward_op.register_fake
def _(grad_RD, ids_RS, V, pad):
    return grad_RD.new_empty(V, grad_RD.shape[1])


def _save(ctx, inputs, output):
    ids_RS, weight_VD, ctx.pad = inputs
    ctx.V = weight_VD.shape[0]
    ctx.save_for_backward(ids_RS)


def _backward(ctx, grad_RD):
    (ids_RS,) = ctx.saved_tensors
    return None, _backward_op(grad_RD, ids_RS, ctx.V, ctx.pad), None


_op.register_autograd(_backward, setup_context=_save)


def _check(ids: Tensor, weight_VD: Tensor) -> None:
    check_shape("weight_VD", weight_VD, (None, None), "[V, D]")
    check_float("weight_VD", weight_VD)
    check_devices(ids=ids, weight_VD=weight_VD)
    if not ids.ndim:
        raise LabError("ids has no dimension, so there is no bag.", "Pass bags of ids [..., S].")
