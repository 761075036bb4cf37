"""One iteration of the offload engine: every stage forward, every stage backward, each over all micro-batches.

    visits   F_1 ... F_(S-1)   FB_S   B_(S-1) ... B_1          weights go up once a visit, gradients down once a stage
    F        x_(s+1) = f_s(x_s), no graph; x_(s+1) goes down to the host
    FB       loss, and its gradient by the stage's weights and by x_S: the stage's forward is its recompute
    B        x_s goes up again, f_s is computed again from the same random state, then its gradient

With prefetch the weights of the next visit go up while this one computes, and so do the inputs of the next micro-batch.
A job (visit, micro-batch) begins on the host only when the job two before it is over, so that little more than two
stages' weights and two micro-batches' activations are ever on the device. With one or two micro-batches an output is
needed again so soon that it stays there, as well as going down.
Source: arXiv 2604.27085, sections on the transfer engine; roundpipe 0.1.1.
"""

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from labkit.pipeline.offload_lanes import ACTIVATIONS, COMPUTE, GRADIENTS, Label
from labkit.pipeline.offload_machines import DOWN, UP, replayed

Key = tuple[str, int, int]  # ("x" | "dx" | "target", stage, micro-batch): input of a stage, its gradient, a label
STAYS = 2  # micro-batches up to which outputs stay on the device


class Visit(NamedTuple):
    """A stage's weights on the device, once."""

    kind: str  # "F", "FB" or "B"
    stage: int


def visits_of(stages: int) -> list[Visit]:
    """All visits of an iteration, in order."""
    last = stages - 1
    return [*(Visit("F", stage) for stage in range(last)), Visit("FB", last),
            *(Visit("B", stage) for stage in reversed(range(last)))]


class Weights:
    """A stage's weights on their way to the device; compute work reads `tensors` once `mark` is done."""

    mark: Any = None
    tensors: dict[str, Tensor]


