"""An exact simulator of pipeline schedules with one rule.

    start(op) = max( end of the worker's previous operation,
                     end(d) + hop [d ran elsewhere] - recompute(op) [d is a gradient]    for every d that op waits for )
    end(op)   = start(op) + time(op)

Each worker runs its list (schedules.py) in order. Nothing is drawn at random, so results are exact to rounding. With
equal stage times t and no hop RoundPipe's idle share is

    N (N - 1) / (M S + N (N - 1))          against (S - 1) / (M + S - 1) of GPipe and 1F1B, S = N

in rounds of N micro-batches (S >= N), and in larger ones where N divides S; where it doesn't, the last slots are uneven
and one round of M takes (N - 1 - r) (M / N - 1) t longer, r = (S - 1) mod N. With fewer than N in a round it fails.
Weights, memory and the limits of links are not modelled. Source: arXiv 2604.27085, and the simulator beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from labkit.errors import LabError
from labkit.pipeline.schedules import BOUND, SCHEDULES, Op, Plan, make_plan
from labkit.pipeline.timeline import Event, Timeline


@dataclass(frozen=True)
class Costs:
    """Times of one micro-batch in ms; lists hold one number a stage."""

    forward_ms: tuple[float, ...]
    backward_ms: tuple[float, ...]
    recompute_ms: tuple[float, ...]  # the part at the beginning of backward_ms that needs no gradient
    weight_ms: tuple[float, ...]  # the part of backward_ms that zb_h1 runs on its own
    hop_ms: float

    def of(self, op: Op) -> tuple[float, float]:
        """(time, recompute in it) of an operation."""
        if op.kind == "F":
            return self.forward_ms[op.stage], 0.0
        if op.kind == "W":
            return self.weight_ms[op.stage], 0.0
        return self.backward_ms[op.stage] - self.weight_ms[op.stage], self.recompute_ms[op.stage]


def simulate(schedule: str, *, workers: int, micro_batches: int, stage_forward_ms: Sequence[float],
             stage_backward_ms: Sequence[float], hop_ms: float = 0.0, stage_recompute_ms: Sequence[float] | None = None,
             stage_weight_ms: Sequence[float] | None = None, round_size: int | None = None, iterations: int = 1,
             keep_empty: bool = True) -> Timeline:
    """When each operation of a schedule runs.

    Args:
        schedule: "gpipe", "1f1b", "interleaved", "looped", "zb_h1", "roundpipe" or "roundpipe_async".
        stage_forward_ms, stage_backward_ms: time of one micro-batch, recompute included in the backward, the head's in
            the last stage. In RoundPipe the second list is in the order of execution, the fused stage first.
        hop_ms: what data take to another worker.
        stage_recompute_ms: the part of each backward that may run before its gradient arrives; none by default. The
            published log also counts the head's forward in the fused stage so, before its input has arrived.
        stage_weight_ms: zb_h1's part for the weights; by default half of what is not recompute.
        round_size: RoundPipe's micro-batches a round; by default as many rounds of N or more as there are.
        iterations: how many follow one another; only roundpipe_async starts one before the last has ended.
        keep_empty: whether stages of no length count in the makespan (their hops always do). The log leaves them out.
    Raises:
        LabError: a name, length, sign or stage count that does not fit.
    """
    costs = checked_costs(schedule, stage_forward_ms, stage_backward_ms, stage_recompute_ms, stage_weight_ms, hop_ms)
    if min(workers, micro_batches, iterations) < 1:
        raise LabError("Workers, micro-batches and iterations must be 1 or more.", "Choose whole numbers from 1 on.")
    stages = len(costs.forward_ms), len(costs.backward_ms)
    plan = make_plan(schedule, workers, micro_batches, stages, round_size=round_size, iterations=iterations)
    events = [event for event in run(plan, costs) if keep_empty or event.end > event.start]
    return Timeline(workers, tuple(sorted(events, key=lambda event: (event.start, event.end))),
                    asynchronous=plan.staleness > 0, warm_up=plan.bound)


def run(plan: Plan, costs: Costs) -> list[Event]:
    """Apply the rule until all lists are done. Raises LabError for lists that wait for one another."""
    done: dict[Op, Event] = {}
    waiting: dict[Op, list[int]] = {}  # what some workers have stopped for
    position, ready = [0] * len(plan.orders), list(range(len(plan.orders)))
    while ready:
        worker = ready.pop()
        order = plan.orders[worker]
        free = done[order[position[worker] - 1]].end if position[worker] else 0.0
        for op in order[position[worker]:]:
            needs = list(plan.needs(op))
            missing = next((need for need, _ in needs if need not in done), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(worker)
                break
            done[op] = timed(op, worker, free, [(done[need], late) for need, late in needs], costs)
            free = done[op].end
            position[worker] += 1
            ready += waiting.pop(op, [])
    if waiting:
        raise LabError("The schedule waits for itself.", f"Look at what waits for {next(iter(waiting))}.")
    return list(done.values())


def timed(op: Op, worker: int, free: float, needs: list[tuple[Event, bool]], costs: Costs) -> Event:
    """The rule: an operation as it runs on a worker that is free from `free` on."""
    time, recompute = costs.of(op)
    start = free
    for event, late in needs:
        hop = costs.hop_ms if event.worker != worker else 0.0
        start = max(start, event.end + hop - (recompute if late else 0.0))
    return Event(worker, *op, start, start + time, recompute)


def checked_costs(schedule: str, forward: Sequence[float], backward: Sequence[float], recompute: Sequence[float] | None,
                  weight: Sequence[float] | None, hop: float) -> Costs:
    """The times as tuples, with what is left out filled in. Raises LabError."""
    if schedule not in SCHEDULES:
        raise LabError(f"There is no schedule {schedule!r}.", f"Choose one of {', '.join(SCHEDULES)}.")
    if weight is not None and schedule != "zb_h1":
        raise LabError(f"{schedule} does not split its backward.", "Give stage_weight_ms to zb_h1 alone.")
    recompute = [0.0] * len(backward) if recompute is None else recompute
    if schedule == "zb_h1" and weight is None:
        weight = [(b - r) / 2 for b, r in zip(backward, recompute, strict=False)]
    weight = [0.0] * len(backward) if weight is None else weight
    if (schedule in BOUND and len(forward) != len(backward)) or not len(backward) == len(recompute) == len(weight):
        raise LabError("The lists of stage times have different lengths.", "Give each stage one time in every list.")
    if not all(0 <= ms < math.inf for ms in (*forward, *backward, *recompute, *weight, hop)):
        raise LabError("A time is negative or not finite.", "Give times of 0 ms or more.")
    if any(r + w > b * (1 + 1e-12) for b, r, w in zip(backward, recompute, weight, strict=True)):
        raise LabError("A recompute or weight time is longer than the backward it is part of.",
                       "Give stage_backward_ms with both included.")
    return Costs(tuple(forward), tuple(backward), tuple(recompute), tuple(weight), hop)


def steady_state(schedule: str, *, iterations: int = 12, **settings) -> float:
    """The idle share far from the first and the last iteration, from the time between the ends of iterations.

        1 - busy time of an iteration / (N * period),   the period averaged over the last N iterations

    RoundPipe's first worker moves by S a round, so after N iterations at most it is the same again. The approach can
    take longer than that: ask for more iterations until the number stands. Arguments as for `simulate`.
    Raises LabError for too few iterations.
    """
    N = settings["workers"]
    if iterations <= N:
        raise LabError(f"{iterations} iterations are too few for {N} workers.", f"Ask for {N + 4} or more.")
    timeline = simulate(schedule, iterations=iterations, **settings)
    ends = [max(event.end for event in timeline.events if event.iteration == k) for k in range(iterations)]
    period = (ends[-1] - ends[-1 - N]) / N
    return 1 - sum(timeline.busy) / iterations / (N * period) if period else 0.0
