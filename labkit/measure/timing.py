"""How long a call takes, and which of several is faster: all of them in one process, round by round, in mixed order.

    ratio(ours, peer) = median over rounds of  seconds of the peer / seconds of ours          above 1 ours is faster

Clocks drift with temperature and power, so times of two programs that ran one after the other differ by more than the
programs do. Here each round times every implementation once, in shuffled order, and a ratio is formed inside a round.
Its interval is a bootstrap over rounds. One implementation is entered twice: its ratio to itself is the noise floor.

On a GPU a window of calls is timed by a pair of events:
- calls under 200 us: a CUDA graph of about 200 of them, replayed; single launches would time the gaps between them;
- longer ones: as they are, behind a short wait on the GPU, so that the host is ahead when the first event passes;
- `as_called`: without graph or wait. That is what a program sees, and for tiny kernels it is the host's time.
Inputs come as several equal sets, so that one round passes 3 x L2 and no call finds its inputs in the cache.

Sources: QuACK's benchmark notes (rotation, graphs, warming up by time); triton.testing.do_bench (events, quantiles).
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Call = Callable[[], object]
GRAPH_BELOW, GRAPH_CALLS = 200e-6, 200  # seconds of a call; calls in a graph
WARM_UP, WINDOW = 0.2, 0.002  # seconds
LEAST_ROUNDS, FEWEST_ROUNDS = 20, 5  # the second where a round takes so long that 20 would pass three times the budget
RESAMPLES = 2000


@dataclass(frozen=True)
class Timing:
    """Seconds of one call in each round, and how they were taken ("graph", "events", "as called", "cpu clock")."""

    rounds: tuple[float, ...]
    method: str

    def quantiles(self) -> dict[str, float]:
        """p20, p50 and p80 in milliseconds, and the number of rounds."""
        p20, p50, p80 = (1e3 * np.quantile(self.rounds, (0.2, 0.5, 0.8))).tolist()
        return {"p20": p20, "p50": p50, "p80": p80, "n": len(self.rounds)}


def ratio(ours: Timing, peer: Timing, seed: int = 0, level: float = 0.95) -> dict[str, float]:
    """Median over rounds of the peer's time over ours, with a bootstrap interval: {p50, lo, hi}."""
    each = np.array(peer.rounds) / np.array(ours.rounds)
    drawn = np.random.default_rng(seed).integers(0, len(each), (RESAMPLES, len(each)))
    lo, hi = np.quantile(np.median(each[drawn], axis=1), ((1 - level) / 2, (1 + level) / 2)).tolist()
    return {"p50": float(np.median(each)), "lo": lo, "hi": hi}


def noise_floor(self_ratio: Mapping[str, float]) -> float:
    """How far from 1 a ratio may be by chance: the end of the self-ratio's interval that is farther from 1."""
    return max(abs(math.log(self_ratio["lo"])), abs(math.log(self_ratio["hi"])))


def compare(calls: Mapping[str, Sequence[Call]], clock: "CpuClock | GpuClock", *, seconds: float = 2.0,
            seed: int = 0, failed: dict[str, Exception] | None = None) -> dict[str, Timing]:
    """Time all implementations, interleaved.

    Args:
        calls: for each name one call per set of inputs.
        seconds: for all rounds together; at least 20 rounds are made, or 5 where 20 would take three times as long.
        failed: with it, an implementation that does not get through its warm-up is left out, and its error put here.
    """
    windows = {}
    for name, sets in calls.items():
        try:
            windows[name] = clock.window(sets)
        except Exception as error:
            if failed is None:
                raise
            failed[name] = error
    times: dict[str, list[float]] = {name: [] for name in windows}
    order, names = np.random.default_rng(seed), list(windows)
    start = clock.now()
    for done in itertools.count(1):
        for i in order.permutation(len(names)):
            times[names[i]].append(windows[names[i]]())
        spent = clock.now() - start
        if (done >= LEAST_ROUNDS and spent >= seconds) or (done >= FEWEST_ROUNDS and spent >= 3 * seconds):
            return {name: Timing(tuple(times[name]), windows[name].method) for name in names}


