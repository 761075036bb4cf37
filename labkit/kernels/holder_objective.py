"""K5. The policy objective with a power mean over token ratios, forward and backward in one launch each.

    l_t   = logp_t - old_logp_t                                  log-ratio of token t
    log M = (1/p) log((1/n) sum_t exp(p l_t)), mean l_t at p = 0     over the n tokens of a sequence that count
    loss  = -(1/B) sum_b min(M_b A_b, clip(M_b, 1 - clip_low, 1 + clip_high) A_b)       level "sequence"
    loss  = -(1/B) sum_b A_b M_b, with each ratio exp(l_t) cut to the same effect       level "token"
    d loss / d logp_t = -(1/B) A_b M_b w_t where nothing is cut, else 0;    w_t = exp(p l_t) / sum_k exp(p l_k)

GRPO is p = 1 with level "token", GMPO p = 0 with "token", GSPO p = 0 with "sequence". In fp32 the second line does not
work as it stands: exp(p l) overflows at p l = 88, and near p = 0 the division by p magnifies the logarithm's rounding.
So, with the mean mu and l*, the l_t of the largest p l_t:

    log M = l* + log(s / n) / p,   s = sum_t exp(p (l_t - l*))       log(s/n), since log s - log n cancels
    log M = mu + E psi(p E),       E = mean of c phi(p c), c = l_t - mu        where every |p c| < 0.5

phi(x) = (exp(x) - 1)/x and psi(y) = log(1 + y)/y are short polynomials, so p is divided out, and p = 0 is no special
case. log M is then right to about one rounding of the largest |c|; the weights w_t use the first form at every p.

Bytes, with e bytes an element of each log-probability and 1 more of a mask: forward 4 e M read, half of it from a
cache; backward 2 e M read and e M written. FLOPs about 40 M and 10 M. That is a few megabytes, so the launches decide.
Forward: one, and a memset of 4 bytes for the counter. Backward: one. The wrapper adds none for bool masks and a number
p; a mask of another type costs one more (mask != 0), a padded input that is not contiguous a copy. Packed sequences
begin at any token and so are read 4 bytes at a time, not 16; at this size nobody waits for that. The sum over sequences
is taken by whichever program ends last, but always in the same order: equal bits in every run.

Sources: Hoelder policy optimisation, arXiv 2605.12058; GSPO, arXiv 2507.18071; GMPO, arXiv 2507.20673.
"""

import math

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import IDS, check_devices, check_finite, check_float, check_kernel_dtype, check_shape
from labkit.kernels.cost import Cost
from labkit.kernels.dispatch import choose
from labkit.kernels.holder_kernels import LOG_RATIO, launch_backward, launch_forward


