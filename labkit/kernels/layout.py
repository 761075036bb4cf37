"""How tensors have to lie in memory for the kernels: a row's elements side by side, rows anywhere."""

from torch import Tensor


def dense_rows(x: Tensor) -> Tensor:
    """`x` itself where its last dimension has stride 1, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows_by_group(x: Tensor) -> Tensor:
    """[..., D] as [outer, inner, D] without a copy where strides allow: q inside a packed qkv, for example.

    A kernel finds row r at (r // inner) * stride(0) + (r % inner) * stride(1).
    """
    x = dense_rows(x)
    return x.reshape(-1, 1, x.shape[-1]) if x.ndim < 3 else x.flatten(0, -3)
