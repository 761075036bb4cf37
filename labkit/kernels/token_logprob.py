"""K4. Log-probability of given tokens, entropy and log-sum-exp of each row, in one reading of the logits.

With x = logits / temperature, m = max x, s = sum exp(x - m) and w = sum exp(x - m) (x - m):

    lse = m + log s        logp = x[id] - lse        entropy = -sum p log p = log s - w / s

The entropy needs no second pass, and since x - m is used throughout, a common offset of the logits cancels before it
can cost digits. All three are kept while the maximum is still growing: when it moves from m to m', s becomes
exp(m - m') s and w becomes exp(m - m') (w + (m - m') s).

    dx_v = g (1[v = id] - p_v) - h p_v (log p_v + entropy) + k p_v        g, h, k: gradients of logp, entropy, lse

Bytes: forward N V e read; backward N V e read and N V e written. FLOPs about 7 N V and 8 N V.
Source: the online maximum of arXiv 1805.02867, carried over to the second sum.
"""

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import (
    check_devices,
    check_float,
    check_head,
    check_ids,
    check_kernel_dtype,
    check_shape,
    check_temperature,
)
from labkit.kernels.configs import OVER_VOCABULARY, settings_for
from labkit.kernels.cost import Cost
from labkit.kernels.dispatch import choose
from labkit.kernels.language import tl, triton
from labkit.kernels.layout import dense_rows
from labkit.kernels.products import product


