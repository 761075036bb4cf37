"""What both directions of K10 share: how a tile of a [length, D] matrix is read and written, and launch settings."""

import math

import torch
from torch import Tensor

from labkit.kernels.configs import Row, settings_for
from labkit.kernels.language import tl, triton

LOG2E = math.log2(math.e)


def flash_settings(table: list[Row], name: str, D: int, device: torch.device) -> dict[str, int]:
    # tl.dot wants 16 in each dimension at least
    return {"D": D, "BLOCK_D": max(triton.next_power_of_2(D), 16)} | settings_for(name, table, D, device)


def strides_of(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


@triton.jit
def tile(x, rows, length, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """Rows of a [length, D] matrix as [rows, BLOCK_D]; zeros outside. `length` is looked at where CHECK."""
    d = tl.arange(0, BLOCK_D)[None, :]
    place = x + rows.to(tl.int64)[:, None] * stride + d
    if CHECK:
        return tl.load(place, mask=(rows < length)[:, None] & (d < D), other=0.0)
    if D < BLOCK_D:
        return tl.load(place, mask=d < D, other=0.0)
    return tl.load(place)


@triton.jit
def store_tile(x, value, rows, length, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)[None, :]
    place = x + rows.to(tl.int64)[:, None] * stride + d
    tl.store(place, value.to(x.dtype.element_ty), mask=(rows < length)[:, None] & (d < D))
