"""K5's kernels: the power mean of each sequence's ratios, the objective over all of them, and its gradient.

The equations are in holder_objective.py. Clipping is written as keeping log-ratios within [lower, upper], and the
sign of the advantage says which of the two exists: (-inf, log(1 + clip_high)] where it is positive, [log(1 - clip_low),
inf) where it is negative, neither at 0.

One program a sequence, so a batch keeps as many multiprocessors busy as it has sequences. Splitting the long ones would
need a second launch, which costs more than it saves up to some 10,000 tokens a sequence.
"""

import torch
from torch import Tensor

from labkit.kernels.configs import Row, settings_for
from labkit.kernels.language import tl, triton

# By the mean length of a sequence. Left to itself, the assembler aims at 32 or 64 registers and spills a few bytes.
SETTINGS = [
    Row("any", 1024, {"BLOCK": 1024, "num_warps": 8, "maxnreg": 96}),
    Row("any", float("inf"), {"BLOCK": 2048, "num_warps": 16, "maxnreg": 96}),
]
# what the forward keeps of each sequence, [6, B]: loss, log M, l*, s, how many were cut, how many count
LOG_RATIO = 1


@triton.jit
def _sequence(cu_seqlens, advantages, p_each, T, B, M, p, stride_p, log_low, log_high):
    """This program's sequence b: start and end, whether cu_seqlens is broken there, advantage, exponent, bounds."""
    b = tl.program_id(0).to(tl.int64)  # b * T passes 2^31 where B * T does
    if cu_seqlens is None:
        start = b * T
        end = start + T
        broken = T < 0  # never; a plain False has no type here
    else:
        first = tl.load(cu_seqlens + b).to(tl.int64)  # a block may reach past 2^31 - 1 even where M does not
        last = tl.load(cu_seqlens + b + 1).to(tl.int64)
        broken = (first < 0) | (last < first) | (last > M) | ((b == 0) & (first != 0)) | ((b == B - 1) & (last != M))
        # kept inside the tensors, and from 0 to M, so that even then each token's gradient is written
        start = tl.where(b == 0, 0, tl.minimum(tl.maximum(first, 0), M))
        end = tl.where(b == B - 1, M, tl.minimum(tl.maximum(last, 0), M))
    advantage = tl.load(advantages + b).to(tl.float32)
    if p_each is not None:
        p = tl.load(p_each + b * stride_p).to(tl.float32)
    lower = tl.where(advantage < 0, log_low, float("-inf"))
    upper = tl.where(advantage > 0, log_high, float("inf"))
    return b, start, end, broken, advantage, p, lower, upper


@triton.jit
def _log_ratios(logp, old_logp, mask, t, end, lower, upper, BY_TOKEN: tl.constexpr):
    """Log-ratios l at positions t, where a token counts, and where (at level "token") it was cut."""
    counts = t < end
    new = tl.load(logp + t, mask=t < end, other=0.0).to(tl.float32)
    old = tl.load(old_logp + t, mask=t < end, other=0.0).to(tl.float32)
    if mask is not None:
        counts = counts & (tl.load(mask + t, mask=t < end, other=0) != 0)
    lr = tl.where(counts, new - old, 0.0)  # a masked token may hold NaN, and 0 * NaN is NaN
    cut = counts & ((lr < lower) | (lr > upper))
    if BY_TOKEN:
        lr = tl.where(cut, tl.where(lr > upper, upper, lower), lr)
    return lr, counts, cut


@triton.jit
def _phi(x):
    """(exp(x) - 1)/x for |x| < 0.5, to 1e-9: the next term is x^9/10!."""
    tail = 1 / 720 + x * (1 / 5040 + x * (1 / 40320 + x * (1 / 362880)))
    return 1.0 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * tail))))


@triton.jit
def _psi(y):
    """log(1 + y)/y for 0 <= y < 0.13, to 1e-9: log(1 + y) = 2 atanh(z), z = y/(2 + y)."""
    z = y / (2.0 + y)
    return 2.0 / (2.0 + y) * (1.0 + z * z * (1 / 3 + z * z * (1 / 5 + z * z * (1 / 7))))


