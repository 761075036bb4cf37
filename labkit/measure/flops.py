"""Floating-point operations of a decoder, by formula, so that two runs can be matched exactly.

    forward, one position:  2 * P  +  4 * L * H * K * T       P: weights of all matrix products, the head included
    training:               3 x forward (the backward pass does each product twice)

The attention term counts all T keys, as is usual; a causal kernel does about half of it. Embedding look-ups,
norms and the softmax are not counted. A test holds the formulas to PyTorch's own FLOP counter. A byte-latent model is
the sum of its parts (`byte_latent_flops`), each spread over the bytes of a patch.
"""

from typing import NamedTuple

from labkit.models import GPTConfig
from labkit.models.byte_latent import ByteLatentConfig


def matrix_weights(config: GPTConfig) -> int:
    """Weights that take part in a matrix product at every position: all but the embedding look-up and the norms."""
    D, H, J, K = config.width, config.heads, config.kv_heads, config.head_size
    layer = D * (H + 2 * J) * K + H * K * D + 3 * D * config.ffn
    return config.layers * layer + D * config.vocab_size


def block_flops(config: GPTConfig, context: int) -> int:
    """FLOPs of the blocks alone, forward, at one position that is one of `context`."""
    head = config.width * config.vocab_size
    return forward_flops(config, 1, context) - 2 * head


def forward_flops(config: GPTConfig, positions: int, context: int) -> int:
    """FLOPs of a forward pass over `positions` positions in sequences of `context`."""
    attention = 4 * config.layers * config.heads * config.head_size * context
    return positions * (2 * matrix_weights(config) + attention)


def training_flops(config: GPTConfig, positions: int, context: int) -> int:
    """FLOPs of training on `positions` positions: forward and backward. A bag of tokens is one position."""
    return 3 * forward_flops(config, positions, context)


class ByteFlops(NamedTuple):
    """FLOPs of a byte-latent model, forward: one sequence's, by module. Training takes three times as many."""

    latent: int  # the global module
    bridge: int  # from bytes to the latent and back
    local: int  # blocks over bytes, and the head
    bytes: int

    @property
    def training_per_byte(self) -> float:
        """Forward and backward FLOPs a byte of text."""
        return 3 * (self.latent + self.bridge + self.local) / self.bytes

    @property
    def latent_share(self) -> float:
        """The global module's share of all FLOPs."""
        return self.latent / (self.latent + self.bridge + self.local)


def byte_latent_flops(config: ByteLatentConfig) -> ByteFlops:
    """FLOPs of one sequence of `context` bytes; the last patch is written but never read."""
    S, T, K, D = config.context, config.patch, config.local_width, config.width
    patches = S // T
    bridge = 2 * T * K * D * (patches - 1) + 2 * D * T * K * patches
    local = S * (block_flops(config.local_module, T) + 2 * K * config.vocab_size)
    return ByteFlops(patches * block_flops(config.global_module, patches), bridge, local, S)
