"""Pipeline schedules as data: for every worker the list of its operations, and for every operation what it waits for.

    F(s, m)   forward of stage s for micro-batch m                 waits for F(s - 1, m)
    B(s, m)   backward; with zb_h1 of the inputs alone             waits for B(s + 1, m) and F(s, m)
    W(s, m)   zb_h1: backward of the weights                       waits for B(s, m)
    FB(0, m)  RoundPipe: forward, loss and backward of the last layers, waits for the last F; B(j, m) for the one before

Bound schedules pin stage s to worker s mod N. RoundPipe lays forward and backward stages out as one list of
S = S_f + S_b slots, its backward stages numbered in the order they run, and deals the slots in turn: slot i of a round
goes to worker (g + i) mod N with all micro-batches of the round, then g <- (g + S) mod N, without a flush. A flush
would be a dependency: the first forward of an iteration waits for the last gradient of the one before it, or, with
staleness one, of the one before that.
Sources: GPipe 1811.06965; 1F1B and interleaved 2104.04473, in the order of torch.distributed.pipelining; looped
breadth-first 2211.05953; ZB-H1 2401.10241; RoundPipe 2604.27085. Letters: N workers, M micro-batches, S stages, v
stages a worker.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from labkit.errors import LabError


class Op(NamedTuple):
    """One operation of one micro-batch."""

    kind: str  # "F", "B", "W" or "FB"
    stage: int
    micro_batch: int
    iteration: int = 0


@dataclass(frozen=True)
class Plan:
    """Who does what in which order. Times are no part of it."""

    orders: tuple[tuple[Op, ...], ...]  # one list a worker
    forward_stages: int
    backward_stages: int
    last_gradient: Op  # what completes the gradient of the first layers, in iteration 0
    bound: bool  # stage s has its forward and backward on one worker
    staleness: int  # updates that weights may lack

    def needs(self, op: Op) -> Iterator[tuple[Op, bool]]:
        """What must have ended before `op`; True marks a gradient, which a recompute does not wait for."""
        before = op._replace(kind="F", stage=op.stage - 1)
        if op.kind == "F" and op.stage:
            yield before, False
        elif op.kind == "W":
            yield op._replace(kind="B"), False
        elif op.kind == "B" and self.bound:
            yield op._replace(kind="F"), False
            if op.stage + 1 < self.backward_stages:
                yield op._replace(stage=op.stage + 1), True
        elif op.kind == "B":
            yield op._replace(kind="FB" if op.stage == 1 else "B", stage=op.stage - 1), True
            if self.forward_stages:
                yield op._replace(kind="F", stage=self.forward_stages - 1), False
        elif op.kind == "FB" and self.forward_stages:
            yield op._replace(kind="F", stage=self.forward_stages - 1), True
        elif op.iteration > self.staleness:  # the operation that opens a micro-batch
            yield self.last_gradient._replace(iteration=op.iteration - 1 - self.staleness), False


def gpipe(worker: int, N: int, M: int, v: int) -> list[Op]:
    """All forwards, then all backwards."""
    return [Op(kind, worker, m) for kind in "FB" for m in range(M)]


def one_f_one_b(worker: int, N: int, M: int, v: int) -> list[Op]:
    """N - worker forwards to warm up, then one backward and one forward in turn."""
    warm = min(M, N - worker)
    order = [Op("F", worker, m) for m in range(warm)]
    for m in range(M):
        order.append(Op("B", worker, m))
        if m + warm < M:
            order.append(Op("F", worker, m + warm))
    return order


def zb_h1(worker: int, N: int, M: int, v: int) -> list[Op]:
    """1F1B whose weight gradients come `worker` micro-batches late: with F = B = W every worker idles (N - 1) F."""
    order = []
    for op in one_f_one_b(worker, N, M, v):
        order.append(op)
        if op.kind == "B" and op.micro_batch >= worker:
            order.append(Op("W", worker, op.micro_batch - worker))
    return order + [Op("W", worker, m) for m in range(max(0, M - worker), M)]


def interleaved(worker: int, N: int, M: int, v: int) -> list[Op]:
    """1F1B over v stages a worker, in groups of M / max(1, M // N) micro-batches."""
    groups = max(1, M // N)
    if M % groups:
        raise LabError(f"{M} micro-batches do not make {groups} equal groups, which interleaved 1F1B needs.",
                       f"Choose a multiple of the {N} workers.")
    width = M // groups
    steps = [(step // width % v, step // (width * v) * width + step % width) for step in range(v * M)]
    forward = [Op("F", local * N + worker, m) for local, m in steps]
    backward = [Op("B", (v - 1 - local) * N + worker, m) for local, m in steps]
    warm = min(v * M, (v - 1) * width + 2 * (N - 1 - worker))
    pairs = [op for pair in zip(forward[warm:], backward, strict=False) for op in pair]
    return forward[:warm] + pairs + backward[v * M - warm:]


def looped(worker: int, N: int, M: int, v: int) -> list[Op]:
    """Breadth first: all micro-batches through one stage, then the next; backward the other way round."""
    stages = range(worker, N * v, N)
    return ([Op("F", s, m) for s in stages for m in range(M)]
            + [Op("B", s, m) for s in reversed(stages) for m in reversed(range(M))])


BOUND: dict[str, Callable[[int, int, int, int], list[Op]]] = {
    "gpipe": gpipe, "1f1b": one_f_one_b, "interleaved": interleaved, "looped": looped, "zb_h1": zb_h1}
ROUND = {"roundpipe": 0, "roundpipe_async": 1}  # -> staleness
SCHEDULES = (*BOUND, *ROUND)
ONE_STAGE = ("gpipe", "1f1b", "zb_h1")  # as many stages as workers


def bound_plan(schedule: str, N: int, M: int, S: int, iterations: int = 1) -> Plan:
    """The plan of a bound schedule. Raises LabError where the stages don't fit the workers."""
    if S % N or not S or (schedule in ONE_STAGE and S != N):
        raise LabError(f"{schedule} on {N} workers cannot have {S} stages.",
                       f"Give {N} stages." if schedule in ONE_STAGE else f"Give a multiple of {N}.")
    once = [BOUND[schedule](worker, N, M, S // N) for worker in range(N)]
    orders = tuple(tuple(op._replace(iteration=k) for k in range(iterations) for op in order) for order in once)
    return Plan(orders, S, S, once[0][-1], bound=True, staleness=0)


def cut_rounds(N: int, M: int, size: int | None = None) -> list[range]:
    """Micro-batches of each round: `size` and a shorter last one; by default as many rounds of N or more as there are.

    With fewer than N in a round a worker is wanted again before its data are there, and the bubble grows.
    """
    if size is not None and size < 1:
        raise LabError(f"A round of {size} micro-batches does nothing.", "Choose a round size of 1 or more.")
    rounds = -(-M // size) if size else max(1, M // N)
    starts = [i * size for i in range(rounds)] + [M] if size else [i * M // rounds for i in range(rounds + 1)]
    return [range(*pair) for pair in pairwise(starts)]


def roundpipe_plan(N: int, M: int, S_f: int, S_b: int, *, staleness: int = 0, round_size: int | None = None,
                   iterations: int = 1) -> Plan:
    """Stages dealt in turn, round after round and iteration after iteration. Raises LabError without a fused stage."""
    if S_b < 1:
        raise LabError("RoundPipe has no backward stage.", "Give at least the fused one, the first of the backward.")
    slots = [("F", s) for s in range(S_f)] + [("FB", 0)] + [("B", s) for s in range(1, S_b)]
    orders, turn = [[] for _ in range(N)], 0
    for iteration in range(iterations):
        for batch in cut_rounds(N, M, round_size):
            for kind, stage in slots:
                orders[turn % N].extend(Op(kind, stage, m, iteration) for m in batch)
                turn += 1
    last = Op(*slots[-1], M - 1)
    return Plan(tuple(map(tuple, orders)), S_f, S_b, last, bound=False, staleness=staleness)


def make_plan(schedule: str, workers: int, micro_batches: int, stages: tuple[int, int], *,
              round_size: int | None = None, iterations: int = 1) -> Plan:
    """The plan of any schedule; `stages`: how many go forward and how many backward. Raises LabError."""
    if schedule in BOUND:
        return bound_plan(schedule, workers, micro_batches, stages[0], iterations)
    return roundpipe_plan(workers, micro_batches, *stages, staleness=ROUND[schedule], round_size=round_size,
                          iterations=iterations)
