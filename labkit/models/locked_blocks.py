"""Architecture warm-up: a network that is shallow while the learning rate climbs, and unlocks its later blocks then.

A locked block is the identity: it is skipped, and its weights are in no optimizer. The reader's notes of the paper say
that *all* matrices of a locked block are zero and only the gains of its norms are kept. Then, by the chain rule, every
gradient of the block is a product with a zero in it,

    d/dW_out ~ heads(V) = 0     d/dW_v ~ W_out = 0     d/dW_down ~ gate * up = 0     d/dW_up ~ W_down = 0     ...

and the block never wakes: a saddle from which no gradient leads away. The sources do not say how the published runs
leave it. READINGS names what may be meant; "dead" is the text taken literally.
Source: Taming Curvature (arXiv 2606.16768), by readers' notes. ProRes (2603.05369): gains on all branches, none locked.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.errors import LabError
from labkit.models.gpt import GPT, GPTConfig

PARTS = ("q", "k", "v", "out", "gate", "up", "down")
READINGS = {  # reading -> the matrices that are zero when the block unlocks
    "dead": PARTS,  # the text taken literally: never wakes
    "noise": PARTS,  # (a) but with noise of size sigma on all of them
    "projections": ("out", "down"),  # (b) the naive variant, which the authors criticise
    "inputs": ("v", "up"),  # (c) zero where a branch reads, random where it writes
    "ramp": (),  # (d) ordinary weights behind a gain that rises from 0 to 1
    "late": (),  # a control: ordinary weights at once, so the function jumps
}


def block_parts(tensors: Mapping[str, Tensor], layer: int, config: GPTConfig) -> dict[str, Tensor]:
    """The seven matrices of a block by name, as views: of weights, or of their gradients under the same names.

    A stack of models has an M in front of each.
    """
    H, J, K = config.heads, config.kv_heads, config.head_size
    names = ("attention.qkv", "attention.out", "ffn.gate_up", "ffn.down")
    qkv, out, gate_up, down = (tensors[f"blocks.{layer}.{name}.weight"] for name in names)
    q, k, v = qkv.split((H * K, J * K, J * K), dim=-2)
    gate, up = gate_up.chunk(2, dim=-2)
    return dict(zip(PARTS, (q, k, v, out, gate, up, down), strict=True))


@dataclass(frozen=True)
class BlockLock:
    """Which blocks start locked, when they unlock, and how. The last `share` of the layers, from the bottom up."""

    reading: str
    start: int | None  # the step before which the first group unlocks; None: never (half depth for ever)
    interval: int = 1  # steps from group to group
    groups: int = 4
    share: float = 0.5
    sigma: float = 1e-4  # of reading "noise"
    ramp: int = 1  # steps of reading "ramp"

    def __post_init__(self):
        if self.reading not in READINGS:
            raise LabError(f"There is no reading {self.reading!r}.", f"Choose one of {', '.join(READINGS)}.")
        if not 0 <= self.share < 1 or self.groups < 1 or self.interval < 0 or self.ramp < 1:
            raise LabError(f"share={self.share}, groups={self.groups}, interval={self.interval} and ramp={self.ramp} "
                           "are no schedule.", "Use 0 <= share < 1, groups and ramp of 1 or more, interval >= 0.")

    def unlock_steps(self, layers: int) -> dict[int, float]:
        """Step of unlocking by locked layer; the groups are as equal as they can be."""
        locked = range(layers - round(self.share * layers), layers)
        groups, start = min(self.groups, len(locked)), math.inf if self.start is None else self.start
        return {layer: start + self.interval * (place * groups // len(locked)) for place, layer in enumerate(locked)}

    def active(self, layers: int, step: int) -> list[int]:
        """Layers that are computed and trained at this step."""
        unlock = self.unlock_steps(layers)
        return [layer for layer in range(layers) if unlock.get(layer, -1) <= step]

    def due(self, layers: int, step: int) -> list[int]:
        """Layers that unlock just before this step."""
        return [layer for layer, when in self.unlock_steps(layers).items() if when == step]

    def gains(self, layers: int, step: int) -> list[float]:
        """The gain of each layer's branches: 1, but rising to it over `ramp` steps under that reading."""
        if self.reading != "ramp":
            return [1.0] * layers
        unlock = self.unlock_steps(layers)
        return [min(1.0, max(0.0, (step + 1 - unlock.get(layer, -math.inf)) / self.ramp)) for layer in range(layers)]


@torch.no_grad()
def prepare_block(weights: Mapping[str, Tensor], layer: int, lock: BlockLock, config: GPTConfig,
                  noise: torch.Generator | Sequence[torch.Generator] | None = None) -> None:
    """Give a block the weights with which it unlocks, in place; gains of norms stay as they are.

    noise: of reading "noise"; for a stack of models one generator a model.
    """
    parts = block_parts(weights, layer, config)
    for name in READINGS[lock.reading]:
        parts[name].zero_()
    if lock.reading == "noise":
        stacked = parts["q"].ndim == 3
        for part in parts.values():
            for matrix, generator in zip(part if stacked else [part], noise if stacked else [noise], strict=True):
                drawn = torch.randn(matrix.shape, generator=generator)  # on the CPU: the same on every device
                matrix.copy_(lock.sigma * drawn)


def set_locked(model: GPT, active: Sequence[int]) -> None:
    """Lock all blocks of `model` but these."""
    for layer, block in enumerate(model.blocks):
        block.locked = layer not in active


class Gain(nn.Module):
    """A gate that multiplies a branch by a number; the number is a buffer, so a compiled graph stays valid."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.ones(()), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD * self.gain


def gain_gate(config: GPTConfig, layer: int) -> Gain:
    """`GPT(config, gate=gain_gate)`: a decoder whose branches have gains."""
    return Gain()


def set_gains(model: GPT, gain_L: Sequence[float]) -> None:
    """Both branches of layer l times gain_L[l]."""
    for block, gain in zip(model.blocks, gain_L, strict=True):
        block.attention_gate.gain.fill_(gain)
        block.ffn_gate.gain.fill_(gain)


def prores_gains(layers: int, step: int, warmup: int) -> list[float]:
    """ProRes, linear: gain of layer l (from 1) is clip(step / tau_l, 0, 1), tau_l = warmup * l / layers."""
    return [min(1.0, step * layers / (warmup * layer)) for layer in range(1, layers + 1)]
