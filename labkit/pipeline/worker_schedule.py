"""One worker's part of a plan (schedules.py), with real tensors and the clock.

Data cross between workers through a store in shared memory, as in RoundPipe's host memory: hidden states and their
gradients at every boundary between units, and one flag an operation. Who ends an operation sets its flag and rings the
bell (a semaphore) of each worker that needs it; who lacks a flag sleeps on its own bell, so waiting costs no CPU.

    F    hidden states without a graph; of the head: its loss, with a graph that its backward uses
    B    recompute from the stage's input, then backward; zb_h1: towards the input alone, W towards the weights
    FB   forward, loss and backward of the last units

Each iteration has its own micro-batches. A slot is (iteration, micro-batch), so an asynchronous chain overwrites
nothing that is still to be read.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from labkit.pipeline.processes_job import Job
from labkit.pipeline.processes_model import Blocks, body, head_loss, unit_parameters
from labkit.pipeline.schedules import Op
from labkit.pipeline.timeline import Event


@dataclass(frozen=True)
class Store:
    """What all processes see."""

    hidden: Tensor  # [slots, L, B, T, D], at boundaries 1 ... L
    gradient: Tensor
    flags: Tensor  # uint8, one an operation

    @classmethod
    def make(cls, blocks: Blocks, slots: int, workers: int) -> "Store":
        """Shared memory for `slots` micro-batches."""
        hidden, gradient = (torch.zeros(slots, blocks.layers, blocks.batch, blocks.tokens, blocks.width).share_memory_()
                            for _ in range(2))
        flags = torch.zeros(3 * slots * (blocks.units + workers), dtype=torch.uint8).share_memory_()
        return cls(hidden, gradient, flags)


def rest(until: float) -> None:
    """Sleep until a moment of the clock; the model of a GPU that is still computing."""
    left = until - time.perf_counter()
    if left > 0:
        time.sleep(left)


@dataclass
class Executor:
    """A worker with its job. `repeat` runs it once."""

    blocks: Blocks
    model: torch.nn.Module
    store: Store
    bells: list
    worker: int
    job: Job
    heads: dict = field(default_factory=dict)  # slot -> (hidden states before the head, loss)
    graphs: dict = field(default_factory=dict)  # what W of zb_h1 needs

    def __post_init__(self):
        self.flags = self.store.flags.numpy()
        self.tokens = [self.blocks.micro_batch(m) for m in range(self.job.micro_batches * self.job.iterations)]
        self.inputs = {units.start for units in self.job.backward} | {units.stop for units in self.job.forward}

    def repeat(self) -> list[Event]:
        """Run the worker's list; times in s of the clock that all processes share."""
        self.model.zero_grad(set_to_none=True)
        self.heads.clear()
        self.graphs.clear()
        return [self.operate(op) for op in self.job.plan.orders[self.worker]]

    def operate(self, op: Op) -> Event:
        """Wait, compute, sleep, tell. A recompute that waits for its gradient counts as run right before the rest, as
        in the simulator."""
        total, recompute = (ms / 1000 for ms in self.job.costs.of(op))
        early = self.job.early and op.kind == "B"
        self.wait(need for need, late in self.job.plan.needs(op) if not (early and late))
        start = time.perf_counter()
        rebuilt_s = 0.0
        if op.kind in ("B", "FB"):
            graph = self.rebuild(op)
            rest(start + recompute)
            rebuilt = time.perf_counter()
            rebuilt_s = rebuilt - start if early else 0.0
            self.wait(need for need, late in self.job.plan.needs(op) if early and late)
            start += time.perf_counter() - rebuilt
            self.backward(op, graph)
        else:
            (self.forward if op.kind == "F" else self.weights)(op)
        rest(start + total)
        self.tell(op)
        return Event(self.worker, *op, start, time.perf_counter(), rebuilt_s)

    def wait(self, needs: Iterator[Op]) -> None:
        """Until the flags of all `needs` are set. A bell may ring for another operation, hence the loop."""
        for need in needs:
            flag = self.job.places[need][0]
            while not self.flags[flag]:
                self.bells[self.worker].acquire()

    def tell(self, op: Op) -> None:
        """Set the flag first: a woken worker looks for it."""
        self.flags[self.job.places[op][0]] = 1
        for reader in self.job.readers[op]:
            self.bells[reader].release()

    def slot(self, op: Op) -> int:
        return op.iteration * self.job.micro_batches + op.micro_batch

    def input(self, op: Op, boundary: int) -> Tensor:
        """Token ids [B, T] in front of the first unit, hidden states [B, T, D] behind it."""
        if boundary == 0:
            return self.tokens[self.slot(op)][:, :-1]
        return self.store.hidden[self.slot(op), boundary - 1].clone()

    def forward(self, op: Op) -> None:
        """F: keep the hidden states wherever a later stage begins."""
        units, slot = self.job.units(op), self.slot(op)
        x = self.input(op, units.start)
        with torch.no_grad():
            for unit in units:
                if unit < self.blocks.layers:
                    x = body(self.model, x, unit, unit + 1)
                    if unit + 1 in self.inputs:
                        self.put(self.store.hidden, slot, unit + 1, x)
        if self.blocks.layers in units:
            leaf = x.detach().requires_grad_()
            self.heads[slot] = leaf, self.loss(op, leaf)

    def put(self, where: Tensor, slot: int, boundary: int, value: Tensor) -> None:
        """Hidden states or gradients at a boundary; behind the last unit there is none."""
        if boundary <= self.blocks.layers:
            where[slot, boundary - 1] = value

    def loss(self, op: Op, hidden_BTD: Tensor) -> Tensor:
        return head_loss(self.model, hidden_BTD, self.tokens[self.slot(op)], self.job.micro_batches)

    def rebuild(self, op: Op) -> tuple[Tensor, Tensor]:
        """(input, output) of the stage with a graph between them; the output of FB is the loss."""
        units = self.job.units(op)
        x = self.input(op, units.start)
        if units.start:
            x.requires_grad_()
        y = body(self.model, x, units.start, units.stop)
        return x, self.loss(op, y) if op.kind == "FB" and units else y

    def backward(self, op: Op, graph: tuple[Tensor, Tensor]) -> None:
        """B and FB: gradients of the weights and of the stage's input; zb_h1's W makes the former later."""
        (x, y), units, slot = graph, self.job.units(op), self.slot(op)
        if not units:
            return
        outputs, gradients = [y], [None if op.kind == "FB" else self.output_gradient(op)]
        if self.job.splits:
            self.graphs[slot, op.stage] = outputs, gradients
            dx, = torch.autograd.grad(outputs, x, gradients, retain_graph=True) if units.start else (None,)
        else:
            torch.autograd.backward(outputs, gradients)
            dx = x.grad if units.start else None
        if dx is not None:
            self.put(self.store.gradient, slot, units.start, dx)

    def output_gradient(self, op: Op) -> Tensor:
        """Of the hidden states behind the stage's blocks: from the store, or from the head's own graph."""
        units, slot = self.job.units(op), self.slot(op)
        if units.stop <= self.blocks.layers:
            return self.store.gradient[slot, units.stop - 1].clone()
        leaf, loss = self.heads[slot]
        loss.backward(inputs=[leaf] if self.job.splits else None, retain_graph=self.job.splits)
        return leaf.grad

    def weights(self, op: Op) -> None:
        """W: the gradients of the weights, behind B's of the input."""
        units = self.job.units(op)
        if not units:
            return
        outputs, gradients = self.graphs.pop((self.slot(op), op.stage))
        if self.blocks.layers in units:
            outputs, gradients = [*outputs, self.heads[self.slot(op)][1]], [*gradients, None]
        torch.autograd.backward(outputs, gradients, inputs=unit_parameters(self.model, units.start, units.stop))
