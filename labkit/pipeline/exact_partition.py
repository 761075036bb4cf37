"""Exact dynamic programming over RoundPipe's partitions: the yardstick for the greedy ones of partition.py.

    T[k, n] = min over j of max(T[k - 1, j], segment[j, n])      the longest of k stages that hold the first n layers
    least   = min over n, k_f, k_b of cost(k_f + k_b + 1, max(T_f[k_f, n], T_b[k_b, n], fused[n]))

n layers stand before the fused stage. Among partitions of equal cost the evenest is taken, by a second table with sums
of squares in place of maxima: cost sees only the longest stage, but a short one idles its worker as well.
O(L^3) with numpy's inner loops. Source: the linear partition problem; cost of arXiv 2604.27085.
"""

from collections.abc import Sequence

import numpy as np

from labkit.pipeline.partition import ROUNDING, Cost, Layers, Partition


def exact_partition(layers: Layers, cost: Cost, stage_bytes: float | None = None) -> Partition:
    """The partition of least cost, and of those the one whose stage times have the least sum of squares.

    cost: (stages, longest stage) -> float, or arrays of both; paper_cost or library_cost.
    Raises LabError for layers that don't fit.
    """
    limited = layers.limited(stage_bytes)
    forward = segments(layers.forward_ms, layers.forward_bytes if limited else None, stage_bytes)
    backward = segments(layers.backward_ms, layers.backward_bytes if limited else None, stage_bytes)
    L = len(layers.forward_ms)
    longest_f, longest_b = (table(part, L - 1, np.maximum)[0] for part in (forward, backward))
    stages = np.arange(L)[:, None] + np.arange(L) + 1  # [k_f, k_b]
    found = []
    for n in range(L):
        longest = np.maximum(np.maximum.outer(longest_f[:, n], longest_b[:, n]), backward[n, L])
        costs = np.where(np.isfinite(longest), cost(stages, longest), np.inf)
        found += [(costs[k], longest[k], n, *map(int, k)) for k in zip(*np.where(costs <= costs.min() * ROUNDING),
                                                                      strict=True) if np.isfinite(costs[k])]
    least = min(each[0] for each in found) * ROUNDING
    parts = [evenest(forward, backward, *each[1:]) for each in found if each[0] <= least]
    return min(parts, key=lambda part: sum(ms**2 for times in part.times(layers) for ms in times))


def evenest(forward: np.ndarray, backward: np.ndarray, longest: float, n: int, k_f: int, k_b: int) -> Partition:
    """The stages of n layers before the fused stage, k_f and k_b of them, none longer than `longest`."""
    sizes_f, sizes_b = (cut_sizes(table(np.where(part <= longest * ROUNDING, part**2, np.inf), k, np.add)[1], k, n)
                        for part, k in ((forward, k_f), (backward, k_b)))
    return Partition(sizes_f, (len(forward) - 1 - n, *sizes_b[::-1]))


def segments(ms: Sequence[float], sizes: Sequence[float] | None, cap: float | None) -> np.ndarray:
    """[j, n]: the time of a stage of layers j ... n - 1; infinite where it is empty or too large."""
    ends = np.concatenate(([0.0], np.cumsum(ms)))
    part = ends[None, :] - ends[:, None]
    allowed = np.triu(np.ones(part.shape, dtype=bool), 1)
    if sizes is not None:
        held = np.concatenate(([0.0], np.cumsum(sizes)))
        allowed &= held[None, :] - held[:, None] <= cap * ROUNDING
    return np.where(allowed, part, np.inf)


def table(part: np.ndarray, stages: int, join: np.ufunc) -> tuple[np.ndarray, np.ndarray]:
    """[k, n]: the least `join` of k stages over the first n layers, and where the last of them starts."""
    value, cut = np.full((stages + 1, len(part)), np.inf), np.zeros((stages + 1, len(part)), dtype=int)
    value[0, 0] = 0.0
    for k in range(1, stages + 1):
        joined = join(value[k - 1][:, None], part)
        cut[k] = joined.argmin(0)
        value[k] = joined.min(0)
    return value, cut


def cut_sizes(cut: np.ndarray, k: int, n: int) -> tuple[int, ...]:
    """The sizes of k stages over the first n layers, read back from the table."""
    sizes = []
    for stage in range(k, 0, -1):
        sizes.append(n - int(cut[stage, n]))
        n = int(cut[stage, n])
    return tuple(sizes[::-1])
