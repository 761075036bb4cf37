"""What an offload engine measured: how long copies took, and how much of it nothing else hid.

    exposed copies     = time in which a copy runs and nothing computes
    exposed optimizer  = time in which the optimizer runs, and neither a computation nor a copy

Both come from the events alone, as sets of intervals, and so mean the same for threads and for CUDA streams. With
blocking copies all of the copying is exposed.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from labkit.pipeline.offload_lanes import COMPUTE, LANES, OPTIMIZER
from labkit.pipeline.timeline import Event, Timeline

Interval = tuple[float, float]


@dataclass(frozen=True)
class OffloadReport:
    """Mean of the steps since the engine's last `forget`, in ms a step; the peak is that of all of them.

    compute_ms and the others are lengths of time: two copies at once count once. peak_device_bytes is None where bytes
    are not counted. timeline: workers are the lanes, in the order of LANES. The optimizer's work behind the last step
    is always exposed, so with staleness 1 measure over many steps.
    """

    steps: int
    step_ms: float  # from the first event to the last, divided by the steps
    compute_ms: float
    copy_ms: float
    exposed_copy_ms: float
    optimizer_ms: float
    exposed_optimizer_ms: float
    peak_device_bytes: int | None
    timeline: Timeline


def report_of(events: Iterable[Event], steps: int, peak_bytes: int | None) -> OffloadReport:
    """The report over all these events."""
    events = sorted(events, key=lambda event: event.start)
    compute, copies, optimizer = (united((event.start, event.end) for event in events if event.worker in lanes)
                                  for lanes in ({COMPUTE}, set(range(len(LANES))) - {COMPUTE, OPTIMIZER}, {OPTIMIZER}))
    either = united([*compute, *copies])
    span = max((event.end for event in events), default=0.0) - min((event.start for event in events), default=0.0)
    times = [span, length(compute), length(copies), length(either) - length(compute), length(optimizer),
             length(united([*either, *optimizer])) - length(either)]
    return OffloadReport(steps, *(ms / max(steps, 1) for ms in times), peak_bytes, Timeline(len(LANES), tuple(events)))


def united(intervals: Iterable[Interval]) -> list[Interval]:
    """The union, as intervals that don't touch."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((start, end))
    return union


def length(union: Iterable[Interval]) -> float:
    """The sum of the lengths."""
    return sum(end - start for start, end in union)
