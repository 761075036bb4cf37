"""What an offload engine holds on the device if the timing is bad: an exact count without chance in it.

Threads free memory when they come to it, so a peak that they reach differs from run to run. Here one thread does all
the work, in a fixed order that holds much: what goes up goes when it is submitted, everything else as late as somebody
waits for it, and gradients go down behind all computations that could come before. The engine's own waits bound it.
Other orders differ by little (an activation on its way down in place of one on its way up).
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from labkit.pipeline.offload_lanes import COMPUTE, GRADIENTS, Label
from labkit.pipeline.offload_machines import CpuMachine
from labkit.pipeline.timeline import Event

AT_ONCE = ("upload", "reupload", "activation up")


class LateLane:
    """A lane whose work is done when its mark is asked for, or one behind it."""

    def __init__(self, before: "LateLane | None" = None):
        self.queue: deque[LateMark] = deque()
        self.before = before  # a lane that is always ahead

    def submit(self, label: Label, work: Callable[[], object], after: Iterable[Any] = ()) -> "LateMark":
        mark = LateMark(self, work, tuple(after))
        self.queue.append(mark)
        if label.kind in AT_ONCE:
            mark.result()
        return mark

    def events(self) -> list[Event]:
        """None: nothing here takes the time that it would."""
        return []

    def forget(self) -> None:
        """Nothing to forget."""

    def drain(self) -> None:
        """Do all that is left."""
        if self.queue:
            self.queue[-1].result()

    close = drain


class LateMark:
    """Work to be done."""

    def __init__(self, lane: LateLane, work: Callable[[], object], after: tuple):
        self.lane, self.work, self.after, self.done = lane, work, after, False

    def result(self) -> None:
        """Do it, and what stands before it in its lane."""
        if self.lane.before and not self.done:
            self.lane.before.drain()
        while not self.done:
            first = self.lane.queue.popleft()
            first.done = True  # also where it fails: the error comes out once
            for mark in first.after:
                mark.result()
            first.work()
            first.work = first.after = None


class WorstCase(CpuMachine):
    """A machine for `OffloadEngine(..., device=WorstCase())`; the report's peak is what it is for."""

    def lane(self, number: int) -> LateLane:
        if number == COMPUTE:
            self.compute = LateLane()
            return self.compute
        return LateLane(self.compute if number == GRADIENTS else None)
