"""Pipeline schedules in real processes, measured beside the simulation.

    with PipelineProcesses(workers=4, blocks=Blocks(layers=8)) as processes:
        run = processes.run("1f1b", micro_batches=8, sleep_ms=Sleep())
        run.makespans_ms, run.simulated.makespan, run.gradient_error

One process a worker, started once for all runs: each runs its list of the plan (schedules.py) with real transformer
blocks and autograd (worker_schedule.py). Whatever ends the block, the processes end with it: an error, an interrupt, a
worker that dies, a run that takes too long. Where the process that holds them is killed, they end by themselves.

Measured and simulated time differ by what the simulator does not know: waking a worker, copying hidden states, and
whatever else the cores do. Only repeats on a quiet machine compare.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.pipeline.partition import Partition
from labkit.pipeline.processes_job import Job, make_job, measured_costs
from labkit.pipeline.processes_model import Blocks, Sleep
from labkit.pipeline.processes_workers import Workers
from labkit.pipeline.simulate import Costs, simulate
from labkit.pipeline.timeline import Event, Timeline
from labkit.pipeline.worker_peer import PEERS

START_S = 0.003  # from the message to the common start


@dataclass(frozen=True)
class Run:
    """What came out: repeats of one schedule."""

    schedule: str
    timelines: tuple[Timeline, ...]  # measured, one a repeat
    simulated: Timeline  # from the sleeps; where nothing sleeps, the same as the next
    resimulated: Timeline  # from the measured times of the stages: what is left to explain is waking and waiting
    gradients: dict[str, Tensor]  # of the last repeat
    gradient_error: float  # the largest absolute deviation from one process

    @property
    def makespans_ms(self) -> list[float]:
        return [timeline.makespan for timeline in self.timelines]

    @property
    def deviations(self) -> list[float]:
        """measured / simulated - 1 of each repeat."""
        return [ms / self.simulated.makespan - 1 for ms in self.makespans_ms]


class PipelineProcesses(Workers):
    """The workers of a pipeline.

    Args:
        workers: N, more than there are cores if operations sleep.
        blocks: the model that is cut into stages.
        time_out_s: the longest wait for an answer.
        slots: the most micro-batches times iterations of a run.
    Raises:
        LabError: sizes below 1; later whatever ended the workers.
    """

    def __init__(self, workers: int = 4, blocks: Blocks | None = None, *, time_out_s: float = 60.0, slots: int = 64):
        self.expected = {}
        super().__init__(workers, blocks or Blocks(), slots, time_out_s)

    def run(self, schedule: str, *, micro_batches: int = 8, stage_layers: Sequence[int] | Partition | None = None,
            sleep_ms: Sleep | None = None, round_size: int | None = None, iterations: int = 1,
            recompute: str = "roundpipe", repeats: int = 3) -> Run:
        """Run a schedule and measure it.

        Args:
            schedule: any that `simulate` knows.
            stage_layers: units of each stage, L blocks and the head as the last unit: sizes for a bound schedule, a
                Partition for RoundPipe. By default the stages whose longest is shortest, as many as there can be where
                a worker may have several; for RoundPipe the partition of least cost.
            sleep_ms: what operations last at least; None leaves the real computation alone.
            round_size: RoundPipe's micro-batches a round.
            iterations: how many follow one another; with roundpipe_async without a flush.
            recompute: which schedules recompute before their gradient arrives, "roundpipe", "all" or "none". All
                recompute, and keep stage inputs alone.
            repeats: how often; all are returned.
        Raises:
            LabError: settings that don't fit, a worker that dies or is silent. The processes have ended then, unless
                the settings were refused.
        """
        job = make_job(schedule, self.count, self.blocks, micro_batches, stage_layers=stage_layers, sleep_ms=sleep_ms,
                       round_size=round_size, iterations=iterations, recompute=recompute)
        return self.measure(schedule, job, "prepare", (job,), sleep_ms, repeats, round_size)

    def peer(self, schedule: str, *, micro_batches: int = 8, stage_layers: Sequence[int] | None = None,
             sleep_ms: Sleep | None = None, repeats: int = 3) -> Run:
        """The same by torch.distributed.pipelining, over gloo: gpipe, 1f1b, interleaved and looped."""
        if schedule not in PEERS:
            raise LabError(f"torch.distributed.pipelining is no peer for {schedule!r}.",
                           f"Choose one of {', '.join(PEERS)}.")
        job = make_job(schedule, self.count, self.blocks, micro_batches, stage_layers=stage_layers, sleep_ms=sleep_ms,
                       recompute="none")
        return self.measure(schedule, job, "prepare_peer", (job, schedule), sleep_ms, repeats, None)

    def check_slots(self, job: Job) -> None:
        used = job.micro_batches * job.iterations
        if used > self.slots or len(job.places) > len(self.store.flags):
            raise LabError(f"{used} micro-batches in {len(job.forward)} stages don't fit {self.slots} slots.",
                           "Give PipelineProcesses more slots.")

    def measure(self, schedule: str, job: Job, message: str, values: tuple, sleep_ms: Sleep | None, repeats: int,
                round_size: int | None) -> Run:
        """Prepare, repeat, collect."""
        if repeats < 1:
            raise LabError("No repeat measures nothing.", "Use repeats=1 or more.")
        self.check_slots(job)
        with self.ended_by_errors():
            self.ask(message, *values, during=schedule)
            timelines = tuple(self.repeat(schedule, job) for _ in range(repeats))
            shares = self.ask("gradients", during=schedule)
        gradients = {name: sum(torch.from_numpy(share[name]) for share in shares if name in share) / job.iterations
                     for name, _ in self.blocks.model().named_parameters()}
        expected = self.one_process(job.micro_batches * job.iterations)
        error = float(torch.stack([(gradients[name] - expected[name]).abs().max() for name in expected]).max())
        resimulated = self.simulated(schedule, job, measured_costs(timelines, job), round_size)
        simulated = self.simulated(schedule, job, job.costs, round_size) if sleep_ms else resimulated
        return Run(schedule, timelines, simulated, resimulated, gradients, error)

    def simulated(self, schedule: str, job: Job, costs: Costs, round_size: int | None) -> Timeline:
        """The same schedule in the simulator."""
        return simulate(schedule, workers=self.count, micro_batches=job.micro_batches, iterations=job.iterations,
                        stage_forward_ms=costs.forward_ms, stage_backward_ms=costs.backward_ms,
                        stage_recompute_ms=costs.recompute_ms, round_size=round_size,
                        stage_weight_ms=costs.weight_ms if schedule == "zb_h1" else None)

    def repeat(self, schedule: str, job: Job) -> Timeline:
        """One repeat, from clean flags and silent bells."""
        self.store.flags.zero_()
        for bell in self.bells:
            while bell.acquire(block=False):
                pass
        answers = self.ask("repeat", time.perf_counter() + START_S, during=schedule)
        events = [Event(*event) for answer in answers for event in answer]
        zero = min(event.start for event in events)
        in_ms = [event._replace(start=1000 * (event.start - zero), end=1000 * (event.end - zero),
                                recompute_ms=1000 * event.recompute_ms) for event in events]
        return Timeline(self.count, tuple(sorted(in_ms, key=lambda event: (event.start, event.end))),
                        asynchronous=job.plan.staleness > 0, warm_up=job.plan.bound)

    def one_process(self, micro_batches: int) -> dict[str, Tensor]:
        """The gradients that all schedules must have, computed here once."""
        if micro_batches not in self.expected:
            self.expected[micro_batches] = self.blocks.gradients(micro_batches)
        return self.expected[micro_batches]
