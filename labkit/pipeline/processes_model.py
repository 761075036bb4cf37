"""What the processes compute: a small decoder cut between its layers, and sleeps that stand for a GPU's time.

A unit is what a partition counts: L blocks and the head as the last, as in partition.py. The embedding belongs to the
first unit; the norm, the head and the loss are the last. Boundary u lies in front of unit u. Every process makes the
whole model from its seed, so weights need not travel; what travels are hidden states and their gradients.

    loss = 1/M sum over micro-batches m of the next-token loss of m

A sleep stands for a kernel on a GPU: an operation computes for real, then waits until its time is over. So four workers
can work at once on two cores. A time shorter than the real computation cannot be kept, and the measurement shows it.
Letters: B sequences in a micro-batch, T tokens, D width, M micro-batches.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from labkit.data import generator_for
from labkit.models import GPT, GPTConfig
from labkit.objectives import next_token_loss
from labkit.pipeline.exact_partition import cut_sizes, exact_partition, segments, table
from labkit.pipeline.partition import Layers, Partition, paper_cost, with_head


@dataclass(frozen=True)
class Blocks:
    """The decoder and its data; equal settings give equal numbers in every process."""

    layers: int = 8
    width: int = 32
    heads: int = 2
    vocabulary: int = 64
    tokens: int = 16
    batch: int = 2
    seed: int = 0

    @property
    def units(self) -> int:
        return self.layers + 1

    def model(self) -> GPT:
        config = GPTConfig(vocab_size=self.vocabulary, context=self.tokens, width=self.width, layers=self.layers,
                           heads=self.heads, tied=False)
        return GPT(config, seed=self.seed)

    def micro_batch(self, number: int) -> Tensor:
        """Token ids of one micro-batch, [B, T + 1]."""
        return torch.randint(self.vocabulary, (self.batch, self.tokens + 1),
                             generator=generator_for(self.seed, number))

    def gradients(self, micro_batches: int) -> dict[str, Tensor]:
        """The gradients in one process: what every schedule has to reproduce."""
        model = self.model()
        for number in range(micro_batches):
            tokens_BT1 = self.micro_batch(number)
            loss = next_token_loss(model(tokens_BT1[:, :-1]), tokens_BT1[:, 1:])
            (loss / micro_batches).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}


@dataclass(frozen=True)
class Sleep:
    """Times of one micro-batch in ms; backward times without recompute, which is added as a forward."""

    forward_ms: float = 3.0
    backward_ms: float = 6.0
    head_forward_ms: float = 3.0
    head_backward_ms: float = 6.0

    def costs(self, layers: int) -> Layers:
        return with_head(layers, self.forward_ms, self.backward_ms, self.head_forward_ms, self.head_backward_ms)


def body(model: GPT, x: Tensor, start: int, end: int) -> Tensor:
    """Units start ... end - 1 without the head; x: token ids where start is 0, else hidden states."""
    return through(model, model.embed(x) if start == 0 and end else x, start, end)


def through(model: GPT, x_BTD: Tensor, start: int, end: int) -> Tensor:
    """Blocks start ... end - 1."""
    rope = model.cos_TK[: x_BTD.shape[1]], model.sin_TK[: x_BTD.shape[1]]
    for block in model.blocks[start:end]:
        x_BTD = block(x_BTD, rope, model.attention, None, None)
    return x_BTD


def head_loss(model: GPT, hidden_BTD: Tensor, tokens_BT1: Tensor, micro_batches: int) -> Tensor:
    """The last unit: this micro-batch's part of the loss."""
    return next_token_loss(model.head(model.norm(hidden_BTD)), tokens_BT1[:, 1:]) / micro_batches


def unit_parameters(model: GPT, start: int, end: int) -> list[Tensor]:
    """The weights of units start ... end - 1."""
    parts = list(model.blocks[start:end])
    parts += [model.embedding] if start == 0 and end else []
    parts += [model.norm, model.unembedding] if start < end == len(model.blocks) + 1 else []
    return [parameter for part in parts for parameter in part.parameters()]


def balanced_sizes(layers: Layers, stages: int) -> tuple[int, ...]:
    """Bound stages whose longest is shortest, by the table of exact_partition.py."""
    work = [f + b for f, b in zip(layers.forward_ms, layers.backward_ms, strict=True)]
    cut = table(segments(work, None, None), stages, np.maximum)[1]
    return cut_sizes(cut, stages, len(work))


def best_partition(layers: Layers, workers: int, micro_batches: int) -> Partition:
    """RoundPipe's stages of least cost by the paper's formula."""
    return exact_partition(layers, paper_cost(workers, micro_batches))
