"""What an offload engine keeps in host memory: the master weights, the gradients' slots, the optimizer's own copy.

    transient (device)   <-- upload --   master (host, pinned)   <-- P-copy --   optimizer copy (fp32)
    gradient  (device)   -- download --> slot   (host, pinned)   -- G-copy -->   its gradient (fp32)

The master weights of a stage are one block of bytes, so that they travel in one copy. A weight that two stages share
has a place in the block and a slot in each of them; the G-copies add up its gradients, the P-copies write both places.
Source: arXiv 2604.27085; roundpipe 0.1.1, attribute.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from labkit.errors import LabError
from labkit.pipeline.offload_machines import Machine

ALIGNMENT = 256  # bytes; kernels read aligned tensors faster, and some read no others


class HeadStage(nn.Module):
    """The last stage with the loss behind it: RoundPipe's fused stage."""

    def __init__(self, stage: nn.Module, head_loss: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.stage, self.head_loss = stage, head_loss

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.head_loss(self.stage(x), target)


class HostStage:
    """One stage: its module, its master block, its gradients' slots."""

    def __init__(self, module: nn.Module, machine: Machine, dtype: torch.dtype | None = None):
        self.module = module
        if any(getattr(each, "track_running_stats", False) for each in module.modules()):
            raise LabError("A stage keeps running statistics, which the recompute would update a second time.",
                           "Use a norm without them: LayerNorm, RMSNorm or GroupNorm.")
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.places: dict[str, tuple[int, int, torch.Size, torch.dtype]] = {}
        end = 0
        for name, tensor in tensors.items():
            to = dtype if dtype and tensor.is_floating_point() else tensor.dtype
            start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + tensor.numel() * to.itemsize
            self.places[name] = start, end, tensor.shape, to
        self.block = machine.host_empty((end,), torch.uint8)
        self.master = self.views(self.block)
        for name, tensor in tensors.items():
            self.master[name].copy_(tensor.detach())
        self.trainable = {name: each for name, each in module.named_parameters() if each.requires_grad}
        self.slots = {name: machine.host_empty(each.shape, self.places[name][3])
                      for name, each in self.trainable.items()}
        self.arrived: set[str] = set()  # slots that this iteration's download has filled

    def views(self, block: Tensor) -> dict[str, Tensor]:
        """The tensors that lie in a block, by name."""
        return {name: block[start:end].view(dtype).view(shape)
                for name, (start, end, shape, dtype) in self.places.items()}

    def call(self, weights: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        """The stage's output with the weights of a block."""
        return functional_call(self.module, weights, inputs)


class HostWeights:
    """All stages, and the optimizer over an fp32 copy of what they train.

    make_optimizer: list of parameters -> anything with a method `step()`.
    """

    def __init__(self, stages: Sequence[nn.Module], head_loss: Callable, machine: Machine,
                 make_optimizer: Callable[[list[nn.Parameter]], Any], dtype: torch.dtype | None):
        named = nn.Module()
        named.stages, named.head_loss = nn.ModuleList(stages), head_loss
        self.named = named
        modules = [*stages[:-1], HeadStage(stages[-1], head_loss)]
        self.stages = [HostStage(module, machine, dtype) for module in modules]
        self.copies = {parameter: nn.Parameter(fp32_copy(parameter))
                       for parameter in named.parameters() if parameter.requires_grad}
        if not self.copies:
            raise LabError("No stage has a weight to train.", "Leave requires_grad on for one at least.")
        self.gradients = {parameter: torch.empty_like(copy.data) for parameter, copy in self.copies.items()}
        for stage in self.stages:  # the modules themselves now hold the master weights: there is no further copy
            for name, tensor in [*stage.module.named_parameters(), *stage.module.named_buffers()]:
                tensor.data = stage.master[name]
        self.optimizer = make_optimizer(list(self.copies.values()))

    @torch.no_grad()
    def p_copy(self, stage: int) -> None:
        """Optimizer copy -> master."""
        host = self.stages[stage]
        for name, parameter in host.trainable.items():
            host.master[name].copy_(self.copies[parameter])

    @torch.no_grad()
    def g_copy(self, stage: int) -> None:
        """Slots -> gradients of the optimizer copy; a weight without a gradient keeps None, as in autograd."""
        host = self.stages[stage]
        for name, parameter in host.trainable.items():
            if name in host.arrived:
                copy = self.copies[parameter]
                if copy.grad is None:
                    copy.grad = self.gradients[parameter].copy_(host.slots[name])
                else:
                    copy.grad += host.slots[name]
        host.arrived = set()

    def step(self) -> None:
        """The optimizer's step over all stages."""
        self.optimizer.step()
        for copy in self.copies.values():
            copy.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """The newest weights by their names under `stages` and `head_loss`."""
        named = {**dict(self.named.named_parameters(remove_duplicate=False)), **dict(self.named.named_buffers())}
        return {name: self.copies.get(named.get(name), tensor).detach().clone()
                for name, tensor in self.named.state_dict().items()}


def fp32_copy(parameter: Tensor) -> Tensor:
    """A copy in fp32; in fp64 where the weights are."""
    return parameter.detach().to("cpu", torch.promote_types(parameter.dtype, torch.float32), copy=True)
