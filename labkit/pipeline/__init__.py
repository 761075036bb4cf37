"""Pipelines: exact simulation of schedules, where to cut a model into stages, and the protocol behind late weights.

schedules        who does what in which order, as data
simulate         one rule gives every operation its time; the steady state of a chain of iterations
timeline         events, makespan, bubble and its four parts
partition        layers into RoundPipe's stages: the paper's greedy and the library's
exact_partition  dynamic programming, the yardstick for both
interleavings    visits every interleaving of agents that share buffers
staleness        RoundPipe's event protocol as such agents: five orderings, and weights exactly one update late
processes        the schedules in real processes, beside the simulation; processes_workers: how they start and end
processes_model  what they compute; processes_job: what they are told
worker           what one of them does; worker_schedule: its part of a plan; worker_peer: of a schedule of torch
offload          one GPU, weights in host memory: the engine; offload_pass: one iteration; offload_host: the copies in
                 host memory; offload_lanes, offload_machines: threads or CUDA streams; offload_report: exposed time
offload_memory   the longest sequence within so much memory, with offload and without; live_bytes and
                 offload_worst_case: an exact count of what a device holds
offload_stages   a decoder as stages; offload_peer: the authors' engine
tuned            the best layout of every schedule
published        inputs, layouts and the log of the simulation that the authors published; published_speed: what they
                 measured
"""

from labkit.pipeline.exact_partition import exact_partition
from labkit.pipeline.offload import OffloadEngine
from labkit.pipeline.offload_lanes import LANES
from labkit.pipeline.offload_machines import Link
from labkit.pipeline.offload_memory import longest_sequence
from labkit.pipeline.offload_peer import RoundPipePeer, roundpipe_problem
from labkit.pipeline.offload_report import OffloadReport
from labkit.pipeline.offload_stages import gpt_stages
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
from labkit.pipeline.processes import PipelineProcesses, Run
from labkit.pipeline.processes_model import Blocks, Sleep
from labkit.pipeline.schedules import SCHEDULES
from labkit.pipeline.simulate import simulate, steady_state
from labkit.pipeline.staleness import INVARIANTS, ORDERINGS, check_protocol
from labkit.pipeline.timeline import BubbleSplit, Event, Timeline
from labkit.pipeline.worker_peer import PEERS

__all__ = ["INVARIANTS", "LANES", "ORDERINGS", "PEERS", "SCHEDULES", "Blocks", "BubbleSplit", "Event", "Layers", "Link",
           "OffloadEngine", "OffloadReport", "Partition", "PipelineProcesses", "RoundPipePeer", "Run", "Sleep",
           "Timeline", "bound_times", "check_protocol", "exact_partition", "gpt_stages", "library_cost",
           "library_partition", "longest_sequence", "paper_cost", "paper_partition", "roundpipe_problem", "simulate",
           "steady_state", "with_head"]