def holder_objective(logp: Tensor, old_logp: Tensor, advantage_B: Tensor, cu_seqlens: Tensor | None, p: float | Tensor,
                     clip_low: float = 0.2, clip_high: float = 0.2, level: str = "sequence", *,
                     mask: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss of B sequences, whose token ratios enter through their power mean of exponent p.

    Args:
        logp: log-probabilities in nats. Packed: [M], sequence b at cu_seqlens[b] to cu_seqlens[b+1]. Padded: [B, T],
            with cu_seqlens None. The only input that gets a gradient.
        old_logp: the same under the policy that sampled; same shape.
        advantage_B: one advantage a sequence.
        cu_seqlens: int32 or int64 [B+1], from 0 to M, never decreasing.
        p: a number, or a tensor [] or [B] for an exponent a sequence.
        clip_low, clip_high: ratios count from 1 - clip_low to 1 + clip_high.
        level: "sequence" cuts the power mean, "token" every ratio before the mean.
        mask: like logp; where it is 0 or False, a token does not count, and its log-probabilities may be NaN.
    Returns:
        (loss, stats): the mean over all B sequences in fp32, where one with no token counts as 0; stats has
        clip_fraction (sequences, or tokens, whose gradient the clip cuts off, out of those that count) and log_ratio_B
        (log M, 0 where no token counts).
    Raises:
        LabError: shapes, devices, dtypes or settings that do not fit. On a GPU the values in cu_seqlens and p are not
        looked at beforehand; a cu_seqlens that does not fit gives the loss NaN there.
    """
    _check(logp, old_logp, advantage_B, cu_seqlens, p, clip_low, clip_high, level, mask)
    T = logp.shape[1] if cu_seqlens is None else 0
    mask_M = None if mask is None else (mask if mask.dtype == torch.bool else mask != 0).reshape(-1)
    p, p_B = (0.0, p.detach().expand(advantage_B.shape)) if isinstance(p, Tensor) else (float(p), None)
    inputs = (logp.reshape(-1), old_logp.detach().reshape(-1), mask_M, advantage_B.detach(), cu_seqlens, T, p, p_B,
              math.log1p(-clip_low), math.log1p(clip_high), level == "token")
    if choose(impl, logp):
        for name, tensor in (("logp", logp), ("old_logp", old_logp), ("advantage_B", advantage_B), ("p", p_B)):
            if tensor is not None:
                check_kernel_dtype(name, tensor)
        loss, clip_fraction, kept_6B = _op(*inputs)
        log_ratio_B = kept_6B[LOG_RATIO]
    else:
        loss, clip_fraction, log_ratio_B = reference(*inputs)
    return loss, {"clip_fraction": clip_fraction.detach(), "log_ratio_B": log_ratio_B.detach()}


def reference(logp_M: Tensor, old_logp_M: Tensor, mask_M: Tensor | None, advantage_B: Tensor, cu_seqlens: Tensor | None,
              T: int, p: float, p_B: Tensor | None, log_low: float, log_high: float,
              by_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, clip fraction and log M of each sequence in plain torch, in fp32 (in float64 for float64 logp_M)."""
    dtype = torch.float64 if logp_M.dtype == torch.float64 else torch.float32
    position_M = torch.arange(len(logp_M), device=logp_M.device)
    owner_M = (position_M // T if cu_seqlens is None
               else torch.searchsorted(cu_seqlens[1:].long(), position_M, right=True))
    counts_M = torch.ones_like(logp_M, dtype=torch.bool) if mask_M is None else mask_M
    A_B = advantage_B.to(dtype)
    p_B = torch.full_like(A_B, p) if p_B is None else p_B.to(dtype)
    l_M = torch.where(counts_M, logp_M.to(dtype) - old_logp_M.to(dtype), 0.0)  # times the mask would keep a NaN

    def cut(log_ratio, A):
        outside = ((A > 0) & (log_ratio > log_high)) | ((A < 0) & (log_ratio < log_low))
        return outside, torch.full_like(A, log_low).masked_fill(A > 0, log_high)  # where() would make them fp32

    if by_token:
        cut_M, bound_M = cut(l_M, A_B[owner_M])
        l_M = torch.where(cut_M, bound_M, l_M)
    log_ratio_B, n_B = log_power_mean(l_M, counts_M, owner_M, p_B)
    cut_B, bound_B = cut(log_ratio_B, A_B)
    log_used_B = log_ratio_B if by_token else torch.where(cut_B, bound_B, log_ratio_B)
    gain_B = torch.where((A_B != 0) & (n_B > 0), A_B * torch.where(A_B != 0, log_used_B, 0.0).exp(), 0.0)
    fraction = (cut_M & counts_M).sum() / n_B.sum().clamp(min=1) if by_token else (
        cut_B.sum() / (n_B > 0).sum().clamp(min=1))
    return -gain_B.sum() / max(len(A_B), 1), fraction.to(dtype), log_ratio_B


def log_power_mean(l_M: Tensor, counts_M: Tensor, owner_M: Tensor, p_B: Tensor) -> tuple[Tensor, Tensor]:
    """log((mean exp(p l))^(1/p)) over the tokens of each sequence that count, and their number: [B] each."""
    n_B = torch.zeros_like(p_B).index_add(0, owner_M, counts_M.to(p_B.dtype))

    def mean(x_M):
        return torch.zeros_like(p_B).index_add(0, owner_M, torch.where(counts_M, x_M, 0.0)) / n_B.clamp(min=1)

    def largest(x_M):
        return torch.zeros_like(p_B).scatter_reduce(0, owner_M, torch.where(counts_M, x_M, 0.0).detach(), "amax")

    mu_B = mean(l_M).detach()
    c_M = torch.where(counts_M, l_M - mu_B[owner_M], 0.0)
    x_M = p_B[owner_M] * c_M
    near_B = largest(x_M.abs()) < 0.5
    near_M, peak_B = near_B[owner_M], largest(x_M)
    flat_B = p_B.abs() < torch.finfo(p_B.dtype).eps  # as good as 0 for |c| up to 100; the gradient divides by p
    p_safe_B = torch.where(flat_B, 1.0, p_B)
    near = torch.where(flat_B, mean(c_M), mean(torch.where(near_M, x_M, 0.0).expm1()).log1p() / p_safe_B)
    far = (peak_B + mean((torch.where(near_M, 0.0, x_M) - peak_B[owner_M]).exp()).clamp(min=1e-30).log()) / p_safe_B
    return mu_B + torch.where(near_B, near, far), n_B


def forward_cost(M: int, B: int, element: int = 4, mask: bool = False) -> Cost:
    """Both log-probabilities (and the mask) twice; of a sequence its bounds (16 bytes) and advantage (4), six numbers
    kept (24), three of which the last program reads (12), and its turn at the counter (4)."""
    once = M * (2 * element + mask)
    return Cost(2 * once + 32 * B, 28 * B + 8, 40 * M, cached=once)


def backward_cost(M: int, B: int, element: int = 4, mask: bool = False) -> Cost:
    """Both log-probabilities (and the mask) once, a gradient out; of a sequence its bounds, advantage and 4 numbers."""
    return Cost(M * (2 * element + mask) + 36 * B, M * element, 10 * M)


@torch.library.custom_op("labkit::holder_objective", mutates_args=())
def _op(logp_M: Tensor, old_logp_M: Tensor, mask_M: Tensor | None, advantage_B: Tensor, cu_seqlens: Tensor | None,
        T: int, p: float, p_B: Tensor | None, log_low: float, log_high: float,
        by_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(*_dense(logp_M, old_logp_M, mask_M, advantage_B, cu_seqlens), T, p, p_B, log_low, log_high,
                          by_token)


@torch.library.custom_op("labkit::holder_objective_backward", mutates_args=())
def _backward_op(grad_loss: Tensor, kept_6B: Tensor, logp_M: Tensor, old_logp_M: Tensor, mask_M: Tensor | None,
                 advantage_B: Tensor, cu_seqlens: Tensor | None, T: int, p: float, p_B: Tensor | None,
                 log_low: float, log_high: float, by_token: bool) -> Tensor:
    return launch_backward(grad_loss, kept_6B, *_dense(logp_M, old_logp_M, mask_M, advantage_B, cu_seqlens), T, p, p_B,
                           log_low, log_high, by_token)


def _dense(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if vector is None else vector.contiguous() for vector in vectors]


@_op.register_fake
def _(logp_M, old_logp_M, mask_M, advantage_B, *settings):
    return tuple(logp_M.new_empty(shape, dtype=torch.float32) for shape in ((), (), (6, advantage_B.shape[0])))


@_backward_op.register_fake
def _(grad_loss, kept_6B, logp_M, *arguments):
    return logp_M.new_empty(logp_M.shape)


def _save(ctx, inputs, output):
    logp_M, old_logp_M, mask_M, advantage_B, cu_seqlens, ctx.T, ctx.p, p_B, *ctx.clip = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else autograd launches a fill for each output without a gradient
    ctx.save_for_backward(output[2], logp_M, old_logp_M, mask_M, advantage_B, cu_seqlens, p_B)


def _backward(ctx, grad_loss, *nothing):
    if grad_loss is None:
        return (None,) * 11
    *tensors, p_B = ctx.saved_tensors
    return _backward_op(grad_loss, *tensors, ctx.T, ctx.p, p_B, *ctx.clip), *(None,) * 10


_op.register_autograd(_backward, setup_context=_save)


def _check(logp: Tensor, old_logp: Tensor, advantage_B: Tensor, cu_seqlens: Tensor | None, p: float | Tensor,
           clip_low: float, clip_high: float, level: str, mask: Tensor | None) -> None:
    padded = cu_seqlens is None
    check_shape("logp", logp, (None, None) if padded else (None,), "[B, T]" if padded else "[M]")
    check_shape("old_logp", old_logp, tuple(logp.shape), "the shape of logp")
    check_shape("advantage_B", advantage_B, (logp.shape[0] if padded else None,), "[B]")
    if mask is not None:
        check_shape("mask", mask, tuple(logp.shape), "the shape of logp")
    for name, tensor in (("logp", logp), ("old_logp", old_logp), ("advantage_B", advantage_B)):
        check_float(name, tensor)
    each = p if isinstance(p, Tensor) else None
    check_devices(logp=logp, old_logp=old_logp, advantage_B=advantage_B, cu_seqlens=cu_seqlens, p=each, mask=mask)
    _check_p(p, len(advantage_B))
    if cu_seqlens is not None:
        _check_bounds(cu_seqlens, len(advantage_B), logp.shape[0])
    if not 0 <= clip_low < 1 or not 0 <= clip_high < math.inf:
        raise LabError(f"Ratios cannot be kept between 1 - {clip_low} and 1 + {clip_high}.",
                       "Use a clip_low from 0 to below 1, and a clip_high of 0 or more.")
    if level not in ("sequence", "token"):
        raise LabError(f"There is no level {level!r}.", 'Choose "sequence" or "token".')


def _check_p(p: float | Tensor, B: int) -> None:
    if not isinstance(p, Tensor):
        return check_finite("p", p)
    check_float("p", p)
    check_shape("p", p, (B,)[: p.ndim], "[] or [B]")
    if _readable(p) and not p.isfinite().all():
        raise LabError("p holds a value that is not finite.", "Give every sequence a finite exponent.")


def _check_bounds(cu_seqlens: Tensor, B: int, M: int) -> None:
    if cu_seqlens.dtype not in IDS:
        raise LabError(f"cu_seqlens has dtype {cu_seqlens.dtype}, but positions are whole numbers.",
                       "Use cu_seqlens.int() or .long().")
    check_shape("cu_seqlens", cu_seqlens, (B + 1,), "[B + 1]")
    if _readable(cu_seqlens) and (cu_seqlens[0] != 0 or cu_seqlens[-1] != M or (cu_seqlens.diff() < 0).any()):
        raise LabError(f"cu_seqlens goes from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
                       f"{', and back in between' if (cu_seqlens.diff() < 0).any() else ''}, for {M} packed tokens.",
                       "It is the running sum of the lengths with a 0 before it: from 0 to M, never decreasing.")


def _readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a GPU."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
