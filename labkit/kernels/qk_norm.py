"""K1, second part. RMSNorm of queries and keys in one launch, each head by itself.

    q'_nhd = wq_d q_nhd / sqrt(mean_d q_nhd^2 + eps), and the same for k with its own weight

A row is one head of one token, of 64 to 256 numbers, so the work of either tensor alone is small and its launch weighs.
q and k may be views into one packed projection: their rows are found by two strides, and nothing is copied.
Bytes: 2 (Hq + Hk) N D e forward, 3 (Hq + Hk) N D e backward, which is rms_norm's own, once for each tensor.
Source: arXiv 2010.04245, with RMSNorm in place of its l2 norm, as current models do.
"""

import torch
from torch import Tensor

from labkit.kernels.checks import check_devices, check_kernel_dtype, check_shape
from labkit.kernels.cost import Cost
from labkit.kernels.language import tl, triton
from labkit.kernels.layout import rows_by_group
from labkit.kernels.rms_norm import backward_cost as rms_backward_cost
from labkit.kernels.rms_norm import backward_op, check_norm, choose_norm, dense, forward_tile, norm_settings, reference
from labkit.kernels.rms_norm import forward_cost as rms_forward_cost


def qk_norm(q_NHD: Tensor, k_NHD: Tensor, weight_q_D: Tensor | None = None, weight_k_D: Tensor | None = None,
            eps: float = 1e-5, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """RMSNorm of queries [N, Hq, D] and keys [N, Hk, D], each head by itself, in one launch.

    Args:
        q_NHD, k_NHD: fp16, bf16 or fp32 (float64 with the reference); any strides.
        weight_q_D, weight_k_D: scale of each channel, the same for all heads; None for 1.
    Returns:
        The normed queries and keys, each like its input.
    Raises:
        LabError: shapes, devices, dtypes or eps that do not fit.
    """
    check_shape("q_NHD", q_NHD, (None, None, None), "[N, H, D]")
    check_shape("k_NHD", k_NHD, (q_NHD.shape[0], None, q_NHD.shape[2]), "[N, H, D]")
    for name, x, weight_D in (("q_NHD", q_NHD, weight_q_D), ("k_NHD", k_NHD, weight_k_D)):
        check_norm(x, weight_D, eps, name)
    check_devices(q_NHD=q_NHD, k_NHD=k_NHD, weight_q_D=weight_q_D, weight_k_D=weight_k_D)
    if choose_norm(impl, q_NHD):
        check_kernel_dtype("q_NHD", q_NHD)
        check_kernel_dtype("k_NHD", k_NHD)
        return _op(q_NHD, k_NHD, weight_q_D, weight_k_D, eps)[:2]
    return reference(q_NHD, weight_q_D, eps), reference(k_NHD, weight_k_D, eps)


def forward_cost(N: int, Hq: int, Hk: int, D: int, element: int = 2) -> Cost:
    """That of rms_norm on N Hq rows, and on N Hk rows."""
    return rms_forward_cost(N * Hq, D, element).plus(rms_forward_cost(N * Hk, D, element))


def backward_cost(N: int, Hq: int, Hk: int, D: int, element: int = 2) -> Cost:
    """That of rms_norm on N Hq rows, and on N Hk rows."""
    return rms_backward_cost(N * Hq, D, element).plus(rms_backward_cost(N * Hk, D, element))


@triton.jit
def _forward_kernel(q, k, weight_q, weight_k, y_q, y_k, scale_q, scale_k, N_q, N_k, D, heads_q, heads_k,
                    q_outer, q_inner, k_outer, k_inner, tiles_q, eps, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The first programs take the queries, the others the keys."""
    tile = tl.program_id(0)
    if tile < tiles_q:
        forward_tile(q, None, weight_q, y_q, None, scale_q, tile, N_q, D, heads_q, q_outer, q_inner, eps,
                     ROWS, BLOCK_D)
    else:
        forward_tile(k, None, weight_k, y_k, None, scale_k, tile - tiles_q, N_k, D, heads_k, k_outer, k_inner, eps,
                     ROWS, BLOCK_D)


def launch_forward(q_NHD: Tensor, k_NHD: Tensor, weight_q_D: Tensor | None, weight_k_D: Tensor | None,
                   eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normed q and k, and r of each of their rows."""
    q, k, D = rows_by_group(q_NHD), rows_by_group(k_NHD), q_NHD.shape[-1]
    y_q, y_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    scale_q, scale_k = (torch.empty(x.shape[0] * x.shape[1], dtype=torch.float32, device=x.device) for x in (q, k))
    if q.numel() + k.numel():
        settings = norm_settings(D, q.device)
        tiles_q, tiles_k = (-(-len(scale) // settings["ROWS"]) for scale in (scale_q, scale_k))
        _forward_kernel[(tiles_q + tiles_k,)](
            q, k, dense(weight_q_D), dense(weight_k_D), y_q, y_k, scale_q, scale_k, len(scale_q), len(scale_k), D,
            q.shape[1], k.shape[1], q.stride(0), q.stride(1), k.stride(0), k.stride(1), tiles_q, eps, **settings)
    return y_q, y_k, scale_q, scale_k


@torch.library.custom_op("labkit::qk_norm", mutates_args=())
def _op(q_NHD: Tensor, k_NHD: Tensor, weight_q_D: Tensor | None, weight_k_D: Tensor | None,
        eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_forward(q_NHD, k_NHD, weight_q_D, weight_k_D, eps)


@_op.register_fake
def _(q_NHD, k_NHD, weight_q_D, weight_k_D, eps):
    return tuple(x.new_empty(x.shape) for x in (q_NHD, k_NHD)) + tuple(
        x.new_empty(x.shape[0] * x.shape[1], dtype=torch.float32) for x in (q_NHD, k_NHD))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output[2:])


def _backward(ctx, g_q, g_k, *_):
    q_NHD, k_NHD, weight_q_D, weight_k_D, scale_q, scale_k = ctx.saved_tensors
    dq, dw_q = backward_op(g_q, None, q_NHD, weight_q_D, scale_q)
    dk, dw_k = backward_op(g_k, None, k_NHD, weight_k_D, scale_k)
    return dq, dk, None if weight_q_D is None else dw_q, None if weight_k_D is None else dw_k, None


_op.register_autograd(_backward, setup_context=_save)
