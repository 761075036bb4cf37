"""K9's common ground: where the entries of a Lighthouse pyramid stand, and how many of them a choice has.

Level 0 holds T tokens; an entry of level l stands for p^l of them, up to level L - 1. All entries are numbered one
behind the other: 0 ... T - 1 are the tokens, then come level 1, level 2 and so on, N in all. Tokens behind the last
whole window of p^(L-1), the tail, are pooled at no level. Head sizes and grids of the three kernels are alike, and so
is the table of their settings.

Letters: B batch, H heads of queries, J heads of keys and values, T positions, K head size, N entries, M = N - T pooled
entries, S chosen entries. Source: arXiv 2605.06554, section 3.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import IDS, check_shape
from labkit.kernels.configs import Row, settings_for
from labkit.kernels.language import triton

# ROWS rows of K, and in some kernels up to four times as many, are held by one program: 16 bytes a thread and row
SETTINGS = [
    Row("any", 32, {"ROWS": 32, "num_warps": 4}),
    Row("any", 64, {"ROWS": 16, "num_warps": 4}),
    Row("any", 128, {"ROWS": 8, "num_warps": 4}),
    Row("any", 256, {"ROWS": 4, "num_warps": 4}),
    Row("any", float("inf"), {"ROWS": 1, "num_warps": 4}),
]


@dataclass(frozen=True)
class Levels:
    """Where the entries of each level stand, for T positions pooled by p."""

    T: int
    pooling: int
    count: int  # L

    @property
    def window(self) -> int:
        """Positions of an entry of the coarsest level."""
        return self.pooling ** (self.count - 1)

    @property
    def whole(self) -> int:
        """Positions that lie in whole windows of the coarsest level."""
        return self.T - self.T % self.window

    @property
    def sizes(self) -> list[int]:
        """Entries of each level; level 0 has the tail too."""
        return [self.T, *(self.whole // self.pooling**level for level in range(1, self.count))]

    @property
    def starts(self) -> list[int]:
        """The first entry of each level, and N behind them."""
        return [0, *accumulate(self.sizes)]

    @property
    def in_kernel(self) -> tuple[int, int]:
        """(p, L) as a kernel is told: without pooled entries any two levels do, and huge windows are spared."""
        return (self.pooling, self.count) if self.count > 1 and self.whole else (4, 2)

    def place(self, entry: Tensor) -> tuple[Tensor, Tensor]:
        """(level, index inside it) of entries 0 ... N - 1."""
        start_L = torch.tensor(self.starts[:-1], device=entry.device)
        level = torch.bucketize(entry, start_L[1:], right=True)
        return level, entry - start_L[level]


def cascade_sizes(place: Levels, S: int) -> list[int]:
    """Entries of each level among S chosen ones, as the cascade chooses: all of the coarsest level and of the tail,
    and of the finer levels alike."""
    tail, coarsest, finer = place.T - place.whole, place.sizes[-1], place.count - 1
    if not finer or not place.whole:
        return [place.T] + [0] * finer
    each = (S - coarsest - tail) // finer
    return [each + tail, *[each] * (finer - 1), coarsest]


def inverted(index: Tensor, size: int) -> Tensor:
    """For each of `size` entries its place in `index` [B, H, S], or -1: [B, H, size]. Other values than these are left
    out. Where an entry stands twice, one of its places is given."""
    B, H, S = index.shape
    place_BHS = torch.arange(S, device=index.device, dtype=index.dtype).expand(B, H, S)
    target_BHS = torch.where((index < 0) | (index >= size), size, index).long()  # to a place that is cut off
    return index.new_full((B, H, size + 1), -1).scatter(2, target_BHS, place_BHS)[..., :size].contiguous()


def look_up(x_BHNK: Tensor, index_BHS: Tensor) -> Tensor:
    """Rows of x by index, zero where it is -1, in plain torch."""
    B, H, N, K = x_BHNK.shape
    if not N:
        return x_BHNK.new_zeros(B, H, index_BHS.shape[2], K)
    head_BH1 = torch.arange(B * H, device=index_BHS.device).view(B, H, 1)
    rows = x_BHNK.reshape(B * H * N, K).index_select(0, (head_BH1 * N + index_BHS.clamp(min=0)).flatten())
    return rows.view(B, H, index_BHS.shape[2], K).masked_fill((index_BHS < 0)[..., None], 0)


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


def tile_settings(K: int, device: torch.device) -> dict[str, int]:
    """Rows of a program, the block that holds K, and warps."""
    return {"BLOCK_K": triton.next_power_of_2(max(K, 1))} | settings_for("lighthouse", SETTINGS, K, device)


def check_levels(p: int, levels: int) -> None:
    """p of 2 or more, at least one level."""
    if p < 2 or levels < 1:
        raise LabError(f"Pooling {p} and {levels} levels fit no pyramid.", "Use pooling >= 2 and levels >= 1.")


def check_heads(q_BTHK: Tensor, k_BTJK: Tensor, v_BTJK: Tensor) -> None:
    """q [B, T, H, K], and k and v [B, T, J, K] with a J that divides H."""
    check_shape("q_BTHK", q_BTHK, (None, None, None, None), "[B, T, H, K]")
    B, T, H, K = q_BTHK.shape
    check_shape("k_BTHK", k_BTJK, (B, T, None, K), "[B, T, J, K]")
    check_shape("v_BTHK", v_BTJK, tuple(k_BTJK.shape), "the shape of k")
    J = k_BTJK.shape[2]
    if not J or not H or H % J:
        raise LabError(f"{H} query heads cannot share {J} key heads evenly.", "Use a number of heads that J divides.")


def check_places(name: str, index: Tensor, size: int) -> None:
    """Whole numbers in [0, size), none twice in a head, and -1 for none. Values are looked at on the CPU only."""
    if index.dtype not in IDS:
        raise LabError(f"{name} has dtype {index.dtype}, but places are whole numbers.", f"Use {name}.long().")
    if index.device.type != "cpu" or torch.compiler.is_compiling() or not index.numel():
        return
    if index.min() < -1 or index.max() >= size:
        raise LabError(f"{name} goes from {index.min()} to {index.max()}, but places go from 0 to {size - 1}, or -1.",
                       "Check that it was made for this length, pooling and number of levels.")
    ordered = index.sort(-1).values
    if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
        raise LabError(f"{name} holds a place twice in one head, and a gradient would miss one of the two.",
                       "Choose every entry at most once.")
