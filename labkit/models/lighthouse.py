"""Lighthouse attention: dense attention on a short, chosen sequence, for training only.

    entries = cascade(scores of the pyramid)          S of them, in causal order (lighthouse_select)
    out     = softmax(Q~ K~^T / sqrt(K) + causal) V~  the ordinary kernel, S x S instead of T x T
    y_n     = sum over levels of the out whose entry stands for n

It holds no weights, so a GPT can change between it and dense attention at any step, layer by layer:
    model.attention = lighthouse_layers(model.config.layers, Lighthouse(...))
    model.attention = sdpa_attention                                                    later
It sees all queries at once, so it cannot decode; training with it ends in steps with dense attention.
The *choice* may depend on later positions (notebook 03 measures that); with a choice held fixed nothing looks ahead.
Source: Peng, Ghosh and Quesnelle, "Long Context Pre-Training with Lighthouse Attention", arXiv 2605.06554.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels import gather_select, pyramid_pool, unselect
from labkit.kernels.lighthouse_levels import Levels, inverted
from labkit.kernels.lighthouse_pool import Pyramid, highest
from labkit.models.attention import sdpa_attention
from labkit.models.lighthouse_select import Scorer, cascade, in_order, joint

CHOICES = {"cascade": cascade, "joint": joint}


class Selection(NamedTuple):
    """Which entries attention sees, in order, and where each entry of the pyramid stands among them."""

    index_BHS: Tensor
    inverse_BHN: Tensor


@dataclass(frozen=True)
class Lighthouse:
    """An attention function with the signature of `sdpa_attention`. Keys and values may have fewer heads.

    Raises:
        LabError: sizes that fit no pyramid; a mask, or fewer queries than keys (decoding), in a call.
    """

    pooling: int = 4  # p
    levels: int = 3  # L; 1 is dense attention
    budget: int = 8  # k
    tile: int = 8  # m; the official code has 128
    choice: str = "cascade"  # or "joint"
    scorer: Scorer | None = None  # norms by default

    def __post_init__(self):
        p, L, k, m = self.pooling, self.levels, self.budget, self.tile
        if p < 2 or L < 1 or m < 2 or m % 2 or k < m or k % m:
            raise LabError(f"Pooling {p}, {L} levels, budget {k} and tile {m} fit no pyramid.",
                           "Use pooling >= 2, levels >= 1, an even tile, and a budget that is a multiple of it.")
        if self.choice not in CHOICES:
            raise LabError(f"There is no choice {self.choice!r}.", f"Choose one of {', '.join(CHOICES)}.")

    def __call__(self, q_BHTK: Tensor, k_BJTK: Tensor, v_BJTK: Tensor, mask_BTU: Tensor | None = None) -> Tensor:
        if mask_BTU is not None:
            raise LabError("Lighthouse attention cannot keep packed documents apart: it takes no mask.",
                           "Give windows of one text, or use dense attention.")
        if q_BHTK.shape[2] != k_BJTK.shape[2]:
            raise LabError("Lighthouse attention needs all queries at once and cannot decode.",
                           "Set model.attention = sdpa_attention before sampling.")
        q_BTHK, k_BTJK, v_BTJK = positions_first(q_BHTK, k_BJTK, v_BJTK)
        pyramid = self.pyramid(q_BTHK, k_BTJK, v_BTJK)
        chosen = self.select(pyramid, q_BTHK.shape[1])
        return self.attend(q_BTHK, k_BTJK, v_BTJK, pyramid, chosen).transpose(1, 2)

    def place(self, T: int) -> Levels:
        """Where the entries of T positions stand."""
        return Levels(T, self.pooling, self.levels)

    def pyramid(self, q_BTHK: Tensor, k_BTJK: Tensor, v_BTJK: Tensor) -> Pyramid:
        """Pooled entries, and scores by the scorer: k's too for every query head, since each chooses for itself."""
        pyramid = pyramid_pool(q_BTHK, k_BTJK, v_BTJK, self.pooling, self.levels)
        *pooled, q_score_BHN, k_score_BJN = pyramid
        if self.scorer is not None:
            with torch.no_grad():
                place = self.place(q_BTHK.shape[1])
                q_score_BHN, k_score_BJN = (highest(x, place) for x in self.scorer(q_BTHK, k_BTJK, v_BTJK))
        times = q_score_BHN.shape[1] // k_score_BJN.shape[1]
        return Pyramid(*pooled, q_score_BHN, k_score_BJN.repeat_interleave(times, 1) if times > 1 else k_score_BJN)

    def select(self, pyramid: Pyramid, T: int) -> Selection:
        """The choice for T positions."""
        place = self.place(T)
        index_BHS = in_order(CHOICES[self.choice](pyramid, place, self.budget, self.tile), place)
        return Selection(index_BHS, inverted(index_BHS, place.starts[-1]))

    def attend(self, q_BTHK: Tensor, k_BTJK: Tensor, v_BTJK: Tensor, pyramid: Pyramid, chosen: Selection) -> Tensor:
        """Attention on a given choice, [B, T, H, K]. A position without a contributor gets zeros."""
        short = gather_select(q_BTHK, k_BTJK, v_BTJK, pyramid, chosen.index_BHS, trusted=True)
        out_BHSK = F.scaled_dot_product_attention(*short, is_causal=True)
        return unselect(out_BHSK, chosen.inverse_BHN, q_BTHK.shape[1], self.pooling, self.levels, trusted=True)

    def length(self, T: int) -> int:
        """S = T / p^(L-1) + (L - 1) p k entries, where p^(L-1) divides T and every tile of the coarsest level holds m.

        Other T add their tail, T mod p^(L-1); a pyramid that is smaller than the budget gives what it has.
        """
        place, G = self.place(T), self.budget // self.tile
        C, tail = place.sizes[-1], T - place.whole
        if self.choice == "joint":
            finer = place.starts[self.levels - 1] - tail * (self.levels > 1)
            return C + tail + min(finer, (self.levels - 1) * self.pooling * self.budget)
        width, chosen = -(-C // G), tail
        for tile in range(G):
            candidates = max(0, min(width, C - tile * width))
            for _ in range(self.levels):
                chosen += candidates
                candidates = self.pooling * min(self.tile, candidates)
        return chosen


def positions_first(*heads_first_BHTK: Tensor) -> tuple[Tensor, ...]:
    """[B, heads, T, K] of attention as the kernels' [B, T, heads, K], without a copy."""
    return tuple(x_BHTK.transpose(1, 2) for x_BHTK in heads_first_BHTK)


def contributors(chosen: Selection, T: int, p: int, levels: int) -> Tensor:
    """How many entries write to each position, [B, H, T]: at most one a level; 0 leaves the residual stream alone."""
    ones_BHS1 = torch.ones(*chosen.index_BHS.shape, 1, device=chosen.index_BHS.device)
    return unselect(ones_BHS1, chosen.inverse_BHN, T, p, levels)[..., 0].transpose(1, 2).long()


def lighthouse_layers(layers: int, method: Callable, *, dense: tuple[int, ...] = (0, -1)) -> list[Callable]:
    """One attention function a layer for `GPT.attention`: `method`, and dense attention in the layers named."""
    kept = {index % layers for index in dense}
    return [sdpa_attention if layer in kept else method for layer in range(layers)]