@triton.jit
def _forward_kernel(logp, old_logp, mask, advantages, cu_seqlens, p_each, counter, loss, clip_fraction, kept,
                    M, B, T, p, stride_p, log_low, log_high, BY_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    """One program a sequence: mean and extremes of l, then both sums of the docstring's log M."""
    b, start, end, broken, advantage, p, lower, upper = _sequence(cu_seqlens, advantages, p_each, T, B, M, p, stride_p,
                                                                  log_low, log_high)
    n = 0
    cuts = 0
    total = 0.0
    top = float("-inf")
    bottom = float("inf")
    for first in range(start, end, BLOCK):
        lr, counts, cut = _log_ratios(logp, old_logp, mask, first + tl.arange(0, BLOCK), end, lower, upper, BY_TOKEN)
        n += tl.sum(counts.to(tl.int32), 0)
        cuts += tl.sum(cut.to(tl.int32), 0)
        total += tl.sum(lr, 0)
        top = tl.maximum(top, tl.max(tl.where(counts, lr, float("-inf")), 0))
        bottom = tl.minimum(bottom, tl.min(tl.where(counts, lr, float("inf")), 0))
    size = tl.cast(n, tl.float32)  # 0 where no token counts: what follows is then NaN, and replaced at the end
    mu = total / size
    near = tl.abs(p) * tl.maximum(top - mu, mu - bottom) < 0.5
    small_p = tl.where(near, p, 0.0)
    extreme = tl.where(p > 0, top, bottom)
    weight_sum = 0.0
    excess = 0.0
    for first in range(start, end, BLOCK):
        lr, counts, cut = _log_ratios(logp, old_logp, mask, first + tl.arange(0, BLOCK), end, lower, upper, BY_TOKEN)
        weight_sum += tl.sum(tl.exp(tl.where(counts, p * (lr - extreme), float("-inf"))), 0)
        c = tl.where(counts, lr - mu, 0.0)
        excess += tl.sum(c * _phi(small_p * c), 0)
    excess /= size
    far_log = extreme + tl.log(weight_sum / size) / tl.where(near, 1.0, p)
    log_ratio = tl.where(near, mu + excess * _psi(small_p * excess), far_log)
    log_ratio = tl.where(broken, float("nan"), tl.where(n > 0, log_ratio, 0.0))
    if not BY_TOKEN:
        n = tl.minimum(n, 1)
        cuts = tl.where((log_ratio < lower) | (log_ratio > upper), 1, 0)
    _store_kept(kept, b, B, log_ratio, extreme, weight_sum, cuts, n, advantage, lower, upper)
    # the program that comes last sums what all have stored, always in the same order: no second launch, equal bits
    if tl.atomic_add(counter, 1) == B - 1:  # acquire and release: what others stored before their turn is seen now
        _sum_sequences(kept, loss, clip_fraction, B, BLOCK)


@triton.jit
def _store_kept(kept, b, B, log_ratio, extreme, weight_sum, cuts, counted, advantage, lower, upper):
    """The column of sequence b. (At level "token" log M cannot leave [lower, upper]: every l lies inside.)"""
    log_used = tl.where(log_ratio > upper, upper, tl.where(log_ratio < lower, lower, log_ratio))
    gain = tl.where((counted > 0) & (advantage != 0), advantage * tl.exp(log_used), 0.0)  # 0 * inf would be NaN
    tl.store(kept + b, tl.where(log_ratio == log_ratio, -gain, float("nan")))
    tl.store(kept + 1 * B + b, log_ratio)
    tl.store(kept + 2 * B + b, extreme)
    tl.store(kept + 3 * B + b, weight_sum)
    tl.store(kept + 4 * B + b, cuts.to(tl.float32))
    tl.store(kept + 5 * B + b, counted.to(tl.float32))


@triton.jit
def _sum_sequences(kept, loss, clip_fraction, B, BLOCK: tl.constexpr):
    total = 0.0
    cuts = 0.0
    counted = 0.0
    for first in range(0, B, BLOCK):
        b = first + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(kept + b, mask=b < B, other=0.0), 0)
        cuts += tl.sum(tl.load(kept + 4 * B + b, mask=b < B, other=0.0), 0)
        counted += tl.sum(tl.load(kept + 5 * B + b, mask=b < B, other=0.0), 0)
    tl.store(loss, total / B)
    tl.store(clip_fraction, cuts / tl.maximum(counted, 1.0))


