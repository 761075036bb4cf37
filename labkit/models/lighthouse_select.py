"""What Lighthouse attention looks at: the choice among the entries of its pyramid (labkit.kernels.lighthouse_pool).

    S = T / p^(L-1) + (L - 1) p k      entries chosen by their scores, for every head alike; levels l = 0 ... L - 1

Entries of all levels stand one behind the other: 0 ... T - 1 are the tokens, then come level 1, level 2 and so on,
N in all. Positions behind the last whole window of p^(L-1) (the tail) are pooled nowhere and always chosen.
The cascade is what the official code does (ighoshsubho/lighthouse-attention), the joint choice what Eq. 6 of the
paper says (Peng, Ghosh and Quesnelle, arXiv 2605.06554). Choices are integers: no gradient flows through scores.
Letters: B batch, H heads, T positions, K head size, N entries, M = N - T pooled entries, S chosen entries, G tiles,
C candidates of a tile.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from labkit.kernels.lighthouse_levels import Levels
from labkit.kernels.lighthouse_pool import Pyramid

Scorer = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # q, k, v [B, T, H, K] -> two scores [B, T, H]
NOT_THERE = -1.0  # score of an empty slot: below every norm
TAKEN = float("-inf")  # score of a candidate that the first of the two rankings has chosen


class RandomScores:
    """The control: scores that know nothing of the input, drawn afresh at each call."""

    def __init__(self, seed: int):
        self.seed, self.calls = seed, 0

    def __call__(self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.calls)  # on the CPU: any device alike
        drawn = torch.rand(2, *q_BTHK.shape[:3], generator=generator).to(q_BTHK.device)
        return drawn[0], drawn[1]


def cascade(pyramid: Pyramid, place: Levels, k: int, m: int) -> Tensor:
    """From coarse to fine, in k / m tiles that never compete: the entries chosen, [B, H, slots], -1 where empty.

    Every candidate is chosen. Of each tile's candidates the m / 2 with the largest query score and, among the rest,
    the m / 2 with the largest key score are split into their p children, the candidates of the next level.
    """
    scores = pyramid.q_score_BHN, pyramid.k_score_BHN
    B, H, _ = scores[0].shape
    candidate_BHGC = in_tiles(place.sizes[-1], k // m, scores[0].device).expand(B, H, -1, -1)
    chosen = [numbered(candidate_BHGC, place.starts[place.count - 1])]
    for level in range(place.count - 1, 0, -1):
        span = slice(place.starts[level], place.starts[level + 1])
        parent_BHGP = two_rankings(candidate_BHGC, *(score_BHN[..., span] for score_BHN in scores), m)
        candidate_BHGC = children(parent_BHGP, place.pooling)
        chosen.append(numbered(candidate_BHGC, place.starts[level - 1]))
    return torch.cat([entries.flatten(2) for entries in chosen] + [tail(place, B, H, scores[0].device)], 2)


def in_tiles(entries: int, tiles: int, device: torch.device) -> Tensor:
    """0 ... entries - 1 cut into [G, C], the last tile filled up with -1."""
    width = -(-entries // tiles)
    index = torch.arange(tiles * width, device=device)
    return torch.where(index < entries, index, -1).view(tiles, width)


def two_rankings(candidate_BHGC: Tensor, q_score_BHC: Tensor, k_score_BHC: Tensor, m: int) -> Tensor:
    """The m / 2 candidates of largest query score, then the m / 2 of largest key score among the rest."""
    q_BHGC, k_BHGC = (scores_of(candidate_BHGC, score_BHC) for score_BHC in (q_score_BHC, k_score_BHC))
    m = min(m, candidate_BHGC.shape[-1])
    by_query = q_BHGC.topk(m - m // 2, dim=-1).indices
    by_key = k_BHGC.scatter(-1, by_query, TAKEN).topk(m // 2, dim=-1).indices
    return candidate_BHGC.gather(-1, torch.cat((by_query, by_key), -1))


def scores_of(candidate_BHGC: Tensor, score_BHC: Tensor) -> Tensor:
    """The score of each candidate; an empty slot has the lowest there is."""
    if not score_BHC.shape[-1]:
        return candidate_BHGC.to(score_BHC.dtype)
    found = score_BHC.gather(2, candidate_BHGC.clamp(min=0).flatten(2)).view(candidate_BHGC.shape)
    return found.masked_fill(candidate_BHGC < 0, NOT_THERE)


def children(parent_BHGP: Tensor, p: int) -> Tensor:
    """The p entries of the next finer level that each parent is the mean of; an empty slot has empty children."""
    child = parent_BHGP[..., None] * p + torch.arange(p, device=parent_BHGP.device)
    return torch.where(parent_BHGP[..., None] < 0, -1, child).flatten(3)


def numbered(index: Tensor, start: int) -> Tensor:
    """Indices inside a level as entries of the pyramid; empty slots stay empty."""
    return torch.where(index < 0, -1, index + start)


def tail(place: Levels, B: int, H: int, device: torch.device) -> Tensor:
    """The positions behind the last whole window."""
    return torch.arange(place.whole, place.T, device=device).expand(B, H, -1)


def joint(pyramid: Pyramid, place: Levels, k: int, m: int) -> Tensor:
    """The coarsest level, and the (L - 1) p k best of all finer entries in one ranking: no tiles, no cascade.

    Half of them by query score, half by key score among the rest; `m` has no part in it.
    """
    scores = pyramid.q_score_BHN, pyramid.k_score_BHN
    B, H, N = scores[0].shape
    device, coarsest = scores[0].device, place.starts[place.count - 1]
    finer = torch.arange(coarsest, device=device)
    finer = finer[(finer < place.whole) | (finer >= place.T)].expand(B, H, 1, -1)
    best = two_rankings(finer, *scores, (place.count - 1) * place.pooling * k).flatten(2)
    top = torch.arange(coarsest, N, device=device).expand(B, H, -1)
    return torch.cat((best, top, tail(place, B, H, device)), 2)


def in_order(chosen_BHS: Tensor, place: Levels) -> Tensor:
    """Entries sorted by where their window ends, finer before coarser, empty slots last.

    An entry then stands behind everything that it sums up, and before all that begins later: with a plain triangular
    mask nothing looks ahead. The official code sorts by floating-point keys, equal but for their ties at long T.
    """
    level, index = place.place(chosen_BHS.clamp(min=0))
    end = (index + 1) * place.pooling**level
    key = torch.where(chosen_BHS < 0, torch.iinfo(torch.int64).max, end * place.count + level)
    return chosen_BHS.gather(2, key.argsort(dim=2))
