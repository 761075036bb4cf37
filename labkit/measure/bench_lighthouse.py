"""Benchmarks of the three Lighthouse kernels: sizes, inputs, calls, costs, and the eager forms they are compared with.

The choice is one that Lighthouse attention makes: of tokens whose norms differ, in causal order, as long as the budget
says. Sizes: a layer of 16 heads at 131,072 positions, of which 12,288 entries are attended.
Letters as in labkit.kernels.lighthouse_levels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from labkit import kernels
from labkit.kernels.lighthouse_levels import Levels
from labkit.measure.bench_inputs import normal
from labkit.models.lighthouse import Lighthouse

P, L = 4, 3
SIZES = {"B": 1, "T": 131_072, "H": 16, "J": 16, "K": 128, "budget": 512}
SMALL = {"B": 1, "T": 75, "H": 4, "J": 2, "K": 36, "budget": 4}


def method(budget: int) -> Lighthouse:
    """With the official code's tile of 128, or a smaller one for a smaller budget."""
    return Lighthouse(P, L, budget, min(budget, 128))


def tokens_of(N: int) -> int:
    """T of a pyramid of N entries: each whole window has as many of them, and what is left over is the tail."""
    window = Levels(P ** (L - 1), P, L)
    return N // window.starts[-1] * window.T + N % window.starts[-1]


# ---- inputs


def heads(g: torch.Generator, dtype: torch.dtype, B: int, T: int, H: int, J: int, K: int, budget: int = 0) -> dict:
    """q, k and v whose tokens differ in size by a factor of e or so: a choice by norms has something to find."""
    sizes = {"q_BTHK": H, "k_BTHK": J, "v_BTHK": J}
    return {name: normal(g, B, T, count, K, dtype=dtype).mul_(normal(g, B, T, count, 1, scale=0.5).exp_())
            for name, count in sizes.items()}


def chosen(g: torch.Generator, dtype: torch.dtype, budget: int, **sizes: int) -> dict:
    """q, k, v, their pooled entries, and the index of those that are chosen."""
    tokens = heads(g, dtype, **sizes)
    pyramid, selection = choice(method(budget), *tokens.values())
    coarse = dict(zip(("q_BMHK", "k_BMHK", "v_BMHK"), pyramid, strict=False))
    return tokens | coarse | {"index_BHS": selection.index_BHS}


def attended(g: torch.Generator, dtype: torch.dtype, budget: int, **sizes: int) -> dict:
    """Outputs of attention, and the choice both ways: a form that scatters starts from the index."""
    _, selection = choice(method(budget), *heads(g, dtype, **sizes).values())
    return {"out_BHSK": normal(g, *selection.index_BHS.shape, sizes["K"], dtype=dtype),
            "inverse_BHN": selection.inverse_BHN, "index_BHS": selection.index_BHS}


@torch.no_grad()
def choice(attention: Lighthouse, q_BTHK: Tensor, k_BTJK: Tensor, v_BTJK: Tensor) -> tuple:
    """The pyramid, and what is chosen of it; each query head chooses for itself."""
    pyramid = kernels.pyramid_pool(q_BTHK, k_BTJK, v_BTJK, P, L)
    k_score = pyramid.k_score_BHN.repeat_interleave(q_BTHK.shape[2] // k_BTJK.shape[2], 1)
    return pyramid, attention.select(pyramid._replace(k_score_BHN=k_score), q_BTHK.shape[1])


# ---- ours


def pool(impl: str, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> tuple[Tensor, ...]:
    return kernels.pyramid_pool(q_BTHK, k_BTHK, v_BTHK, P, L, impl=impl)


def gather(impl: str, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, q_BMHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor,
           index_BHS: Tensor) -> tuple[Tensor, ...]:
    return kernels.gather_select(q_BTHK, k_BTHK, v_BTHK, (q_BMHK, k_BMHK, v_BMHK), index_BHS, impl=impl)


def unselect(impl: str, out_BHSK: Tensor, inverse_BHN: Tensor, index_BHS: Tensor) -> Tensor:
    return kernels.unselect(out_BHSK, inverse_BHN, tokens_of(inverse_BHN.shape[2]), P, L, impl=impl)


def taken(*wanted: str) -> Callable[..., dict[str, int]]:
    """What a cost function takes, out of the sizes and of what follows from them."""
    def sizes(budget: int, **given: int) -> dict[str, int]:
        T = given["T"]
        known = given | {"S": method(budget).length(T), "N": Levels(T, P, L).starts[-1], "p": P, "levels": L}
        return {name: known[name] for name in wanted}

    return sizes


POOL_COST = taken("B", "T", "H", "J", "K", "p", "levels")
GATHER_COST = taken("B", "H", "S", "K")
GATHER_BACKWARD_COST = taken("B", "H", "J", "S", "N", "K")
UNSELECT_COST = taken("B", "H", "T", "S", "K", "p", "levels")


# ---- the same in eager torch, as the official Python goes about it


def pool_by_levels(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> tuple[Tensor, ...]:
    """The base is read again for each level, and once more for its norms."""
    means = [torch.cat([level.mean(2) for level in windows(x)], 1) for x in (q_BTHK, k_BTHK, v_BTHK)]
    norms = [x.detach().float().norm(dim=-1) for x in (q_BTHK, k_BTHK)]
    return *means, *(torch.cat([norm, *(level.amax(2) for level in windows(norm))], 1).mT for norm in norms)


def windows(x_BTHK: Tensor) -> list[Tensor]:
    """The tokens cut into the windows of each level above them."""
    place = Levels(x_BTHK.shape[1], P, L)
    return [x_BTHK[:, : place.whole].unflatten(1, (size, -1)) for size in place.sizes[1:]]


def three_gathers(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, q_BMHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor,
                  index_BHS: Tensor) -> tuple[Tensor, ...]:
    """Base and pyramid are copied into one tensor first, thrice."""
    H, K = index_BHS.shape[1], q_BTHK.shape[3]
    index_BHSK = index_BHS.clamp(min=0)[..., None].expand(-1, -1, -1, K)
    return tuple(torch.cat(parts, 1).transpose(1, 2).repeat_interleave(H // parts[0].shape[2], 1).gather(2, index_BHSK)
                 for parts in ((q_BTHK, q_BMHK), (k_BTHK, k_BMHK), (v_BTHK, v_BMHK)))


def scatter_add(out_BHSK: Tensor, inverse_BHN: Tensor, index_BHS: Tensor) -> Tensor:
    """Every row, repeated as often as its entry may have positions, is added to zeros: with atomics on a GPU."""
    T, (B, H, _, K) = tokens_of(inverse_BHN.shape[2]), out_BHSK.shape
    level_BHS, i_BHS = Levels(T, P, L).place(index_BHS.clamp(min=0))
    f_BHS1, step = P ** level_BHS[..., None], torch.arange(P ** (L - 1), device=index_BHS.device)
    n_BHSF = (i_BHS[..., None] + 1) * f_BHS1 - 1 + step
    reached = (step < f_BHS1) & (n_BHSF < T) & (index_BHS[..., None] >= 0)
    target = torch.where(reached, n_BHSF, T).flatten(2)[..., None].expand(-1, -1, -1, K)
    added = out_BHSK.new_zeros(B, H, T + 1, K).scatter_add(2, target, out_BHSK.repeat_interleave(len(step), 2))
    return added[:, :, :T].transpose(1, 2)
