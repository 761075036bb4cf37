"""A worker's part of a schedule by torch.distributed.pipelining, which has its own order of operations and its own
transport: hidden states and gradients go by gloo from process to process.

Stages recompute as ours do (a checkpoint round the blocks, none round the head). Two functions that change no number
stand at a stage's input and output. Forward meets the first, then the second; backward the other way round. Between
them the clock is read, and the stage's sleep is slept.
"""

import os
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from labkit.objectives import next_token_loss
from labkit.pipeline.processes_job import Job
from labkit.pipeline.processes_model import Blocks, through
from labkit.pipeline.timeline import Event
from labkit.pipeline.worker_schedule import rest

SINGLE = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B"}  # one stage a worker
PEERS = {**SINGLE, "interleaved": "ScheduleInterleaved1F1B", "looped": "ScheduleLoopedBFS"}


@dataclass
class Pass:
    """One micro-batch in one stage."""

    worker: int
    stage: int
    micro_batch: int
    sleep_s: tuple[float, float]  # forward, backward
    events: list[Event]
    start: float = 0.0

    def end(self, kind: str) -> None:
        rest(self.start + self.sleep_s[kind == "B"])
        self.events.append(Event(self.worker, kind, self.stage, self.micro_batch, 0, self.start, time.perf_counter(),
                                 0.0))


class Entrance(torch.autograd.Function):
    """The stage's input; its backward comes last."""

    @staticmethod
    def forward(context, x: Tensor, one: Pass) -> Tensor:
        context.one = one
        return x.view_as(x)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple:
        context.one.end("B")
        return gradient, None


class Exit(torch.autograd.Function):
    """The stage's output; its backward comes first."""

    @staticmethod
    def forward(context, y: Tensor, one: Pass) -> Tensor:
        context.one = one
        one.end("F")
        return y.view_as(y)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple:
        context.one.start = time.perf_counter()
        return gradient, None


class StageModule(nn.Module):
    """The units of one stage, measured. Its micro-batches come in order, as all these schedules have it."""

    def __init__(self, model: nn.Module, worker: int, stage: int, units: range, sleep_s: tuple[float, float]):
        super().__init__()
        self.model, self.worker, self.stage, self.units, self.sleep_s = model, worker, stage, units, sleep_s
        self.begin()

    def begin(self) -> None:
        """Before each repeat."""
        self.events, self.count = [], 0

    def forward(self, x: Tensor) -> Tensor:
        one = Pass(self.worker, self.stage, self.count, self.sleep_s, self.events, time.perf_counter())
        self.count += 1
        if 0 in self.units:  # token ids have no gradient, so the entrance is behind the embedding
            x = self.model.embed(x)
        x = checkpoint(through, self.model, Entrance.apply(x, one), self.units.start, self.units.stop,
                       use_reentrant=False)
        if len(self.model.blocks) in self.units:
            x = self.model.head(self.model.norm(x))
        return Exit.apply(x, one)


class Peer:
    """The stages of this worker under a schedule of torch."""

    def __init__(self, blocks: Blocks, model: nn.Module, worker: int, workers: int, job: Job, schedule: str,
                 meeting: str):
        from torch.distributed import pipelining  # takes two seconds, and only peers need it

        if not dist.is_initialized():
            join_group(worker, workers, meeting)
        self.model, M = model, job.micro_batches
        mine = range(worker, len(job.forward), workers)
        self.modules = [StageModule(model, worker, s, job.forward[s], (job.costs.forward_ms[s] / 1000,
                                                                       job.costs.backward_ms[s] / 1000)) for s in mine]
        stages = [pipelining.PipelineStage(module, s, len(job.forward), torch.device("cpu"))
                  for module, s in zip(self.modules, mine, strict=True)]
        # Its own scaling divides by M once a stage, but all stages of a worker share the gradients of one model.
        settings = {"n_microbatches": M, "scale_grads": False,
                    "loss_fn": lambda logits, tokens: next_token_loss(logits, tokens) / M}
        make = getattr(pipelining, PEERS[schedule])
        self.schedule = make(stages[0] if schedule in SINGLE else stages, **settings)
        tokens = torch.cat([blocks.micro_batch(m) for m in range(M)])
        self.inputs = (tokens[:, :-1],) if worker == 0 else ()
        last = (len(job.forward) - 1) % workers == worker
        self.target = {"target": tokens[:, 1:].contiguous()} if last else {}
        self.repeat()  # the first step exchanges the shapes

    def repeat(self) -> list[Event]:
        """One step; the events as they ran."""
        self.model.zero_grad(set_to_none=True)
        for module in self.modules:
            module.begin()
        self.schedule.step(*self.inputs, **self.target, return_outputs=False)
        return [event for module in self.modules for event in module.events]


def join_group(worker: int, workers: int, meeting: str) -> None:
    """All workers of this machine, by gloo over its own loopback."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else it asks what the host's name stands for
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=worker, world_size=workers)
