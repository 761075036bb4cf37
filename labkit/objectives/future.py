"""The price of the future: what a token does to the costs of later positions.

The sequence's divergence KL(pi(y|x), pi_T(y|x)) = E sum_t d_t, with d_t = log q(y_t) - log p(y_t), has the gradient

    E sum_t (sum_{t' >= t} d_t') grad log q(y_t)

for a token decides where all later ones are drawn. Token-level distillation keeps t' = t alone: a bias, for a variance
that grows with T and not with T cubed. gamma lies between: d_t + sum_{t' > t} gamma^(t' - t) d_t', at 0 the token's
own, at 1 the whole sum. Sources: arXiv 2603.25562, appendix D and E; tinker-cookbook's kl_discount_factor.
"""

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import check_shape


def future_cost(cost_BA: Tensor, mask_BA: Tensor, gamma: float) -> Tensor:
    """F_t = sum over t' > t of gamma^(t' - t) cost_t', [B, A], within each row and over counted positions; detached.

    Positions that the mask leaves out cost nothing (what stands there may be NaN) and get 0; the distance t' - t counts
    them all the same. As a product with the [A, A] triangle of powers: one matrix product instead of A small steps.
    Raises LabError for a gamma outside [0, 1] or shapes that differ.
    """
    check_shape("mask_BA", mask_BA, tuple(cost_BA.shape), "the shape of cost_BA")
    if not 0 <= gamma <= 1:
        raise LabError(f"Later costs cannot be discounted by gamma={gamma}.", "Use a gamma from 0 to 1.")
    counted_BA = cost_BA.detach().masked_fill(mask_BA == 0, 0.0)
    place_A = torch.arange(cost_BA.shape[1], device=cost_BA.device)
    ahead_AA = place_A[:, None] - place_A[None, :]  # [t', t]
    power_AA = torch.where(ahead_AA > 0, float(gamma) ** ahead_AA.clamp(min=1).to(counted_BA.dtype), 0.0)
    return (counted_BA @ power_AA).masked_fill(mask_BA == 0, 0.0)
