"""Train a model that does not fit on the device: its weights, gradients and optimizer live in host memory.

    engine = OffloadEngine(stages, head_loss, optimizer=lambda weights: torch.optim.AdamW(weights, lr=1e-3))
    for _ in range(100):
        loss = engine.step(micro_batches)             # [(x, target), ...]
    engine.finish()                                   # the modules hold the last weights

This is RoundPipe on one GPU. A stage's weights visit the device for all micro-batches of an iteration, forward and once
more backward; only the stages' inputs are kept, and the forward is computed again (offload_pass.py). Four streams copy
and compute at once (offload_lanes.py), and a thread of the host runs the optimizer. With `staleness=1` an iteration
does not wait for that thread: by the orderings of staleness.py its weights lack exactly one update,

    W_(T+2) = W_(T+1) - eta Adam(G_T),    G_T = grad L(W_T),    W_1 = W_0.

With staleness 0 the updates are those of plain training: gradients add up over micro-batches in the same order. Random
numbers (dropout) are drawn stage by stage, not micro-batch by micro-batch; with one micro-batch that is the same.
Source: arXiv 2604.27085; roundpipe 0.1.1. Not taken over: parameters spread over the gaps between activations, longest
first (here they go in chunks), and other cuts forward than backward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from labkit.errors import LabError
from labkit.pipeline.offload_host import HostWeights
from labkit.pipeline.offload_lanes import COMPUTE, LANES, OPTIMIZER, PARAMETERS, Label
from labkit.pipeline.offload_machines import CHUNK_BYTES, UP, Link, Machine, machine_of
from labkit.pipeline.offload_pass import Pass, Visit, Weights, visits_of
from labkit.pipeline.offload_report import OffloadReport, report_of


class OffloadEngine:
    """One model in training.

    Args:
        stages: modules of one tensor in, one out; the first reads a micro-batch's x. They keep the master weights, and
            two stages may share a weight.
        head_loss: (output of the last stage, target) -> mean loss; a module with weights of its own, or a function.
        optimizer: list of parameters -> optimizer over them; it gets the fp32 copies.
        device: "cpu", "cuda", or a Machine.
        staleness: 0, or 1: the optimizer's work is hidden behind the next iteration.
        prefetch: False waits for each copy and each computation before the next.
        link: on a CPU, how fast copies are.
        dtype: of weights and gradients outside the optimizer; that of the modules without it.
        chunk_bytes: the longest piece of a copy that others have to wait for.
        count_bytes: on a CPU, whether to count what the device holds, at some 20 microseconds an operation.
    Raises:
        LabError: no stage, another staleness, a stage with running statistics, a device that isn't there.
    """

    def __init__(self, stages: Sequence[nn.Module], head_loss: Callable[[Tensor, Tensor], Tensor], *,
                 optimizer: Callable[[list[nn.Parameter]], Any], device: str | torch.device | Machine = "cpu",
                 staleness: int = 0, prefetch: bool = True, link: Link | None = None, dtype: torch.dtype | None = None,
                 chunk_bytes: int = CHUNK_BYTES, count_bytes: bool = True):
        if not len(stages) or staleness not in (0, 1):
            raise LabError(f"{len(stages)} stages with staleness {staleness} cannot be trained.",
                           "Give one stage or more, and staleness 0 or 1.")
        named = isinstance(device, str | torch.device)
        self.machine = machine_of(device, link, chunk_bytes, count_bytes) if named else device
        self.staleness, self.prefetch = staleness, prefetch
        self.host = HostWeights(stages, head_loss, self.machine, optimizer, dtype)
        self.lanes = [self.machine.lane(number) for number in range(len(LANES))]
        self.activations: dict = {}  # host memory that iterations reuse
        count = range(len(stages))
        self.uploads: list[list] = [[] for _ in count]  # marks, by stage: this iteration's uploads
        self.p_copied: list[list] = [[] for _ in count]  # ... the last P-copy
        self.g_copied: list[list] = [[] for _ in count]  # ... the last G-copy
        self.updated: list = []  # mark of the last optimizer step
        self.ahead: Weights | None = None  # the first stage's weights for the next iteration
        self.iteration, self.first, self.broken = 0, 0, None

    def step(self, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        """One iteration; returns the mean loss of the micro-batches, all of the same weight.

        Raises:
            LabError: no micro-batch, or the optimizer's thread stopped with an error, now or in the step before.
        """
        self._refuse(micro_batches)
        try:
            ahead, self.ahead = self.ahead, None
            loss = Pass(self, list(micro_batches), ahead).run()
            self._update()
        except BaseException as error:
            self._stop(error)
            raise
        return loss

    def finish(self) -> None:
        """Wait for the optimizer and write the newest weights into the modules. A step after it misses no update."""
        self._refuse_broken()
        try:
            self.ahead = None
            for stage in range(len(self.host.stages)):
                self._p_copy(stage)
            for marks in [*self.p_copied, self.updated]:
                for mark in marks:
                    mark.result()
        except BaseException as error:
            self._stop(error)
            raise

    def close(self) -> None:
        """End the threads; the modules keep the weights of the last `finish`."""
        self.broken = self.broken or "it was closed."
        for lane in self.lanes:
            lane.close()

    def state_dict(self) -> dict[str, Tensor]:
        """The newest weights, named "stages.0. ..." and "head_loss. ...", in the optimizer's precision."""
        for mark in self.updated:
            mark.result()
        return self.host.state_dict()

    @property
    def report(self) -> OffloadReport:
        """What was measured since the beginning, or since `forget`; whole after `finish`."""
        events = [event for lane in self.lanes for event in lane.events()]
        return report_of(events, self.iteration - self.first, self.machine.peak_bytes())

    def forget(self) -> None:
        """Begin to measure anew: the first step sets up much that later ones reuse. Waits until all is done."""
        for lane in self.lanes:
            lane.drain()
            lane.forget()
        self.machine.forget_peak()
        self.first = self.iteration

    # ---- what a pass asks for

    def submit(self, lane: int, label: Label, work: Callable[[], None], after: Sequence[Any]) -> Any:
        """Queue work for the device; without prefetch wait for it."""
        mark = self.lanes[lane].submit(label, work, after)
        if not self.prefetch:
            mark.result()
        return mark

    def upload(self, visit: Visit) -> Weights:
        """Send a stage's weights up, behind the last P-copy; what comes down later waits for it."""
        host, weights = self.host.stages[visit.stage], Weights()

        def work() -> None:
            block = self.machine.device_empty(host.block.shape, host.block.dtype)
            self.machine.copy(block, host.block, UP)
            self.machine.lend(block, self.lanes[COMPUTE])
            weights.tensors = host.views(block)

        label = Label("reupload" if visit.kind == "B" else "upload", visit.stage, 0, self.iteration)
        weights.mark = self.submit(PARAMETERS, label, work, self.p_copied[visit.stage])
        self.uploads[visit.stage].append(weights.mark)
        if visit.kind != "F" and self.staleness:
            self._p_copy(visit.stage)
        return weights

    def collect(self, stage: int, downloaded: Any) -> None:
        """G-copy of a stage, behind the download of its gradients and the last step."""
        label, after = Label("G-copy", stage, 0, self.iteration), [downloaded, *self.updated]
        self.g_copied[stage] = [self.lanes[OPTIMIZER].submit(label, lambda: self.host.g_copy(stage), after)]

    # ---- the optimizer's thread

    def _p_copy(self, stage: int) -> None:
        """P-copy of a stage, behind this iteration's uploads of it and the last step."""
        label, after = Label("P-copy", stage, 0, self.iteration), [*self.uploads[stage], *self.updated]
        self.p_copied[stage] = [self.lanes[OPTIMIZER].submit(label, lambda: self.host.p_copy(stage), after)]
        self.uploads[stage] = []

    def _update(self) -> None:
        """The optimizer's step, and what is behind it at once: P-copies, or the next iteration's first weights."""
        after = [mark for marks in [*self.g_copied, *self.p_copied] for mark in marks]
        self.updated = [self.lanes[OPTIMIZER].submit(Label("step", iteration=self.iteration), self.host.step, after)]
        if not self.staleness:
            for stage in range(len(self.host.stages)):
                self._p_copy(stage)
        self.iteration += 1
        if self.staleness and self.prefetch:
            self.ahead = self.upload(visits_of(len(self.host.stages))[0])

    def _refuse(self, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Say what is wrong before anything begins."""
        self._refuse_broken()
        if not len(micro_batches) or any(tensor.device.type != "cpu" for pair in micro_batches for tensor in pair):
            raise LabError("A step needs one micro-batch or more, in host memory.",
                           "Give a list of pairs (x, target) of CPU tensors.")

    def _refuse_broken(self) -> None:
        if self.broken:
            raise LabError(f"This engine stopped at an error: {self.broken}", "Mend its cause and build a new engine.")

    def _stop(self, error: BaseException) -> None:
        """Wait for what is under way, so that nothing runs behind the caller's back."""
        self.broken = self.broken or error
        for lane in self.lanes:
            lane.drain()