class Pass:
    """One iteration; `run` it once. The engine owns lanes, machine and host weights."""

    def __init__(self, engine: Any, micro_batches: list[tuple[Tensor, Tensor]], weights: Weights | None):
        self.engine, self.machine, self.lanes, self.count = engine, engine.machine, engine.lanes, len(micro_batches)
        self.visits = visits_of(len(engine.host.stages))
        self.host: dict[Key, Tensor] = engine.activations
        for m, (x, target) in enumerate(micro_batches):
            for key, tensor in ((("x", 0, m), x), (("target", 0, m), target)):
                    self.host_tensor(key, tensor).copy_(tensor)
        self.device: dict[Key, Tensor] = {}  # inputs of jobs
        self.leaving: dict[Key, Tensor] = {}  # outputs on their way down
        self.arrived: dict[Key, Any] = {}  # marks of their downloads
        self.random: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self.gradient: dict[str, Tensor] = {}  # by weight, of the stage in its backward visit
        self.finished: dict[int, dict[str, Tensor]] = {}  # the same by stage, on their way down
        self.losses: list[Tensor] = []
        self.weights = {0: weights} if weights else {}  # by visit
        self.visited: dict[int, Any] = {}  # marks of the last computation, by visit
        self.gone: dict[int, Any] = {}  # marks of the gradients' downloads, by visit

    def run(self) -> float:
        """Submit all work in order; returns the mean loss of the micro-batches."""
        jobs = [(number, m) for number in range(len(self.visits)) for m in range(self.count)]
        over, inputs = deque([[], []]), None  # `over`: marks of the last two jobs
        for k, (number, m) in enumerate(jobs):
            for mark in over.popleft():
                mark.result()
            if m == 0:
                self.begin_visit(number)
            inputs = self.bring(number, m) if inputs is None else inputs
            mark = self.compute(number, m, [self.weights[number].mark, *inputs])
            if self.engine.prefetch and m == 0 and number + 1 < len(self.visits):
                self.fetch(number + 1)
            inputs = self.bring(*jobs[k + 1]) if self.engine.prefetch and k + 1 < len(jobs) else None
            over.append([mark, *self.take_away(number, m, mark)])
            if m == self.count - 1:
                self.end_visit(number, mark)
        for mark in self.visited.values():
            mark.result()
        return float(torch.stack(self.losses).mean())

    def begin_visit(self, number: int) -> None:
        """Have the weights on their way, and no more than two stages' gradients on the device."""
        if number not in self.weights:
            self.fetch(number)
        if number - 2 in self.gone:
            self.gone[number - 2].result()

    def fetch(self, number: int) -> None:
        """Weights of a visit, into the memory that the visit two before it has left."""
        if number - 2 in self.visited:
            self.visited[number - 2].result()
        self.weights[number] = self.engine.upload(self.visits[number])

    def end_visit(self, number: int, mark: Any) -> None:
        """Behind the last job of a visit."""
        kind, stage = self.visits[number]
        self.visited[number] = mark
        if kind != "F":
            self.gone[number] = self.take_gradient(stage, mark)
            self.engine.collect(stage, self.gone[number])

    # ---- what a job reads and makes

    def inputs(self, number: int, m: int) -> list[Key]:
        """Keys of what the job reads."""
        kind, stage = self.visits[number]
        behind = {"F": [], "FB": [("target", 0, m)], "B": [("dx", stage + 1, m)]}[kind]
        return [("x", stage, m), *behind]

    def output(self, number: int, m: int) -> Key | None:
        """The key of what it makes, but for a loss and gradients of weights."""
        kind, stage = self.visits[number]
        if kind == "F":
            return "x", stage + 1, m
        return ("dx", stage, m) if stage else None

    def stays(self, key: Key, number: int) -> bool:
        """Whether the visit before has left this on the device."""
        return self.count <= STAYS and number > 0 and key == self.output(number - 1, key[2])

    def bring(self, number: int, m: int) -> list[Any]:
        """Send the job's inputs up; returns the marks to wait for."""
        keys = [key for key in self.inputs(number, m) if not self.stays(key, number)]

        def work() -> None:
            for key in keys:
                tensor = self.machine.device_empty(self.host[key].shape, self.host[key].dtype)
                self.machine.copy(tensor, self.host[key], UP)
                self.machine.lend(tensor, self.lanes[COMPUTE])
                self.device[key] = tensor

        if not keys:
            return []
        label = Label("activation up", self.visits[number].stage, m, self.engine.iteration)
        after = [self.arrived[key] for key in keys if key in self.arrived]
        return [self.engine.submit(ACTIVATIONS, label, work, after)]

    def compute(self, number: int, m: int, after: list[Any]) -> Any:
        """The job itself. Its last one in a visit lets go of the weights."""
        visit, weights, key = self.visits[number], self.weights[number], self.output(number, m)
        run = {"F": self.forward, "FB": self.fused, "B": self.backward}[visit.kind]

        def work() -> None:
            with self.machine.computing():
                made = run(visit.stage, m, weights.tensors, *map(self.device.pop, self.inputs(number, m)))
                if key and self.count <= STAYS:
                    self.device[key] = made
                if key and self.goes(key):
                    self.leaving[key] = made
                if m == self.count - 1:
                    del weights.tensors
                    self.finished[visit.stage], self.gradient = self.gradient, {}

        return self.engine.submit(COMPUTE, Label(visit.kind, visit.stage, m, self.engine.iteration), work, after)

    def goes(self, key: Key) -> bool:
        """Whether an output goes down: an input of a stage must, for the recompute; a gradient unless it stays."""
        return key[0] == "x" or self.count > STAYS

    def take_away(self, number: int, m: int, mark: Any) -> list[Any]:
        """Send the job's output down."""
        key, label = self.output(number, m), Label("activation down", self.visits[number].stage, m,
                                                   self.engine.iteration)
        if key is None or not self.goes(key):
            return []

        def work() -> None:
            tensor = self.leaving.pop(key)
            self.machine.lend(tensor, self.lanes[ACTIVATIONS])
            self.machine.copy(self.host_tensor(key, tensor), tensor, DOWN)

        self.arrived[key] = self.engine.submit(ACTIVATIONS, label, work, [mark])
        return [self.arrived[key]]

    def host_tensor(self, key: Key, like: Tensor) -> Tensor:
        """The place for an activation in host memory, that of the last iteration where it fits."""
        held = self.host.get(key)
        if held is None or held.shape != like.shape or held.dtype != like.dtype:
            held = self.host[key] = self.machine.host_empty(like.shape, like.dtype)
        return held

    def take_gradient(self, stage: int, mark: Any) -> Any:
        """Send the gradients of a stage's weights down into their slots."""
        host = self.engine.host.stages[stage]

        def work() -> None:
            for name, gradient in self.finished.pop(stage).items():
                self.machine.lend(gradient, self.lanes[GRADIENTS])
                self.machine.copy(host.slots[name], gradient, DOWN)
                host.arrived.add(name)

        label = Label("download", stage, 0, self.engine.iteration)
        return self.engine.submit(GRADIENTS, label, work, [mark, *self.engine.g_copied[stage]])

    # ---- the three kinds of computation

    def forward(self, stage: int, m: int, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        """Without a graph; keeps the random state for the recompute."""
        self.random[stage, m] = self.machine.random_state()
        with torch.no_grad():
            return self.engine.host.stages[stage].call(weights, x)

    def fused(self, stage: int, m: int, weights: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor | None:
        """Forward, loss and backward of the last stage."""
        with torch.enable_grad():
            leaves, x = self.leaves(stage, weights, x)
            loss = self.engine.host.stages[stage].call({**weights, **leaves}, x, target)
            self.losses.append(loss.detach())
            return self.differentiate(loss / self.count, leaves, x, None)

    def backward(self, stage: int, m: int, weights: dict[str, Tensor], x: Tensor, dy: Tensor) -> Tensor | None:
        """Recompute with the random numbers of the forward, then backward."""
        with torch.enable_grad(), replayed(self.machine, self.random.pop((stage, m))):
            leaves, x = self.leaves(stage, weights, x)
            y = self.engine.host.stages[stage].call({**weights, **leaves}, x)
            return self.differentiate(y, leaves, x, dy)

    def leaves(self, stage: int, weights: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Trainable weights, and the input of any stage but the first, as leaves of a graph."""
        trainable = self.engine.host.stages[stage].trainable
        leaves = {name: weights[name].detach().requires_grad_() for name in trainable}
        return leaves, x.detach().requires_grad_() if stage else x

    def differentiate(self, y: Tensor, leaves: dict[str, Tensor], x: Tensor, dy: Tensor | None) -> Tensor | None:
        """Add to the stage's gradient; returns that by x, where x asks for it."""
        wanted = [*leaves.values(), *([x] if x.requires_grad else [])]
        if not wanted or not y.requires_grad:
            return torch.zeros_like(x) if x.requires_grad else None
        found = torch.autograd.grad(y, wanted, dy, allow_unused=True)
        for name, gradient in zip(leaves, found, strict=False):
            if gradient is not None:  # not in place: autograd may have returned one tensor twice
                self.gradient[name] = self.gradient[name] + gradient if name in self.gradient else gradient
        if not x.requires_grad:
            return None
        return torch.zeros_like(x) if found[-1] is None else found[-1]
