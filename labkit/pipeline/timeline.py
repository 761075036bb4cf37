"""What a simulation returns: when every operation ran, and where the idle time lies.

    bubble = 1 - sum of busy time / (N * makespan)
    fill     before a worker's first operation            drain   behind its last one
    switch   between its warm-up forwards (the first N - worker of them; in RoundPipe all that come before) and its
             first backward                                intra   the rest

An asynchronous schedule fills the first and last of these with the neighbouring iterations, so its bubble is
(switch + intra) alone: that is how the published log counts it. `steady_state` of simulate.py measures instead.
Source: the simulator beside arXiv 2604.27085 (ITcarrot/RoundPipe-artifact, pp-simulate/README.md).
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple


class Event(NamedTuple):
    """One operation as it ran; times in ms. A backward that recomputes starts with `recompute_ms` of it."""

    worker: int
    kind: str  # "F", "B", "W" or "FB" (RoundPipe's fused stage)
    stage: int
    micro_batch: int
    iteration: int
    start: float
    end: float
    recompute_ms: float


@dataclass(frozen=True)
class BubbleSplit:
    """Shares of N * makespan; they add up to the idle share."""

    fill: float
    switch: float
    intra: float
    drain: float


@dataclass(frozen=True)
class Timeline:
    """Events in the order in which they start."""

    workers: int
    events: tuple[Event, ...]
    asynchronous: bool = False
    warm_up: bool = True  # the schedule has a phase of forwards alone

    @cached_property
    def makespan(self) -> float:
        """The end of the last operation, ms."""
        return max((event.end for event in self.events), default=0.0)

    @cached_property
    def rows(self) -> tuple[tuple[Event, ...], ...]:
        """The events of each worker."""
        rows = [[] for _ in range(self.workers)]
        for event in self.events:
            rows[event.worker].append(event)
        return tuple(map(tuple, rows))

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Working time of each worker, ms."""
        return tuple(sum(event.end - event.start for event in row) for row in self.rows)

    @property
    def idle(self) -> float:
        """The share of all workers' time in which they wait."""
        return self._share(self.workers * self.makespan - sum(self.busy))

    @property
    def bubble(self) -> float:
        """The idle share; of an asynchronous schedule without fill and drain."""
        return self.split.switch + self.split.intra if self.asynchronous else self.idle

    @cached_property
    def split(self) -> BubbleSplit:
        """Where the idle time lies. A worker that has nothing to do counts under intra: no neighbour fills it."""
        rows = [row for row in self.rows if row]
        fill = self._share(sum(row[0].start for row in rows))
        drain = self._share(sum(self.makespan - row[-1].end for row in rows))
        switch = self._share(sum(map(self._switch, rows)))
        return BubbleSplit(fill, switch, self.idle - fill - switch - drain, drain)

    def _switch(self, row: tuple[Event, ...]) -> float:
        """Gaps of one worker behind its warm-up, up to its first backward; a fused stage switches without waiting."""
        first = next((i for i, event in enumerate(row) if event.kind != "F"), len(row))
        if first == len(row) or row[first].kind == "FB":
            return 0.0
        warm = min(self.workers - row[0].worker, first) if self.warm_up else first
        gaps = [after.start - before.end for before, after in pairwise(row[: first + 1])]
        return sum(gaps[max(0, warm - 1):])

    def _share(self, ms: float) -> float:
        return ms / (self.workers * self.makespan) if self.makespan else 0.0
