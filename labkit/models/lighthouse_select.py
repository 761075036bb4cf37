"""What Lighthouse attention looks at: a pyramid of pooled entries, their scores, and the choice among them.

    X^(l)_i = mean of X_j for j in [i p^l, (i + 1) p^l)      X in {Q, K, V}, levels l = 0 (the tokens) ... L - 1
    score   = the largest ||Q_j||, and the largest ||K_j||, of the same range
    S       = T / p^(L-1) + (L - 1) p k                      entries chosen, for every head alike

Entries of all levels stand one behind the other: 0 ... T - 1 are the tokens, then come level 1, level 2 and so on,
N in all. Positions behind the last whole window of p^(L-1) (the tail) are pooled nowhere and always chosen.
The cascade is what the official code does (ighoshsubho/lighthouse-attention), the joint choice what Eq. 6 of the
paper says (Peng, Ghosh and Quesnelle, arXiv 2605.06554). Choices are integers: no gradient flows through scores.
Letters: B batch, H heads, T positions, K head size, N entries, M = N - T pooled entries, S chosen entries, G tiles,
C candidates of a tile.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Scorer = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # q, k, v [B, T, H, K] -> two scores [B, T, H]
NOT_THERE = -1.0  # score of an empty slot: below every norm
TAKEN = float("-inf")  # score of a candidate that the first of the two rankings has chosen


@dataclass(frozen=True)
class Levels:
    """Where the entries of each level stand, for T positions pooled by p."""

    T: int
    pooling: int
    count: int  # L

    @property
    def whole(self) -> int:
        """Positions that lie in whole windows of the coarsest level."""
        return self.T - self.T % self.pooling ** (self.count - 1)

    @property
    def sizes(self) -> list[int]:
        """Entries of each level; level 0 has the tail too."""
        return [self.T, *(self.whole // self.pooling**level for level in range(1, self.count))]

    @property
    def starts(self) -> list[int]:
        """The first entry of each level, and N behind them."""
        return [0, *accumulate(self.sizes)]

    def place(self, entry: Tensor) -> tuple[Tensor, Tensor]:
        """(level, index inside it) of entries 0 ... N - 1."""
        start_L = torch.tensor(self.starts[:-1], device=entry.device)
        level = torch.bucketize(entry, start_L[1:], right=True)
        return level, entry - start_L[level]


class Pyramid(NamedTuple):
    """The pooled entries of levels 1 ... L - 1, and the two scores of all N entries."""

    q_BMHK: Tensor
    k_BMHK: Tensor
    v_BMHK: Tensor
    q_score_BHN: Tensor
    k_score_BHN: Tensor


def pyramid_pool(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, p: int, levels: int) -> Pyramid:
    """Means of every level above the tokens, and norms with their maxima. q, k, v come after RoPE."""
    place = Levels(q_BTHK.shape[1], p, levels)
    with torch.no_grad():
        scores = [highest(score_BTH, place) for score_BTH in norm_scores(q_BTHK, k_BTHK, v_BTHK)]
    return Pyramid(*(pooled(x_BTHK, place) for x_BTHK in (q_BTHK, k_BTHK, v_BTHK)), *scores)


def pooled(x_BTHK: Tensor, place: Levels) -> Tensor:
    """Means of p, p^2, ... neighbours, [B, M, H, K]."""
    level_BTHK, coarse = x_BTHK[:, : place.whole], [x_BTHK[:, :0]]
    for _ in range(1, place.count):
        level_BTHK = level_BTHK.unflatten(1, (level_BTHK.shape[1] // place.pooling, place.pooling)).mean(2)
        coarse.append(level_BTHK)
    return torch.cat(coarse, 1)


def highest(score_BTH: Tensor, place: Levels) -> Tensor:
    """Scores of all entries: of a pooled one the largest of the tokens in it, [B, H, N]."""
    score_BHT = score_BTH.transpose(1, 2)
    level_BHT, scores = score_BHT[..., : place.whole], [score_BHT]
    for _ in range(1, place.count):
        level_BHT = level_BHT.unflatten(2, (level_BHT.shape[2] // place.pooling, place.pooling)).amax(3)
        scores.append(level_BHT)
    return torch.cat(scores, 2)


def norm_scores(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> tuple[Tensor, Tensor]:
    """||q|| and ||k|| of every token and head, in float32 or better."""
    return tuple(x.detach().to(torch.promote_types(x.dtype, torch.float32)).norm(dim=-1) for x in (q_BTHK, k_BTHK))


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


def inverted(index_BHS: Tensor, size: int) -> Tensor:
    """For each of `size` entries its row in `index_BHS`, or -1, [B, H, size]."""
    B, H, S = index_BHS.shape
    row_BHS = torch.arange(S, device=index_BHS.device).expand(B, H, S)
    target = torch.where(index_BHS < 0, size, index_BHS)  # empty slots go to a place that is cut off
    return index_BHS.new_full((B, H, size + 1), -1).scatter(2, target, row_BHS)[..., :size]


class TakeRows(torch.autograd.Function):
    """y_s = x_index(s), zero where the index is -1. No row is taken twice, so the gradient is the same operation with
    the inverse index: a look-up too, without atomic additions, and equal bit for bit in every run."""

    @staticmethod
    def forward(ctx, x_BHNK: Tensor, index_BHS: Tensor) -> Tensor:
        ctx.save_for_backward(index_BHS)
        ctx.rows = x_BHNK.shape[2]
        return look_up(x_BHNK, index_BHS)

    @staticmethod
    def backward(ctx, grad_BHSK: Tensor) -> tuple[Tensor, None]:
        (index_BHS,) = ctx.saved_tensors
        return TakeRows.apply(grad_BHSK, inverted(index_BHS, ctx.rows)), None


def look_up(x_BHNK: Tensor, index_BHS: Tensor) -> Tensor:
    """Rows of x by index, zero where it is -1."""
    B, H, N, K = x_BHNK.shape
    head_BH1 = torch.arange(B * H, device=index_BHS.device).view(B, H, 1)
    if not N:
        return x_BHNK.new_zeros(B, H, index_BHS.shape[2], K)
    flat = x_BHNK.reshape(B * H * N, K)
    rows = flat.index_select(0, (head_BH1 * N + index_BHS.clamp(min=0)).flatten()).view(B, H, -1, K)
    return rows.masked_fill_((index_BHS < 0)[..., None], 0)


def gather_select(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, pyramid: Pyramid,
                  index_BHS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The chosen entries of queries, keys and values, each [B, H, S, K]."""
    bases, coarse = (q_BTHK, k_BTHK, v_BTHK), pyramid[:3]
    return tuple(TakeRows.apply(torch.cat((x_BTHK, y_BMHK), 1).transpose(1, 2), index_BHS)
                 for x_BTHK, y_BMHK in zip(bases, coarse, strict=True))


def unselect(out_BHSK: Tensor, inverse_BHN: Tensor, T: int, p: int, levels: int) -> Tensor:
    """Outputs of chosen entries summed at the positions that they stand for, [B, T, H, K].

    Entry i of level l reaches positions i f + f - 1 ... i f + 2 f - 2 (f = p^l): from the last token it sums up, so
    that no position hears of a later one. Read from the position's side, n has one source a level, (n - f + 1) // f:
    each level is a repeat and a shift, and their sum has a fixed order. Sums are in float32 or better.
    """
    place = Levels(T, p, levels)
    spread_BHNK = TakeRows.apply(out_BHSK, inverse_BHN).to(torch.promote_types(out_BHSK.dtype, torch.float32))
    total_BHTK = spread_BHNK[:, :, :T]
    for level, (start, end) in enumerate(pairwise(place.starts)):
        if level:
            f = p**level
            wide_BHTK = spread_BHNK[:, :, start:end].repeat_interleave(f, 2)
            total_BHTK = total_BHTK + F.pad(wide_BHTK, (0, 0, f - 1, T))[:, :, :T]
    return total_BHTK.to(out_BHSK.dtype).transpose(1, 2)
