"""K1. RMSNorm, with an optional residual that is added before.

    h = x + residual        r = 1 / sqrt(mean_d h_d^2 + eps)        y_d = w_d h_d r
    dh_d = r (w_d g_d - y'_d mean_j(w_j g_j y'_j)) + k_d       y' = h r;  g, k: gradients of y and of h
    dw_d = sum over rows of g_d y'_d

Only r is kept for the backward, one fp32 number a row. dw is summed in fp32 by each program over its own rows; a second
small sum adds the programs' parts, so no atomics, and two runs give the same bits.

Bytes, with e an element: forward 2 N D e (4 N D e with a residual), backward 3 N D e (4 with a residual).
FLOPs about 4 N D and 10 N D: memory decides. Small rows share a program, so that each still loads some 16 KB.
Source: RMSNorm, arXiv 1910.07467.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import check_devices, check_finite, check_float, check_kernel_dtype, check_shape
from labkit.kernels.configs import Row, settings_for
from labkit.kernels.cost import Cost
from labkit.kernels.dispatch import choose
from labkit.kernels.language import tl, triton
from labkit.kernels.layout import rows_by_group

WIDEST = 8192  # a row is held whole by one program; at 16,384 the backward spills, so wider ones go to the reference
PARTS = 512  # programs of the backward, each with its own part of dw: about four for each SM of a large GPU
SETTINGS = [
    Row("any", 128, {"ROWS": 32, "num_warps": 8}),
    Row("any", 512, {"ROWS": 8, "num_warps": 4}),
    Row("any", 2048, {"ROWS": 1, "num_warps": 4}),
    Row("any", WIDEST, {"ROWS": 1, "num_warps": 8}),
]


def rms_norm(x: Tensor, weight_D: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None, *,
             impl: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """y = weight * h / sqrt(mean(h^2) + eps) over the last dimension, with h = x + residual.

    Args:
        x: [..., D], fp16, bf16 or fp32 (float64 with the reference); any strides.
        weight_D: scale of each channel, or None for 1.
        residual: like x, also in dtype; then the sum h is returned too, rounded to that dtype, and y is the norm of
            what was rounded.
    Returns:
        y like x, or (y, h) with a residual.
    Raises:
        LabError: shapes, devices, dtypes or eps that do not fit.
    """
    check_norm(x, weight_D, eps, "x")
    check_devices(x=x, weight_D=weight_D, residual=residual)
    if residual is not None:
        check_shape("residual", residual, x.shape, "the shape of x")
        if residual.dtype != x.dtype:
            raise LabError(f"x is {x.dtype} and the residual {residual.dtype}.", "Give both one dtype.")
    if choose_norm(impl, x):
        check_kernel_dtype("x", x)
        y, h, _ = _op(x, weight_D, residual, eps)
    else:
        h = x if residual is None else x + residual
        y = reference(h, weight_D, eps)
    return y if residual is None else (y, h)


def reference(x: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """torch's own, which computes in fp32 and returns x's dtype.

    Under autocast x is bf16 and the weight is not; unequal types would take a slow path, with a warning.
    """
    return F.rms_norm(x, x.shape[-1:], None if weight_D is None else weight_D.to(x.dtype), eps)


def forward_cost(N: int, D: int, element: int = 2, residual: bool = False) -> Cost:
    """Rows in and out, r out; the fp32 weight again for each program, which a cache serves."""
    weights = -(-N // rows_of(D)) * D * 4
    rows = N * D * element * (1 + residual)
    return Cost(rows + weights, rows + 4 * N, 4 * N * D, weights)


def backward_cost(N: int, D: int, element: int = 2, residual: bool = False) -> Cost:
    """Gradient, h and r in, gradient out; each program's part of dw out, and the weight as in the forward."""
    tiles = -(-N // rows_of(D))
    return Cost(N * D * element * (2 + residual) + 4 * N + tiles * D * 4,
                N * D * element + min(PARTS, tiles) * D * 4, 10 * N * D, tiles * D * 4)


def rows_of(D: int) -> int:
    return settings_for("rms_norm", SETTINGS, D, torch.device("cpu"))["ROWS"]


@triton.jit
def forward_tile(x, residual, weight, y, h, scale, tile, N, D, inner, stride_outer, stride_inner, eps,
                 ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """ROWS whole rows: their norm, and r."""
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < N) & (d < D)
    x += (row // inner) * stride_outer + (row % inner) * stride_inner
    z = tl.load(x + d, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        z += tl.load(residual + row * D + d, mask=mask, other=0.0).to(tl.float32)
        rounded = z.to(h.dtype.element_ty)
        tl.store(h + row * D + d, rounded, mask=mask)
        z = rounded.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(z * z, 1) / D + eps)
    z = z * r[:, None]
    if weight is not None:
        z *= tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y + row * D + d, z.to(y.dtype.element_ty), mask=mask)
    n = tile * ROWS + tl.arange(0, ROWS)
    tl.store(scale + n, r, mask=n < N)


@triton.jit
def _backward_tile(g, k, h, weight, scale, dx, tile, N, D, inner, stride_outer, stride_inner,
                   ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write dh of ROWS rows; return their part of dw."""
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < N) & (d < D)
    h += (row // inner) * stride_outer + (row % inner) * stride_inner
    z = tl.load(h + d, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(g + row * D + d, mask=mask, other=0.0).to(tl.float32)
    r = tl.load(scale + row, mask=row < N, other=0.0)
    z = z * r
    part = tl.sum(grad * z, 0)
    if weight is not None:
        grad *= tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    dz = r * (grad - z * (tl.sum(grad * z, 1) / D)[:, None])
    if k is not None:
        dz += tl.load(k + row * D + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + row * D + d, dz.to(dx.dtype.element_ty), mask=mask)
    return part


@triton.jit
def _forward_kernel(x, residual, weight, y, h, scale, N, D, inner, stride_outer, stride_inner, eps,
                    ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    forward_tile(x, residual, weight, y, h, scale, tl.program_id(0), N, D, inner, stride_outer, stride_inner, eps,
                 ROWS, BLOCK_D)


@triton.jit
def _backward_kernel(g, k, h, weight, scale, dx, parts, N, D, inner, stride_outer, stride_inner, tiles,
                     ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program takes every num_programs-th tile, so that there are few parts of dw to add."""
    part = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        part += _backward_tile(g, k, h, weight, scale, dx, tl.cast(tile, tl.int32), N, D, inner, stride_outer,
                               stride_inner, ROWS, BLOCK_D)
    d = tl.arange(0, BLOCK_D)
    if parts is not None:
        tl.store(parts + tl.program_id(0) * D + d, part, mask=d < D)


def launch_forward(x: Tensor, weight_D: Tensor | None, residual: Tensor | None, eps: float,
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """y, the sum h (empty without a residual) and r [N]."""
    x_OID, D = rows_by_group(x), x.shape[-1]
    N = x_OID.shape[0] * x_OID.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty(x.shape if residual is not None else 0, dtype=x.dtype, device=x.device)
    scale_N = torch.empty(N, dtype=torch.float32, device=x.device)
    if x.numel():
        settings = norm_settings(D, x.device)
        _forward_kernel[(-(-N // settings["ROWS"]),)](
            x_OID, dense(residual), dense(weight_D), y, None if residual is None else h, scale_N, N, D,
            x_OID.shape[1], x_OID.stride(0), x_OID.stride(1), eps, **settings)
    return y, h, scale_N


def launch_backward(g: Tensor, k: Tensor | None, h: Tensor, weight_D: Tensor | None,
                    scale_N: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of h (which is also that of x and of the residual), and of the weight (empty without one)."""
    h_OID, D = rows_by_group(h), h.shape[-1]
    N = scale_N.shape[0]
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    settings = norm_settings(D, h.device)
    tiles = -(-N // settings["ROWS"])
    programs = min(PARTS, tiles)
    parts_PD = None if weight_D is None else torch.empty(programs, D, dtype=torch.float32, device=h.device)
    if h.numel():
        _backward_kernel[(programs,)](
            dense(g), dense(k), h_OID, dense(weight_D), scale_N, dh, parts_PD, N, D,
            h_OID.shape[1], h_OID.stride(0), h_OID.stride(1), tiles, **settings)
    return dh, h.new_empty(0) if weight_D is None else parts_PD.sum(0).to(weight_D.dtype)


def dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def norm_settings(D: int, device: torch.device) -> dict[str, int]:
    return {"BLOCK_D": triton.next_power_of_2(D)} | settings_for("rms_norm", SETTINGS, D, device)


@torch.library.custom_op("labkit::rms_norm", mutates_args=())
def _op(x: Tensor, weight_D: Tensor | None, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(x, weight_D, residual, eps)


@torch.library.custom_op("labkit::rms_norm_backward", mutates_args=())
def backward_op(g: Tensor, k: Tensor | None, h: Tensor, weight_D: Tensor | None,
                scale_N: Tensor) -> tuple[Tensor, Tensor]:
    return launch_backward(g, k, h, weight_D, scale_N)


@_op.register_fake
def _(x, weight_D, residual, eps):
    h = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), h, x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@backward_op.register_fake
def _(g, k, h, weight_D, scale_N):
    return h.new_empty(h.shape), h.new_empty(0) if weight_D is None else weight_D.new_empty(weight_D.shape)


def _save(ctx, inputs, output):
    x, weight_D, residual, _ = inputs
    ctx.summed = residual is not None
    ctx.save_for_backward(output[1] if ctx.summed else x, weight_D, output[2])


def _backward(ctx, g, k, _):
    h, weight_D, scale_N = ctx.saved_tensors
    dh, dw_D = backward_op(g, k if ctx.summed else None, h, weight_D, scale_N)
    return dh, None if weight_D is None else dw_D, dh if ctx.summed else None, None


_op.register_autograd(_backward, setup_context=_save)


def choose_norm(impl: str, x: Tensor) -> bool:
    """Whether the kernel runs. A row that is too wide is an error only where the kernel was demanded."""
    able, D = bool(choose(impl, x)), x.shape[-1]
    if impl == "triton" and D > WIDEST:
        raise LabError(f"The kernel holds a row of {WIDEST:,} at most, and D is {D:,}.",
                       'Use impl="auto" or "reference".')
    return able and D <= WIDEST


def check_norm(x: Tensor, weight_D: Tensor | None, eps: float, name: str) -> None:
    check_float(name, x)
    check_finite("eps", eps)
    if eps < 0 or not x.ndim or not x.shape[-1]:
        raise LabError(f"{name} of shape {list(x.shape)} with eps={eps} has no norm.",
                       "Pass [..., D] with D of 1 or more, and eps of 0 or more.")
    if weight_D is not None:
        check_shape("the weight", weight_D, x.shape[-1:], "[D]")
        check_float("the weight", weight_D)
