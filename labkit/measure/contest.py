"""One op against its peers: correct first, then timed together, then one row for each implementation.

A peer that cannot be made, does not run or does not fit into the memory is skipped, with the reason. A peer that writes
over its inputs gets its own. Ours is entered twice (noise floor), and once more inside torch.compile.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.measure import launches
from labkit.measure.benchmarks import FORWARD, Benchmark
from labkit.measure.ceilings import Ceilings
from labkit.measure.correctness import arriving, gradients, largest_error, outputs, relative_error
from labkit.measure.peers import Peer, compiled_form, peers_of, version
from labkit.measure.targets import note
from labkit.measure.timing import (
    CpuClock,
    GpuClock,
    Timing,
    compare,
    copy_of,
    host_seconds,
    input_sets,
    noise_floor,
    ratio,
)

OURS, AGAIN, COMPILED = "ours", "ours again", "ours in torch.compile"
ROW = ("op", "impl", "direction", "shape", "dtype", "arch", "time_ms", "method", "ratio_vs", "noise", "bytes_floor",
       "flops", "floor_ms", "fraction_of_floor", "bound", "peak_bytes", "launches", "device_ms", "host_us", "compile_s",
       "max_err", "config", "regs", "spills", "smem", "version", "targets", "note", "error")
LAUNCH_BOUND_MS = 0.01  # a floor below this is a few launches' time
DIFFERS = 0.05  # relative difference of a peer's result from ours that is worth a word


@dataclass(frozen=True)
class Plan:
    """How to run: on what, how long, with what inputs."""

    device: torch.device
    dtype: torch.dtype
    arch: str
    ceilings: Ceilings
    seconds: float  # for all rounds of one comparison
    size: str = "sizes"  # or "small"
    quick: bool = False  # without what has to be compiled by Inductor
    seed: int = 0


@dataclass
class Entrant:
    """An implementation that takes part: its function, inputs (one dict for each set), and what is known of it."""

    call: Callable[..., Any]
    sets: list[dict[str, Tensor]]
    peer: Peer | None = None
    compile_s: float | None = None
    max_err: float | None = None


@dataclass
class Contest:
    """The state of one op's measurement; `rows` and `skipped` are what it leaves."""

    benchmark: Benchmark
    plan: Plan
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def prepare(self) -> None:
        """Draw the inputs, call ours for the first time, and check it.

        Raises:
            LabError: the result is wrong; nothing is timed then.
        """
        plan, benchmark = self.plan, self.benchmark
        inputs = benchmark.make_inputs(plan.device, plan.dtype, getattr(benchmark, plan.size), plan.seed)
        self.ours = Entrant(lambda **x: benchmark.call("auto", **x), [inputs])
        self.first = {direction: self.seconds_of(self.bound(self.ours, inputs, direction, None))
                      for direction in benchmark.directions}
        self.ours.max_err = largest_error(benchmark, inputs)
        if self.ours.max_err > benchmark.tolerance:
            raise LabError(f"{benchmark.op} is wrong at the timed size: relative error {self.ours.max_err:.2e}, "
                           f"allowed {benchmark.tolerance:.0e}.", "Run: pytest -m gpu tests/kernels")
        self.result = outputs(self.without_grad(self.ours, inputs))
        self.upstream = arriving(self.result) if benchmark.wrt else None
        merged = inputs | {f"upstream {i}": each for i, each in enumerate(self.upstream or ())}
        self.ours.sets = input_sets(merged, plan.device)

    def run(self, direction: str) -> None:
        """Time ours and all peers that can take part, and add their rows."""
        entrants = {OURS: self.ours, AGAIN: self.ours} | self.entrants(direction)
        clock = GpuClock(self.plan.device, self.benchmark.as_called) if self.on_gpu else CpuClock()
        calls = {name: self.calls(entrant, direction) for name, entrant in entrants.items()}
        failed: dict[str, Exception] = {}
        timings = compare(calls, clock, seconds=self.plan.seconds, seed=self.plan.seed, failed=failed)
        for name, error in failed.items():
            if entrants[name] is self.ours:
                raise error
            self.skip(name, entrants[name].peer, direction, error)
        rows = {name: self.row(name, entrants[name], direction, timings[name], calls[name][0], clock)
                for name in timings if name != AGAIN}
        ours = rows[OURS]
        self_ratio = ratio(timings[OURS], timings[AGAIN], self.plan.seed)
        ours["ratio_vs"] = {OURS: self_ratio} | {
            name: ratio(timings[OURS], timings[name], self.plan.seed) for name in rows if name != OURS}
        ours["noise"] = noise_floor(self_ratio)
        judged = [target.judged(ours, rows) for target in self.benchmark.targets if target.direction == direction]
        ours["targets"] = [each for each in judged if each]
        apart = (OURS, COMPILED, *(name for name, each in entrants.items() if each.peer and each.peer.yardstick))
        ours["note"] = note(ours, ours["targets"], ours["noise"], apart)
        self.rows += rows.values()

    @property
    def on_gpu(self) -> bool:
        return self.plan.device.type == "cuda"

    def entrants(self, direction: str) -> dict[str, Entrant]:
        """Peers that could be made and ran once in this direction."""
        found = {}
        peers = peers_of(self.benchmark.op)
        if self.on_gpu:
            peers[COMPILED] = Peer(lambda: compiled_form(self.ours.call), inductor=True)
        for name, peer in peers.items():
            try:
                found[name] = self.entrant(name, peer, direction)
            except Exception as error:  # a rival that does not run here must not stop ours
                self.skip(name, peer, direction, error)
                if self.on_gpu:
                    torch.cuda.empty_cache()
        return found

    def skip(self, name: str, peer: Peer, direction: str, error: Exception) -> None:
        """Say why a peer did not take part."""
        self.skipped.append({"op": self.benchmark.op, "impl": name, "direction": direction,
                             "version": version(peer.package), "reason": sentence(error)})

    def entrant(self, name: str, peer: Peer, direction: str) -> Entrant:
        """Make the peer, run it once (which compiles it), and compare its result with ours."""
        if self.plan.quick and peer.inductor:
            raise LabError("A quick run compiles nothing with Inductor.", "Leave out --quick.")
        sets = self.ours.sets
        if peer.overwrites:
            sets = [{key: copy_of(tensor) if key in peer.overwrites else tensor for key, tensor in each.items()}
                    for each in sets]
        entrant = Entrant(peer.make(), sets, peer)
        entrant.compile_s = self.seconds_of(self.bound(entrant, sets[0], direction, self.upstream))
        if not peer.yardstick:
            inputs = self.ours.sets[0] | {key: copy_of(self.ours.sets[0][key]) for key in peer.overwrites}
            result = outputs(self.without_grad(entrant, inputs))
            if all(a.shape == b.shape for a, b in zip(result, self.result, strict=False)):
                entrant.max_err = max(map(relative_error, result, self.result))
        return entrant

    def given(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The op's own inputs, without the gradients that arrive."""
        return {name: tensor for name, tensor in inputs.items() if not name.startswith("upstream")}

    def without_grad(self, entrant: Entrant, inputs: dict[str, Tensor]) -> Any:
        """The forward as for inference: some libraries ask the tensors, not torch, whether a gradient is wanted."""
        with torch.no_grad():
            return entrant.call(**{name: tensor.detach() for name, tensor in self.given(inputs).items()})

    def calls(self, entrant: Entrant, direction: str) -> list[Callable[[], object]]:
        """One call for each set of inputs."""
        return [self.bound(entrant, each, direction,
                           tuple(tensor for name, tensor in each.items() if name.startswith("upstream")) or None)
                for each in entrant.sets]

    def bound(self, entrant: Entrant, inputs: dict[str, Tensor], direction: str,
              upstream: tuple[Tensor, ...] | None) -> Callable[[], object]:
        """A call without arguments: forward alone (no graph is kept), or forward and the gradients of `wrt`."""
        given, leaves = self.given(inputs), [inputs[name] for name in self.benchmark.wrt]
        if direction == FORWARD or (entrant.peer and entrant.peer.yardstick):
            return lambda: self.without_grad(entrant, inputs)

        def both() -> object:
            results = outputs(entrant.call(**given))
            arrives = upstream if upstream is not None else arriving(tuple(each.detach() for each in results))
            return gradients(results, leaves, arrives)

        return both

    def seconds_of(self, call: Callable[[], object]) -> float:
        """Of one call, the GPU's work included: the first one's is that of compiling."""
        start = time.perf_counter()
        call()
        if self.on_gpu:
            torch.cuda.synchronize(self.plan.device)
        return time.perf_counter() - start

    def row(self, name: str, entrant: Entrant, direction: str, timing: Timing, call: Callable[[], object],
            clock: CpuClock | GpuClock) -> dict[str, Any]:
        """All keys of a row; ratios and targets are added to that of ours."""
        benchmark, plan = self.benchmark, self.plan
        sizes = getattr(benchmark, plan.size)
        cost = benchmark.cost(direction, sizes, torch.finfo(plan.dtype).bits // 8)
        bandwidth, rate = plan.ceilings.copy.median, plan.ceilings.matmul.median
        floor, quantiles = 1e3 * cost.floor_seconds(bandwidth, rate), timing.quantiles()
        bound = "launch" if floor < LAUNCH_BOUND_MS else cost.bound(bandwidth, rate)
        known = dict(op=benchmark.op, impl=name, direction=direction, shape=sizes, arch=plan.arch, time_ms=quantiles,
                     dtype=str(plan.dtype).removeprefix("torch."), method=timing.method, ratio_vs={}, bound=bound,
                     bytes_floor=cost.memory_bytes, flops=cost.flops, floor_ms=floor, max_err=entrant.max_err,
                     fraction_of_floor=None if entrant.peer and entrant.peer.yardstick else floor / quantiles["p50"],
                     compile_s=self.first[direction] if name == OURS else entrant.compile_s, targets=[],
                     version=None if name == OURS else version(entrant.peer.package))
        if entrant.peer and (entrant.max_err or 0) > DIFFERS:
            known["note"] = f"its result differs from ours by {entrant.max_err:.1%}"
        return dict.fromkeys(ROW) | known | (self.beside_time(call, clock) if self.on_gpu else {})

    def beside_time(self, call: Callable[[], object], clock: GpuClock) -> dict[str, Any]:
        """Memory, launches, host time, and the Triton kernels' resources."""
        device, kernels = self.plan.device, launches.resources(call)
        seen = launches.launches(call, device)
        return {"peak_bytes": launches.peak_bytes(call, device), "launches": seen.count,
                "device_ms": 1e3 * seen.seconds, "host_us": 1e6 * host_seconds(itertools.repeat(call), clock),
                "config": {each["kernel"]: each["settings"] for each in kernels},
                "regs": max((each["registers"] or 0 for each in kernels), default=None),
                "spills": sum(each["spills"] or 0 for each in kernels) if kernels else None,
                "smem": max((each["shared_bytes"] for each in kernels), default=None)}


def sentence(error: Exception) -> str:
    """What happened, on one line."""
    if isinstance(error, LabError):
        return error.problem
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
