"""K9, first part. The pyramid of Lighthouse attention: means of p, p^2, ... neighbours, and scores to choose them by.

    X^(l)_i = mean of X_j for j in [i p^l, (i + 1) p^l)      X in {Q, K, V}, l = 1 ... L - 1
    score   = ||Q_j||, ||K_j|| of a token; of a pooled entry the largest of its tokens
    dX_j    = sum over l of dX^(l)_i / p^l                   i = j // p^l; scores are for choosing and have no gradient

One program takes ROWS windows of the coarsest level and climbs: p tokens make an entry of level 1, p of these one of
level 2. So the base is read once for all levels, all sums are in fp32, and each result is rounded once.

Bytes, with e an element: forward (T + M) (H + 2 J) K e and 4 N (H + J) of scores, where M is about T / (p - 1);
backward the same without scores. FLOPs about 3 (H + 2 J) T K: memory decides.
Eager torch reads each level again to make the next, and every norm is a pass of its own.

Source: arXiv 2605.06554, section 3; the official code pools and scores in separate passes over a concatenated copy.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from labkit.kernels.checks import check_devices, check_float, check_kernel_dtype
from labkit.kernels.cost import Cost
from labkit.kernels.dispatch import choose
from labkit.kernels.layout import dense_rows
from labkit.kernels.lighthouse_levels import Levels, check_heads, check_levels
from labkit.kernels.lighthouse_pool_kernels import launch_backward, launch_forward


class Pyramid(NamedTuple):
    """The pooled entries of levels 1 ... L - 1, and the two scores of all N entries."""

    q_BMHK: Tensor
    k_BMHK: Tensor
    v_BMHK: Tensor
    q_score_BHN: Tensor
    k_score_BHN: Tensor


def pyramid_pool(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, p: int, levels: int, *, impl: str = "auto") -> Pyramid:
    """Means of every level above the tokens, and norms with their maxima. q, k, v come after RoPE.

    Args:
        q_BTHK: fp16, bf16 or fp32 (float64 with the reference); any strides.
        k_BTHK, v_BTHK: the same, or with fewer heads J, each for H / J query heads; so are then their entries and k's
            scores.
        p: neighbours that are pooled.
        levels: L, the tokens' own included. Tokens behind the last whole window of p^(L-1) are pooled nowhere.
    Returns:
        Entries in the dtypes of q, k and v; scores in fp32.
    Raises:
        LabError: shapes, devices, dtypes, p or levels that do not fit.
    """
    check_heads(q_BTHK, k_BTHK, v_BTHK)
    check_levels(p, levels)
    named = {"q_BTHK": q_BTHK, "k_BTHK": k_BTHK, "v_BTHK": v_BTHK}
    for name, x in named.items():
        check_float(name, x)
    check_devices(**named)
    if not choose(impl, q_BTHK):
        return reference(q_BTHK, k_BTHK, v_BTHK, p, levels)
    for name, x in named.items():
        check_kernel_dtype(name, x)
    *coarse, q_score, k_score = _op(q_BTHK, k_BTHK, v_BTHK, p, levels)
    return Pyramid(*coarse, q_score.detach(), k_score.detach())


def reference(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, p: int, levels: int) -> Pyramid:
    """The same in plain torch, level after level."""
    place = Levels(q_BTHK.shape[1], p, levels)
    with torch.no_grad():
        scores = [highest(norms(x_BTHK), place) for x_BTHK in (q_BTHK, k_BTHK)]
    return Pyramid(*(pooled(x_BTHK, place) for x_BTHK in (q_BTHK, k_BTHK, v_BTHK)), *scores)


def pooled(x_BTHK: Tensor, place: Levels) -> Tensor:
    """Means of p, p^2, ... neighbours, [B, M, H, K]."""
    level_BTHK, coarse = x_BTHK[:, : place.whole], [x_BTHK[:, :0]]
    for _ in range(1, place.count):
        level_BTHK = level_BTHK.unflatten(1, (level_BTHK.shape[1] // place.pooling, place.pooling)).mean(2)
        coarse.append(level_BTHK)
    return torch.cat(coarse, 1)


def norms(x_BTHK: Tensor) -> Tensor:
    """||x|| of every token and head, in float32 or better."""
    return x_BTHK.to(torch.promote_types(x_BTHK.dtype, torch.float32)).norm(dim=-1)


def highest(score_BTH: Tensor, place: Levels) -> Tensor:
    """Scores of all entries: of a pooled one the largest of the tokens in it, [B, H, N]."""
    score_BHT = score_BTH.transpose(1, 2)
    level_BHT, scores = score_BHT[..., : place.whole], [score_BHT]
    for _ in range(1, place.count):
        level_BHT = level_BHT.unflatten(2, (level_BHT.shape[2] // place.pooling, place.pooling)).amax(3)
        scores.append(level_BHT)
    return torch.cat(scores, 2)


def forward_cost(B: int, T: int, H: int, J: int, K: int, p: int, levels: int, element: int = 2) -> Cost:
    """The tokens in once (v without its tail), the M entries of each out, and fp32 scores of all N entries."""
    place = Levels(T, p, levels)
    N, row = place.starts[-1], B * K * element
    return Cost(row * (T * (H + J) + _pooled_tokens(place) * J), row * (N - T) * (H + 2 * J) + 4 * B * N * (H + J),
                B * K * T * (3 * (H + J) + J))


def backward_cost(B: int, T: int, H: int, J: int, K: int, p: int, levels: int, element: int = 2) -> Cost:
    """The tokens' gradient out. For p tokens one row of each level in: the M entries' gradients, coarse ones again."""
    place, row = Levels(T, p, levels), B * (H + 2 * J) * K * element
    M = place.starts[-1] - T
    requested = _pooled_tokens(place) // p * (levels - 1)
    return Cost(row * requested, row * T, B * (H + 2 * J) * K * 2 * requested, row * (requested - M))


def _pooled_tokens(place: Levels) -> int:
    return place.whole if place.count > 1 else 0


@torch.library.custom_op("labkit::pyramid_pool", mutates_args=())
def _op(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, p: int,
        levels: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return launch_forward(dense_rows(q_BTHK), dense_rows(k_BTHK), dense_rows(v_BTHK), p, levels)


@torch.library.custom_op("labkit::pyramid_pool_backward", mutates_args=())
def _backward_op(q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, T: int, p: int,
                 levels: int) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward((q_grad.contiguous(), k_grad.contiguous(), v_grad.contiguous()), T, p, levels)


@_op.register_fake
def _(q_BTHK, k_BTHK, v_BTHK, p, levels):
    B, T, _, K = q_BTHK.shape
    N = Levels(T, p, levels).starts[-1]
    coarse = (x.new_empty(B, N - T, x.shape[2], K) for x in (q_BTHK, k_BTHK, v_BTHK))
    return *coarse, *(x.new_empty(B, x.shape[2], N, dtype=torch.float32) for x in (q_BTHK, k_BTHK))


@_backward_op.register_fake
def _(q_grad, k_grad, v_grad, T, p, levels):
    return tuple(g.new_empty(g.shape[0], T, *g.shape[2:]) for g in (q_grad, k_grad, v_grad))


def _save(ctx, inputs, output):
    q_BTHK, _, _, *ctx.pyramid = inputs
    ctx.T = q_BTHK.shape[1]


def _backward(ctx, q_grad, k_grad, v_grad, *_):
    return *_backward_op(q_grad, k_grad, v_grad, ctx.T, *ctx.pyramid), None, None


_op.register_autograd(_backward, setup_context=_save)
