"""Where to cut L layers into RoundPipe's stages: the paper's greedy, the library's, and exact dynamic programming.

    forward stages F_1 ... F_Sf, backward stages B_1 ... B_Sb in the order they run, B_1 fused with the forward of its
    layers:      sum F_i + B_1 = L,    sum B_j = L,    S = S_f + S_b
    paper        minimise (M S + N (N - 1)) t_max        t_max the longest stage
    library      minimise max(S, N) t_max, looking only at t_max between the slowest layer and 1.1 times it

For a given t_max the greedy (fill the fused stage from the last layer backwards, pack the other forwards from the end
and backwards from the start) needs the fewest stages of all, and the best t_max is a sum of neighbouring layers. So
over all such sums it finds the least cost, as exact_partition.py shows case by case. What it gives away lies elsewhere:
cost sees only the longest stage, and of all partitions of least cost greedy takes one with a remainder (1, 9, 9, 9
layers), which idles; the exact one takes the evenest. And least cost is not least makespan. The head counts as a layer,
the last. Source: arXiv 2604.27085; roundpipe 0.1.1, scheduler.py.
Letters: L layers, N workers, M micro-batches, S stages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from labkit.errors import LabError

Cost = Callable[[int, float], float]  # (number of stages, longest stage in ms) -> what to minimise
ROUNDING = 1 + 1e-12  # sums of the same layers in another order still count as equal


@dataclass(frozen=True)
class Layers:
    """What each layer takes for one micro-batch (ms), and the bytes it holds on a worker in each direction."""

    forward_ms: tuple[float, ...]
    backward_ms: tuple[float, ...]  # recompute included
    forward_bytes: tuple[float, ...] | None = None  # weights
    backward_bytes: tuple[float, ...] | None = None  # weights and gradients

    def limited(self, cap: float | None) -> bool:
        """Whether bytes bound the stages. Raises LabError where lists don't fit, or one layer alone is too large."""
        lists = [self.forward_bytes, self.backward_bytes] if cap is not None else []
        if None in lists or any(len(part) != len(self.forward_ms) for part in (self.backward_ms, *lists)):
            raise LabError("The layers' lists have different lengths, or there is a limit but no bytes.",
                           "Give times, and with a limit bytes, for each layer in both directions.")
        if not self.forward_ms or min(*self.forward_ms, *self.backward_ms) < 0:
            raise LabError("There is no layer, or one takes less than no time.",
                           "Give one layer or more, 0 ms or more.")
        if lists and max(map(max, lists)) > cap:
            raise LabError(f"A layer of {max(map(max, lists)):g} bytes is larger than a stage may be ({cap:g}).",
                           "Raise stage_bytes, or split the layer.")
        return bool(lists)


