"""Pipelines: exact simulation of schedules, where to cut a model into stages, and the protocol behind late weights.

schedules        who does what in which order, as data
simulate         one rule gives every operation its time; the steady state of a chain of iterations
timeline         events, makespan, bubble and its four parts
partition        layers into RoundPipe's stages: the paper's greedy and the library's
exact_partition  dynamic programming, the yardstick for both
interleavings    visits every interleaving of agents that share buffers
staleness        RoundPipe's event protocol as such agents: five orderings, and weights exactly one update late
published        inputs, layouts and the log of the simulation that the authors published
"""

from labkit.pipeline.exact_partition import exact_partition
from labkit.pipeline.partition import (
    Layers,
    Partition,
    bound_times,
    library_cost,
    library_partition,
    paper_cost,
    paper_partition,
    with_head,
)
from labkit.pipeline.schedules import SCHEDULES
from labkit.pipeline.simulate import simulate, steady_state
from labkit.pipeline.staleness import INVARIANTS, ORDERINGS, check_protocol
from labkit.pipeline.timeline import BubbleSplit, Event, Timeline

__all__ = ["INVARIANTS", "ORDERINGS", "SCHEDULES", "BubbleSplit", "Event", "Layers", "Partition", "Timeline",
           "bound_times", "check_protocol", "exact_partition", "library_cost", "library_partition", "paper_cost",
           "paper_partition", "simulate", "steady_state", "with_head"]
