"""The power mean, also called Hölder mean, of positive numbers: every mean between the smallest and the largest.

    M_p(x) = ((1/n) sum_i x_i^p)^(1/p)       M_0 = exp((1/n) sum_i log x_i)       M_inf = max x,  M_-inf = min x

p = 1 is the arithmetic mean, 0 the geometric, -1 the harmonic. It never falls as p rises, and M_-p(x) = 1 / M_p(1/x).
With x the token ratios of an answer it is what holder_objective optimises. Source: Hardy, Littlewood and Pólya,
Inequalities, 1934, chapter 2; as a policy objective, arXiv 2605.12058.
"""

import math

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import check_shape
from labkit.kernels.holder_objective import log_power_mean


def power_mean(x: Tensor, p: float, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """Power mean of exponent `p` along `dim`, over the entries where `mask` is true (all without it).

    Args:
        x: finite numbers of 0 or more; what the mask leaves out may be anything. A single 0 makes the mean 0 for
            p <= 0, its limit there.
        p: any number, also math.inf and -math.inf. Nothing overflows on the way, however large p or x are.
        mask: same shape as x.
    Returns:
        x without `dim`, in fp32 (float64 for float64 x), computed in float64; differentiable with respect to x where
        x > 0. Where no entry counts: NaN, as for any mean of nothing.
    Raises:
        LabError: a negative, infinite or NaN entry that counts, a NaN exponent, a mask of another shape.
    """
    if mask is not None:
        check_shape("mask", mask, tuple(x.shape), "the shape of x")
    if math.isnan(p):
        raise LabError("The exponent p is NaN.", "Give it a number; math.inf and -math.inf stand for max and min.")
    x_RN = x.movedim(dim, -1)
    kept, shape = (torch.float64 if x.dtype == torch.float64 else torch.float32), x_RN.shape[:-1]
    x_RN = x_RN.reshape(math.prod(shape), -1 if x.numel() else x.shape[dim])
    counts_RN = torch.ones_like(x_RN, dtype=torch.bool) if mask is None else (
        mask.movedim(dim, -1).reshape(x_RN.shape) != 0)
    x_RN = torch.where(counts_RN, x_RN.double(), 1.0)
    if not (x_RN.isfinite() & (x_RN >= 0)).all():
        raise LabError("A power mean takes finite numbers of 0 or more, and x holds others.",
                       "Pass ratios or probabilities, not their logarithms; or mask those entries.")
    mean_R = _extreme(x_RN, counts_RN, p) if math.isinf(p) else _finite(x_RN, counts_RN, p)
    return mean_R.masked_fill(~counts_RN.any(1), math.nan).to(kept).reshape(shape)


def _extreme(x_RN: Tensor, counts_RN: Tensor, p: float) -> Tensor:
    if not x_RN.shape[1]:
        return x_RN.sum(1)
    return x_RN.masked_fill(~counts_RN, -p).amax(1) if p > 0 else x_RN.masked_fill(~counts_RN, -p).amin(1)


def _finite(x_RN: Tensor, counts_RN: Tensor, p: float) -> Tensor:
    """Over the positive entries; zeros add nothing to the sum for p > 0, and make the mean 0 otherwise."""
    R, N = x_RN.shape
    positive_RN = counts_RN & (x_RN > 0)
    row_M = torch.arange(R, device=x_RN.device).repeat_interleave(N)
    p_R = torch.full((R,), p, dtype=torch.float64, device=x_RN.device)
    log_x_M = torch.where(positive_RN, x_RN, 1.0).log().flatten()
    log_mean_R, positive_R = log_power_mean(log_x_M, positive_RN.flatten(), row_M, p_R)
    if p <= 0:
        return log_mean_R.exp().masked_fill((positive_RN != counts_RN).any(1), 0.0)
    share_R = positive_R / counts_RN.sum(1).clamp(min=1)
    return (log_mean_R + share_R.log() / p).exp()  # a share of 0 has the logarithm -inf: the mean is 0