def input_sets(inputs: dict[str, Tensor], device: torch.device) -> list[dict[str, Tensor]]:
    """The inputs and as many copies as one round needs to pass 3 x L2: 16 at most, 1 where a set alone is larger."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in inputs.values())
    L2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    copies = min(16, -(-3 * L2 // max(size, 1)))
    return [inputs, *({name: copy_of(tensor) for name, tensor in inputs.items()} for _ in range(copies - 1))]


def copy_of(tensor: Tensor) -> Tensor:
    """Same values, strides and need for a gradient, other memory."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


@dataclass
class Window:
    """Calls that are timed together; calling it returns the seconds of one of them."""

    time: Callable[[], float]
    method: str

    def __call__(self) -> float:
        return self.time()


class CpuClock:
    """time.perf_counter round calls of a CPU: for tests of this file, not for statements about kernels."""

    def __init__(self, warm_up: float = 0.0, least: float = 0.0):
        self.warm_up, self.least = warm_up, least

    def now(self) -> float:
        return time.perf_counter()

    def window(self, calls: Sequence[Call]) -> Window:
        turn = itertools.cycle(calls)
        warm_up(turn, self)
        one = self.seconds(turn, 1)
        count = max(1, math.ceil(self.least / max(one, 1e-9)))
        return Window(lambda: self.seconds(turn, count), "cpu clock")

    def seconds(self, turn: Iterator[Call], count: int) -> float:
        start = self.now()
        for _ in range(count):
            next(turn)()
        return (self.now() - start) / count

    def wait(self) -> None:
        """Nothing to wait for."""


class GpuClock:
    """Pairs of events on one GPU."""

    def __init__(self, device: torch.device, as_called: bool = False):
        self.device, self.as_called, self.warm_up = device, as_called, WARM_UP

    def now(self) -> float:
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def window(self, calls: Sequence[Call]) -> Window:
        turn = itertools.cycle(calls)
        warm_up(turn, self)
        host = host_seconds(turn, self)
        one = self.events(turn, 3, host)
        if one < GRAPH_BELOW and not self.as_called and never_waits(calls[0]):
            with contextlib.suppress(RuntimeError):  # what cannot be captured is timed as a longer call is
                graph, count = graph_of(calls)
                return Window(lambda: self.events(itertools.repeat(graph.replay), 1, 0.0) / count, "graph")
        count = max(1, math.ceil(WINDOW / one))
        ahead = 0.0 if self.as_called else host + count * max(0.0, host - one)
        return Window(lambda: self.events(turn, count, ahead), "as called" if self.as_called else "events")

    def events(self, turn: Iterator[Call], count: int, ahead: float) -> float:
        """Seconds of one of `count` calls; the GPU first waits for `ahead` seconds, in which the host issues them."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if ahead:
            torch.cuda._sleep(int(2e9 * min(ahead, 0.02)))  # in cycles, of about 2 GHz
        start.record()
        for _ in range(count):
            next(turn)()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / count


def warm_up(turn: Iterator[Call], clock: CpuClock | GpuClock) -> None:
    """Call until `clock.warm_up` seconds are over, twice at least: a count would not let the clock rates settle."""
    end = clock.now() + clock.warm_up
    for done in itertools.count():
        if done >= 2 and clock.now() >= end:
            return
        next(turn)()


def host_seconds(turn: Iterator[Call], clock: CpuClock | GpuClock) -> float:
    """Seconds that the host needs to issue one call, the GPU's work not waited for: median of three groups."""
    start = clock.now()
    next(turn)()
    calls = int(min(20, max(2, 0.02 / max(clock.now() - start, 1e-9))))  # few enough not to fill the GPU's queue
    groups = []
    for _ in range(3):
        clock.wait()
        start = time.perf_counter()
        for _ in range(calls):
            next(turn)()
        groups.append((time.perf_counter() - start) / calls)
    clock.wait()
    return sorted(groups)[1]


@contextlib.contextmanager
def waiting_forbidden() -> Iterator[None]:
    """Inside, a call that makes the host wait for the GPU (`.item()`, a copy to the CPU) raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def never_waits(call: Call) -> bool:
    """Whether the call runs without the host waiting, as a CUDA graph needs it."""
    try:
        with waiting_forbidden():
            call()
    except RuntimeError:
        return False
    return True


def graph_of(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A CUDA graph of about 200 calls, going round the sets of inputs, and their number."""
    count = len(calls) * max(1, GRAPH_CALLS // len(calls))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set up their workspaces on the stream that will be captured
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for i in range(count):
            calls[i % len(calls)]()
    return graph, count