def token_logprob(logits_NV: Tensor, ids_N: Tensor, *, temperature: float = 1.0, ignore_index: int = -100,
                  impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each row's token, the row's entropy, and its log-sum-exp: (logp_N, entropy_N, lse_N).

    Args:
        logits_NV: fp16, bf16 or fp32 (float64 with the reference).
        ids_N: one token a row; where it equals `ignore_index`, all three are 0 and so is their gradient.
        temperature: divides the logits first; above 0.
    Returns:
        three fp32 tensors [N], in nats, differentiable with respect to the logits.
    Raises:
        LabError: shapes, devices, dtypes, ids or a temperature that do not fit.
    """
    _check(logits_NV, ids_N, temperature)
    check_ids("ids_N", ids_N, logits_NV.shape[1], skip=ignore_index)
    if choose(impl, logits_NV):
        check_kernel_dtype("logits_NV", logits_NV)
        return _op(logits_NV, ids_N, temperature, ignore_index)
    return reference(logits_NV, ids_N, temperature, ignore_index)


@torch.no_grad()
def linear_token_logprob(hidden_NH: Tensor, weight_VH: Tensor, ids_N: Tensor, *, temperature: float = 1.0,
                         ignore_index: int = -100, chunk: int = 2048, impl: str = "auto") -> tuple[Tensor, ...]:
    """`token_logprob(hidden @ weight.T, ids)` for `chunk` rows at a time: how old and reference policies are scored.

    Without a gradient, so only one chunk of logits exists, chunk * V * 4 bytes. They are kept in fp32: a bf16 logit
    near 16 is off by up to 0.03, and a ratio of policies is the exponential of a difference of two.
    """
    check_head(hidden_NH, weight_VH, chunk)
    check_shape("ids_N", ids_N, hidden_NH.shape[:1], "[N]")
    check_devices(hidden_NH=hidden_NH, weight_VH=weight_VH, ids_N=ids_N)
    dtype = torch.promote_types(hidden_NH.dtype, torch.float32)

    def logits_of(rows: Tensor) -> Tensor:
        return product(rows, weight_VH.T, dtype)

    parts = [token_logprob(logits_of(rows), ids, temperature=temperature, ignore_index=ignore_index, impl=impl)
             for rows, ids in zip(hidden_NH.split(chunk), ids_N.split(chunk), strict=True)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def reference(logits_NV: Tensor, ids_N: Tensor, temperature: float = 1.0,
              ignore_index: int = -100) -> tuple[Tensor, Tensor, Tensor]:
    """The same three in plain torch, in fp32 (in float64 for float64 logits)."""
    x_NV = (logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()) / temperature
    lse_N = x_NV.logsumexp(1)
    logp_NV = x_NV - lse_N[:, None]
    forbidden_NV = x_NV == float("-inf")  # 0 * -inf is 0 here
    entropy_N = -(logp_NV.exp() * logp_NV.masked_fill(forbidden_NV, 0.0)).sum(1)
    counts_N = ids_N != ignore_index
    logp_N = logp_NV.gather(1, ids_N.clamp(0, logits_NV.shape[1] - 1).long()[:, None]).squeeze(1)
    return tuple(torch.where(counts_N, column, 0.0) for column in (logp_N, entropy_N, lse_N))


def forward_cost(N: int, V: int, element: int = 2) -> Cost:
    """Logits once, the id and its logit; three fp32 numbers out."""
    return Cost(N * V * element + N * (8 + element), 12 * N, 7 * N * V)


def backward_cost(N: int, V: int, element: int = 2) -> Cost:
    """Logits once, their gradient out; the id and five fp32 numbers a row and block."""
    return Cost(N * V * element + 28 * N * -(-V // 4096), N * V * element, 8 * N * V)


@triton.jit
def _forward_kernel(logits, ids, logp, entropy, lse, V, stride, inverse_temperature, ignore_index,
                    BLOCK_V: tl.constexpr):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    m = float("-inf")
    s = 0.0
    w = 0.0
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits + v, mask=v < V, other=float("-inf")).to(tl.float32) * inverse_temperature
        new_m = tl.maximum(m, tl.max(x, 0))
        # before the first finite logit the maximum is -inf, and for a +inf logit it is +inf: do not shift by those
        shift = tl.where(tl.abs(new_m) == float("inf"), 0.0, new_m)
        moved = tl.where(m == float("-inf"), 0.0, m - shift)
        d = x - shift
        e = tl.exp(d)
        w = tl.exp(moved) * (w + moved * s) + tl.sum(tl.where(e > 0, e * d, 0.0), 0)
        s = tl.exp(moved) * s + tl.sum(e, 0)
        m = new_m
    token = tl.load(ids + row)
    inside = (token >= 0) & (token < V)
    x = tl.load(logits + token, mask=inside, other=float("nan")).to(tl.float32) * inverse_temperature
    counts = token != ignore_index
    tl.store(logp + row, tl.where(counts, x - m - tl.log(s), 0.0))
    tl.store(entropy + row, tl.where(counts, tl.log(s) - w / s, 0.0))
    tl.store(lse + row, tl.where(counts, m + tl.log(s), 0.0))


@triton.jit
def _backward_kernel(logits, ids, entropy, lse, grad_logp, grad_entropy, grad_lse, gradient, V, stride,
                     inverse_temperature, ignore_index, BLOCK_V: tl.constexpr):
    """One program a row and block of V."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(logits + row * stride + v, mask=v < V).to(tl.float32) * inverse_temperature
    token = tl.load(ids + row)
    g = tl.load(grad_logp + row)
    h = tl.load(grad_entropy + row)
    k = tl.load(grad_lse + row)
    logp = x - tl.load(lse + row)
    p = tl.exp(logp)
    spread = tl.where(p > 0, p * (logp + tl.load(entropy + row)), 0.0)
    dx = (tl.where(v == token, g, 0.0) - g * p - h * spread + k * p) * inverse_temperature
    dx = tl.where(token != ignore_index, dx, 0.0)
    tl.store(gradient + row * V + v, dx.to(gradient.dtype.element_ty), mask=v < V)


def launch_forward(logits_NV: Tensor, ids_N: Tensor, temperature: float,
                   ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """logp, entropy and lse, [N] in fp32."""
    N, V = logits_NV.shape
    out = tuple(torch.empty(N, dtype=torch.float32, device=logits_NV.device) for _ in range(3))
    if N:
        def launch(settings):
            _forward_kernel[(N,)](logits_NV, ids_N, *out, V, logits_NV.stride(0), 1 / temperature, ignore_index,
                                  **settings)

        launch(settings_for("token_logprob", OVER_VOCABULARY, V, logits_NV.device, launch))
    return out


def launch_backward(logits_NV: Tensor, ids_N: Tensor, entropy_N: Tensor, lse_N: Tensor, grad_logp_N: Tensor,
                    grad_entropy_N: Tensor, grad_lse_N: Tensor, temperature: float, ignore_index: int) -> Tensor:
    """The gradient of the logits, [N, V]."""
    N, V = logits_NV.shape
    out_NV = torch.empty(N, V, dtype=logits_NV.dtype, device=logits_NV.device)
    if N:
        def launch(settings):
            _backward_kernel[(N, -(-V // settings["BLOCK_V"]))](
                logits_NV, ids_N, entropy_N, lse_N, grad_logp_N, grad_entropy_N, grad_lse_N, out_NV, V,
                logits_NV.stride(0), 1 / temperature, ignore_index, **settings)

        launch(settings_for("token_logprob", OVER_VOCABULARY, V, logits_NV.device, launch))
    return out_NV


@torch.library.custom_op("labkit::token_logprob", mutates_args=())
def _op(logits_NV: Tensor, ids_N: Tensor, temperature: float, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(dense_rows(logits_NV), ids_N.contiguous(), temperature, ignore_index)


@torch.library.custom_op("labkit::token_logprob_backward", mutates_args=())
def _backward_op(logits_NV: Tensor, ids_N: Tensor, entropy_N: Tensor, lse_N: Tensor, grad_logp_N: Tensor,
                 grad_entropy_N: Tensor, grad_lse_N: Tensor, temperature: float, ignore_index: int) -> Tensor:
    return launch_backward(dense_rows(logits_NV), ids_N.contiguous(), entropy_N, lse_N, grad_logp_N.contiguous(),
                           grad_entropy_N.contiguous(), grad_lse_N.contiguous(), temperature, ignore_index)


@_op.register_fake
def _(logits_NV, ids_N, temperature, ignore_index):
    return tuple(logits_NV.new_empty(logits_NV.shape[0], dtype=torch.float32) for _ in range(3))


@_backward_op.register_fake
def _(logits_NV, *arguments):
    return logits_NV.new_empty(logits_NV.shape)


def _save(ctx, inputs, output):
    logits_NV, ids_N, ctx.temperature, ctx.ignore_index = inputs
    ctx.save_for_backward(logits_NV, ids_N, output[1], output[2])


def _backward(ctx, *gradients):
    out_NV = _backward_op(*ctx.saved_tensors, *gradients, ctx.temperature, ctx.ignore_index)
    return out_NV, None, None, None


_op.register_autograd(_backward, setup_context=_save)


def _check(logits_NV: Tensor, ids_N: Tensor, temperature: float) -> None:
    check_shape("logits_NV", logits_NV, (None, None), "[N, V]")
    check_shape("ids_N", ids_N, (logits_NV.shape[0],), "[N]")
    check_float("logits_NV", logits_NV)
    check_devices(logits_NV=logits_NV, ids_N=ids_N)
    check_temperature(temperature)
    if not logits_NV.shape[1]:
        raise LabError("The logits have no vocabulary: V is 0.", "Pass logits [N, V] with V of 1 or more.")
