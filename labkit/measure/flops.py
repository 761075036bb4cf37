"""Floating-point operations of a decoder, by formula, so that two runs can be matched exactly.

    forward, one position:  2 * P  +  4 * L * H * K * T       P: weights of all matrix products, the head included
    training:               3 x forward (the backward pass does each product twice)

The attention term counts all T keys, as is usual; a causal kernel does about half of it. Embedding look-ups,
norms and the softmax are not counted. A test holds the formula to PyTorch's own FLOP counter.
"""

from labkit.models import GPTConfig


def matrix_weights(config: GPTConfig) -> int:
    """Weights that take part in a matrix product at every position: all but the embedding look-up and the norms."""
    D, H, J, K = config.width, config.heads, config.kv_heads, config.head_size
    layer = D * (H + 2 * J) * K + H * K * D + 3 * D * config.ffn
    return config.layers * layer + D * config.vocab_size


def forward_flops(config: GPTConfig, positions: int, context: int) -> int:
    """FLOPs of a forward pass over `positions` positions in sequences of `context`."""
    attention = 4 * config.layers * config.heads * config.head_size * context
    return positions * (2 * matrix_weights(config) + attention)


def training_flops(config: GPTConfig, positions: int, context: int) -> int:
    """FLOPs of training on `positions` positions: forward and backward. A bag of tokens is one position."""
    return 3 * forward_flops(config, positions, context)
