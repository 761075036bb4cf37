"""The best that a schedule can do for a model: the shortest simulation over its reasonable layouts.

A bound schedule is judged unfairly by one layout: how many stages a worker has, and how many layers join the head in
the last of them, decides about a tenth of its makespan. So both are searched, for every schedule alike. RoundPipe's
layouts are those of its partitioners. All recompute before their gradient arrives.
Letters: L layers without the head, N workers, M micro-batches, v stages a worker.
"""

from collections.abc import Iterator, Sequence

from labkit.errors import LabError
from labkit.pipeline.exact_partition import exact_partition
from labkit.pipeline.partition import (
    Layers,
    Partition,
    bound_times,
    library_cost,
    library_partition,
    paper_cost,
    paper_partition,
)
from labkit.pipeline.schedules import BOUND, ONE_STAGE, SCHEDULES
from labkit.pipeline.simulate import simulate
from labkit.pipeline.timeline import Timeline

STAGES_A_WORKER = (2, 3, 4, 6)


def layouts(count: int, workers: int, stages: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Sizes of bound stages over `count` layers and a head: equal, but for the last, which holds the head and no more
    layers than an equal share. `stages`: how many a worker may have; what leaves a stage empty is left out."""
    for v in stages:
        rest = workers * v - 1
        for last in range(count // (rest + 1) + 1) if rest else [count]:
            if count - last >= rest:
                yield (*((count - last) // rest + (i < (count - last) % rest) for i in range(rest)), last + 1)


def partitions(layers: Layers, *, workers: int, micro_batches: int) -> dict[str, Partition]:
    """RoundPipe's layouts by name: two costs, each with a greedy search and with the exact one."""
    paper = paper_cost(workers, micro_batches)
    return {"paper": paper_partition(layers, workers=workers, micro_batches=micro_batches),
            "library": library_partition(layers, workers=workers),
            "exact, paper's cost": exact_partition(layers, paper),
            "exact, library's cost": exact_partition(layers, library_cost(workers))}


def tuned(schedule: str, layers: Layers, *, workers: int, micro_batches: int, hop_ms: float = 0.0,
          **more) -> tuple[tuple[int, ...] | Partition, Timeline]:
    """The layout of a schedule with the least makespan, and its simulation.

    layers: the head counts as the last. more: round_size and iterations of `simulate`.
    Raises LabError for an unknown schedule, and where no layout fits.
    """
    if schedule not in SCHEDULES:
        raise LabError(f"There is no schedule {schedule!r}.", f"Choose one of {', '.join(SCHEDULES)}.")
    if schedule in BOUND:
        stages = (1,) if schedule in ONE_STAGE else STAGES_A_WORKER
        times = {sizes: bound_times(layers, sizes) for sizes in layouts(len(layers.forward_ms) - 1, workers, stages)}
    else:
        cuts = partitions(layers, workers=workers, micro_batches=micro_batches).values()
        times = {cut: (*cut.times(layers), cut.recompute(layers)) for cut in cuts}
    if not times:
        raise LabError(f"{schedule} finds no layout of {len(layers.forward_ms)} layers on {workers} workers.",
                       "Choose more layers or fewer workers.")
    runs = [(layout, simulate(schedule, workers=workers, micro_batches=micro_batches, stage_forward_ms=forward,
                              stage_backward_ms=backward, stage_recompute_ms=recompute, hop_ms=hop_ms, **more))
            for layout, (forward, backward, recompute) in times.items()]
    return min(runs, key=lambda run: run[1].makespan)
