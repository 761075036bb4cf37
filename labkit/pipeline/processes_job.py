"""What the processes are told: a plan (schedules.py), the units of each stage, and what operations last.

A unit is one of the L blocks, or the head, the last. RoundPipe's backward stages stand in the order in which they run,
so the first holds the last units.
"""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

from labkit.errors import LabError
from labkit.pipeline.partition import Layers, Partition, bound_times
from labkit.pipeline.processes_model import Blocks, Sleep, balanced_sizes, best_partition
from labkit.pipeline.schedules import BOUND, ONE_STAGE, SCHEDULES, Op, Plan, make_plan
from labkit.pipeline.simulate import Costs, checked_costs
from labkit.pipeline.timeline import Timeline

RECOMPUTE = ("roundpipe", "all", "none")


@dataclass(frozen=True)
class Job:
    """A plan with what it needs to run."""

    plan: Plan
    costs: Costs  # zeros where nothing sleeps
    forward: tuple[range, ...]  # units of each stage
    backward: tuple[range, ...]
    micro_batches: int
    iterations: int
    early: bool  # recompute before the gradient arrives

    @cached_property
    def places(self) -> dict[Op, tuple[int, int]]:
        """operation -> (its flag, its worker)"""
        pairs = [(op, worker) for worker, order in enumerate(self.plan.orders) for op in order]
        return {op: (flag, worker) for flag, (op, worker) in enumerate(pairs)}

    @cached_property
    def readers(self) -> dict[Op, set[int]]:
        """operation -> workers to wake when it ends"""
        found: dict[Op, set[int]] = {op: set() for op in self.places}
        for op, (_, worker) in self.places.items():
            for need, _ in self.plan.needs(op):
                found[need] |= {worker} - {self.places[need][1]}
        return found

    @property
    def splits(self) -> bool:
        """Whether the backward of the weights is an operation of its own."""
        return any(op.kind == "W" for op in self.places)

    def units(self, op: Op) -> range:
        return (self.forward if op.kind == "F" else self.backward)[op.stage]


def make_job(schedule: str, workers: int, blocks: Blocks, micro_batches: int, *,
             stage_layers: Sequence[int] | Partition | None = None, sleep_ms: Sleep | None = None,
             round_size: int | None = None, iterations: int = 1, recompute: str = "roundpipe") -> Job:
    """A job from the arguments of `PipelineProcesses.run`. Raises LabError for what doesn't fit."""
    if schedule not in SCHEDULES or recompute not in RECOMPUTE:
        raise LabError(f"There is no schedule {schedule!r} with recompute {recompute!r}.",
                       f"Choose one of {', '.join(SCHEDULES)}, and one of {', '.join(RECOMPUTE)}.")
    if min(micro_batches, iterations) < 1:
        raise LabError(f"{micro_batches} micro-batches in {iterations} iterations do nothing.",
                       "Use 1 or more of each.")
    layers = (sleep_ms or Sleep()).costs(blocks.layers)
    stages = default_stages(schedule, layers, workers, micro_batches) if stage_layers is None else stage_layers
    forward, backward = stage_ranges(schedule, stages, blocks.units)
    early = recompute == "all" or (recompute == "roundpipe" and schedule not in BOUND)
    times = stage_times(layers, stages, early) if sleep_ms else ([0.0] * len(forward), [0.0] * len(backward), None)
    plan = make_plan(schedule, workers, micro_batches, (len(forward), len(backward)), round_size=round_size,
                     iterations=iterations)
    return Job(plan, checked_costs(schedule, *times, None, 0.0), forward, backward, micro_batches, iterations, early)


def default_stages(schedule: str, layers: Layers, workers: int, micro_batches: int) -> Sequence[int] | Partition:
    """Stages whose longest is shortest, as many as there can be where a worker may have several."""
    units = len(layers.forward_ms)
    if schedule not in BOUND:
        return best_partition(layers, workers, micro_batches)
    stages = workers if schedule in ONE_STAGE else units // workers * workers
    if not 1 <= stages <= units:
        raise LabError(f"{units - 1} layers and the head are too few for {workers} workers.",
                       "Give Blocks more layers, or stage_layers with empty stages.")
    return balanced_sizes(layers, stages)


def stage_ranges(schedule: str, stages: Sequence[int] | Partition, units: int) -> tuple[tuple[range, ...], ...]:
    """The units of each stage, (forward, backward). Raises LabError for sizes that don't make the model."""
    in_turn = isinstance(stages, Partition)
    forward, backward = (stages.forward, stages.backward) if in_turn else (tuple(stages), tuple(stages))
    totals = {sum(backward), sum(forward) + sum(backward[:1]) * in_turn}
    fused = not in_turn or sum(backward[:1]) > 0
    if in_turn == (schedule in BOUND) or totals != {units} or min(*forward, *backward, 0) < 0 or not fused:
        raise LabError(f"{schedule} cannot have the stages {stages} of {units - 1} layers and the head.",
                       "Bound schedules take sizes, RoundPipe a Partition whose fused stage has the head; "
                       f"they add up to {units}.")
    if in_turn:
        return ranges(forward), tuple(range(units - each.stop, units - each.start) for each in ranges(backward))
    return ranges(forward), ranges(forward)


def ranges(sizes: Sequence[int]) -> tuple[range, ...]:
    return tuple(range(*pair) for pair in pairwise(accumulate(sizes, initial=0)))


def stage_times(layers: Layers, stages: Sequence[int] | Partition, early: bool) -> tuple:
    """(forward, backward, recompute or None) of each stage."""
    if isinstance(stages, Partition):
        return *stages.times(layers), stages.recompute(layers) if early else None
    forward, backward, recompute = bound_times(layers, stages)
    return forward, backward, recompute if early else None


def measured_costs(timelines: Sequence[Timeline], job: Job) -> Costs:
    """The times of each stage as they were measured: the median over micro-batches and repeats."""
    times = defaultdict(list)
    for event in (event for timeline in timelines for event in timeline.events):
        times[event.kind, event.stage].append((event.end - event.start, event.recompute_ms))

    def median(kind: str, stage: int, part: int = 0) -> float:
        return statistics.median(each[part] for each in times[kind, stage]) if times[kind, stage] else 0.0

    stages = range(len(job.backward))
    back = ["FB" if ("FB", stage) in times else "B" for stage in stages]
    weight = tuple(median("W", stage) for stage in stages)
    return replace(job.costs, forward_ms=tuple(median("F", stage) for stage in range(len(job.forward))),
                   backward_ms=tuple(median(back[s], s) + weight[s] for s in stages),
                   recompute_ms=tuple(median(back[s], s, 1) for s in stages), weight_ms=weight)