@triton.jit
def _backward_kernel(logp, old_logp, mask, advantages, cu_seqlens, p_each, kept, grad_loss, gradient,
                     M, B, T, p, stride_p, log_low, log_high, BY_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    """One program a sequence. exp(log M + p (l - l*)) / s is M w with one exponent: inf * 0 cannot come up."""
    b, start, end, _, advantage, p, lower, upper = _sequence(cu_seqlens, advantages, p_each, T, B, M, p, stride_p,
                                                             log_low, log_high)
    log_ratio = tl.load(kept + 1 * B + b)
    extreme = tl.load(kept + 2 * B + b)
    weight_sum = tl.load(kept + 3 * B + b)
    scale = -tl.load(grad_loss) * advantage / B / tl.maximum(weight_sum, 1.0)
    held = advantage == 0
    if not BY_TOKEN:
        held = held | (log_ratio < lower) | (log_ratio > upper)
    log_ratio = tl.where(held, float("-inf"), log_ratio)
    for first in range(start, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        lr, counts, cut = _log_ratios(logp, old_logp, mask, t, end, lower, upper, BY_TOKEN)
        if BY_TOKEN:
            counts = counts & ~cut
        d = scale * tl.exp(tl.where(counts, log_ratio + p * (lr - extreme), float("-inf")))
        tl.store(gradient + t, d.to(gradient.dtype.element_ty), mask=t < end)


def launch_forward(logp_M: Tensor, old_logp_M: Tensor, mask_M: Tensor | None, advantage_B: Tensor,
                   cu_seqlens: Tensor | None, T: int, p: float, p_B: Tensor | None, log_low: float, log_high: float,
                   by_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and clip fraction, both [], and what is kept of the sequences, [6, B]; all fp32."""
    M, B, device = len(logp_M), len(advantage_B), logp_M.device
    if not B:
        return tuple(torch.zeros(shape, device=device) for shape in ((), (), (6, 0)))
    loss, clip_fraction, kept_6B = (torch.empty(shape, device=device) for shape in ((), (), (6, B)))
    counter = torch.zeros((), dtype=torch.int32, device=device)
    _forward_kernel[(B,)](logp_M, old_logp_M, mask_M, advantage_B, cu_seqlens, p_B, counter, loss, clip_fraction,
                          kept_6B, M, B, T, p, 0 if p_B is None else p_B.stride(0), log_low, log_high,
                          BY_TOKEN=by_token, **settings_for("holder_objective", SETTINGS, M // B, device))
    return loss, clip_fraction, kept_6B


def launch_backward(grad_loss: Tensor, kept_6B: Tensor, logp_M: Tensor, old_logp_M: Tensor, mask_M: Tensor | None,
                    advantage_B: Tensor, cu_seqlens: Tensor | None, T: int, p: float, p_B: Tensor | None,
                    log_low: float, log_high: float, by_token: bool) -> Tensor:
    """The gradient of logp, [M]."""
    M, B = len(logp_M), len(advantage_B)
    out_M = torch.empty(M, dtype=logp_M.dtype, device=logp_M.device)
    if B:
        _backward_kernel[(B,)](logp_M, old_logp_M, mask_M, advantage_B, cu_seqlens, p_B, kept_6B, grad_loss, out_M,
                               M, B, T, p, 0 if p_B is None else p_B.stride(0), log_low, log_high, BY_TOKEN=by_token,
                               **settings_for("holder_objective", SETTINGS, M // B, logp_M.device))
    return out_M