@dataclass(frozen=True)
class Partition:
    """Layers of each stage in the order of execution; the first backward stage is the fused one."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]

    @property
    def stages(self) -> int:
        return len(self.forward) + len(self.backward)

    def times(self, layers: Layers) -> tuple[list[float], list[float]]:
        """(stage_forward_ms, stage_backward_ms) for `simulate`."""
        return stage_sums(layers.forward_ms, self.forward), stage_sums(layers.backward_ms[::-1], self.backward)

    def recompute(self, layers: Layers) -> list[float]:
        """stage_recompute_ms: the forward of each backward stage but the fused one, which has its own."""
        return [0.0, *stage_sums(layers.forward_ms[::-1], self.backward)[1:]]

    def longest(self, layers: Layers) -> float:
        """t_max, ms."""
        return max(max(part, default=0.0) for part in self.times(layers))


def stage_sums(layer_ms: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """The times of stages of neighbouring layers, from the first layer on."""
    return [float(sum(layer_ms[start:end])) for start, end in pairwise(accumulate(sizes, initial=0))]


def bound_times(layers: Layers, sizes: Sequence[int]) -> tuple[list[float], list[float], list[float]]:
    """(forward, backward, recompute) of bound stages, whose last layer, the head, goes backward without a recompute."""
    head = layers.forward_ms[-1]
    backward = (*layers.backward_ms[:-1], layers.backward_ms[-1] - head)
    recompute = (*layers.forward_ms[:-1], 0.0)
    return stage_sums(layers.forward_ms, sizes), stage_sums(backward, sizes), stage_sums(recompute, sizes)


def with_head(count: int, forward_ms: float, backward_ms: float, head_forward_ms: float,
              head_backward_ms: float) -> Layers:
    """`count` equal layers and the head as the last; backward times without recompute, which is added."""
    return Layers((*[forward_ms] * count, head_forward_ms),
                  (*[forward_ms + backward_ms] * count, head_forward_ms + head_backward_ms))


def paper_cost(workers: int, micro_batches: int) -> Cost:
    """(M S + N (N - 1)) t_max: the makespan in units of N, were all stages equally long."""
    return lambda stages, longest: (micro_batches * stages + workers * (workers - 1)) * longest


def library_cost(workers: int) -> Cost:
    """max(S, N) t_max: the work in a micro-batch, rounded up to the longest stage. It has no fill or drain."""
    return lambda stages, longest: np.maximum(stages, workers) * longest


def greedy(layers: Layers, t_max: float, stage_bytes: float | None = None) -> Partition | None:
    """The fewest stages of at most `t_max` ms and `stage_bytes`; None where one layer takes longer."""
    limited = layers.limited(stage_bytes)
    forward = list(zip(layers.forward_ms, layers.forward_bytes if limited else layers.forward_ms, strict=True))
    backward = list(zip(layers.backward_ms, layers.backward_bytes if limited else layers.backward_ms, strict=True))
    limit = t_max, stage_bytes if limited else t_max
    fused = packed(backward[::-1], limit)
    if not fused:
        return None
    rest = len(forward) - fused[0]
    parts = packed(forward[:rest][::-1], limit), packed(backward[:rest], limit)
    if None in parts:
        return None
    return Partition(tuple(parts[0][::-1]), (fused[0], *parts[1][::-1]))


def packed(items: list[tuple[float, float]], limit: tuple[float, float]) -> list[int] | None:
    """Sizes of groups of neighbours, each filled until time or bytes run out; None where one item alone does."""
    sizes, total = [], (float("inf"), 0.0)
    for ms, size in items:
        if ms > limit[0] or size > limit[1]:
            return None
        total = total[0] + ms, total[1] + size
        if total[0] > limit[0] * ROUNDING or total[1] > limit[1] * ROUNDING:
            sizes.append(0)
            total = ms, size
        sizes[-1] += 1
    return sizes


def paper_partition(layers: Layers, *, workers: int, micro_batches: int, stage_bytes: float | None = None) -> Partition:
    """Greedy over all sums of neighbouring layers, by the paper's cost. Raises LabError for layers that don't fit."""
    return best_greedy(layers, paper_cost(workers, micro_batches), float("inf"), stage_bytes)


def library_partition(layers: Layers, *, workers: int, stage_bytes: float | None = None,
                      window: float = 1.1) -> Partition:
    """What roundpipe 0.1.1 does: its own cost, t_max at most `window` times the slowest layer.

    stage_bytes: half of 60 % of the smallest GPU's memory there, since the next stage is fetched ahead. A layer that is
        larger raises the limit, with a warning there.
    """
    if stage_bytes is not None:
        stage_bytes = max([stage_bytes, *(layers.forward_bytes or ()), *(layers.backward_bytes or ())])
    return best_greedy(layers, library_cost(workers), window * slowest(layers), stage_bytes)


def best_greedy(layers: Layers, cost: Cost, highest: float, stage_bytes: float | None) -> Partition:
    """The greedy partition of least cost over the candidates up to `highest`; of equals that of the shortest t_max."""
    layers.limited(stage_bytes)
    tried = [greedy(layers, t_max, stage_bytes) for t_max in candidates(layers, highest)]
    return min((part for part in tried if part), key=lambda part: cost(part.stages, part.longest(layers)))


def slowest(layers: Layers) -> float:
    """The slowest layer in either direction, ms: no stage can be shorter than the longest of them."""
    return max(*layers.forward_ms, *layers.backward_ms)


def candidates(layers: Layers, highest: float) -> list[float]:
    """Sums of neighbouring layers in either direction, from the slowest layer to `highest`, ascending."""
    sums = {sum_ms for ms in (layers.forward_ms, layers.backward_ms)
            for start in range(len(ms)) for sum_ms in accumulate(ms[start:])}
    return sorted(sum_ms for sum_ms in sums if slowest(layers) <= sum_ms <= highest * ROUNDING)
