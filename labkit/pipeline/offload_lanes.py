"""Lanes: work that runs at the same time, each lane in its own order, and marks to wait for.

    mark = lane.submit(Label("upload", stage=2), work, after=[mark_1, mark_2])
    mark.result()         the host waits; an error in the work, or in what it waited for, comes out here

ThreadLane    a thread; `work` runs in it
StreamLane    a CUDA stream; `work` runs at once and only queues kernels and copies on the stream

Work waits only for marks that existed when it was submitted. So of all unfinished work the oldest can always go on, and
nothing can wait for itself.
"""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from labkit.errors import LabError
from labkit.pipeline.timeline import Event

LANES = ("compute", "parameters up", "activations", "gradients down", "optimizer")
COMPUTE, PARAMETERS, ACTIVATIONS, GRADIENTS, OPTIMIZER = range(5)  # `worker` of the events


class Label(NamedTuple):
    """What an event says about its work; a stage's optimizer work and its weights belong to no micro-batch."""

    kind: str
    stage: int = 0
    micro_batch: int = 0
    iteration: int = 0


class ThreadLane:
    """A lane that is a thread. It ends when nobody holds the lane any more."""

    def __init__(self, number: int, begin: float):
        self.number, self.begin = number, begin  # `begin`: time.perf_counter() of 0 ms
        self.pool = ThreadPoolExecutor(1, thread_name_prefix=LANES[number])
        self.ran: list[Event] = []

    def submit(self, label: Label, work: Callable[[], object], after: Iterable[Any] = ()) -> Future:
        """Queue `work`."""
        return self.pool.submit(self._run, label, work, tuple(after))

    def _run(self, label: Label, work: Callable[[], object], after: tuple) -> None:
        for mark in after:
            mark.result()
        start = self._now()
        self._work(work)
        self.ran.append(Event(self.number, *label, start, self._now(), 0.0))

    def _work(self, work: Callable[[], object]) -> None:
        work()

    def _now(self) -> float:
        return 1e3 * (time.perf_counter() - self.begin)

    def events(self) -> list[Event]:
        """What ran, times in ms."""
        return list(self.ran)

    def forget(self) -> None:
        """Start the list of events anew."""
        self.ran.clear()

    def drain(self) -> None:
        """Wait until the lane is idle, whatever its work came to."""
        self.pool.submit(int).result()

    def close(self) -> None:
        """End the thread."""
        self.pool.shutdown()


class OptimizerLane(ThreadLane):
    """The thread of a foreign optimizer: its errors become one sentence, with the error itself behind it."""

    def _work(self, work: Callable[[], object]) -> None:
        try:
            work()
        except LabError:
            raise
        except Exception as error:
            raise LabError(f"The optimizer's thread stopped with {type(error).__name__}: {error}",
                           "Mend the optimizer or its settings, and build a new engine.") from error


class StreamMark:
    """The end of work on a CUDA stream."""

    def __init__(self, end: Any):
        self.end = end

    def result(self) -> None:
        """The host waits."""
        self.end.synchronize()


class StreamLane:
    """A lane that is a CUDA stream. Waiting for another stream costs the host nothing; for a thread, the host waits.

    cuda: the module that makes streams and events, torch.cuda but in tests.
    """

    def __init__(self, number: int, begin: float, device: torch.device, cuda: Any = torch.cuda):
        self.number, self.begin, self.cuda = number, begin, cuda
        self.stream = cuda.Stream(device=device)
        self.ran: list[tuple[Label, Any, Any]] = []
        self.zero = cuda.Event(enable_timing=True)
        self.zero.record(self.stream)
        self.zero.synchronize()
        self.offset = 1e3 * (time.perf_counter() - begin)  # ms between 0 and the event `zero`

    def submit(self, label: Label, work: Callable[[], object], after: Iterable[Any] = ()) -> StreamMark:
        """Queue what `work` launches."""
        for mark in after:
            if isinstance(mark, StreamMark):
                self.stream.wait_event(mark.end)
            else:
                mark.result()
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        with self.cuda.stream(self.stream):
            start.record(self.stream)
            work()
            end.record(self.stream)
        self.ran.append((label, start, end))
        return StreamMark(end)

    def events(self) -> list[Event]:
        """What ran, times in ms; waits for it."""
        self.drain()
        return [Event(self.number, *label, *(self.offset + self.zero.elapsed_time(at) for at in (start, end)), 0.0)
                for label, start, end in self.ran]

    def forget(self) -> None:
        """Start the list of events anew."""
        self.ran.clear()

    def drain(self) -> None:
        """Wait until the stream is idle."""
        self.stream.synchronize()

    def close(self) -> None:
        """A stream needs no end."""
