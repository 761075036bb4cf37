"""Inputs of K9's tests, and its definitions as plain loops, which share nothing with labkit."""

import gate
import torch
from torch import Tensor

FAR = 2**30 + 8  # elements between two rows: the third one lies past 2^31


def heads(B: int, T: int, H: int, J: int, K: int, seed: int = 0) -> dict[str, Tensor]:
    """q of H heads, k and v of J."""
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(B, T, count, K, generator=source)
            for name, count in (("q_BTHK", H), ("k_BTHK", J), ("v_BTHK", J))}


def choice(B: int, H: int, N: int, S: int, seed: int = 0, holes: bool = True) -> Tensor:
    """S of N entries in each head, another choice in each, every fifth slot empty."""
    source = torch.Generator().manual_seed(seed)
    index_BHS = torch.rand(B, H, N, generator=source).argsort(2)[..., :S]
    if holes:
        index_BHS[..., 1::5] = -1
    return index_BHS


def entries_of(T: int, p: int, levels: int) -> list[tuple[int, int]]:
    """(level, index inside it) of every entry, in the order of their numbers."""
    whole = T - T % p ** (levels - 1)
    return [(0, t) for t in range(T)] + [(level, i) for level in range(1, levels) for i in range(whole // p**level)]


def far_apart(x: Tensor, dim: int) -> Tensor:
    """The same values with FAR elements between neighbours in `dim` (of length 3), which is not the last one."""
    first = x.movedim(dim, 0)
    rows = gate.huge_rows(3, first[0].numel(), x.dtype, FAR)
    rows.copy_(first.flatten(1))
    return rows.unflatten(1, first.shape[1:]).movedim(0, dim)
