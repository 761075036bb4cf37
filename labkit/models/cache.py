"""The key-value cache: what attention has computed for a prefix, kept so that it is computed once.

Memory: 2 * L * B * J * U * K elements (keys and values, L layers, J key heads, U positions, head size K).
It is allocated once at its full length; decoding then writes one column a step and copies nothing. It is for
inference: call the model under `torch.no_grad()`.
"""

import copy

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer for the first `length` positions of a batch."""

    def __init__(self, config, batch: int, capacity: int, *, device=None, dtype=torch.float32):
        shape = (config.layers, 2, batch, config.kv_heads, capacity, config.head_size)
        self.store_L2BJUK = torch.empty(shape, device=device, dtype=dtype)
        self.capacity, self.length = capacity, 0

    def repeated(self, times: int) -> "KVCache":
        """A cache with every row `times` times in a row: one prompt, computed once, for many answers."""
        other = copy.copy(self)
        L, two, B, J, U, K = self.store_L2BJUK.shape
        other.store_L2BJUK = self.store_L2BJUK.new_empty(L, two, B * times, J, U, K)
        other.store_L2BJUK[..., : self.length, :] = self.store_L2BJUK[..., : self.length, :].repeat_interleave(times, 2)
        return other

    def extend(self, layer: int, k_BJTK: Tensor, v_BJTK: Tensor) -> tuple[Tensor, Tensor]:
        """Write T new positions of one layer behind the prefix; return that layer's whole keys and values."""
        end = self.length + k_BJTK.shape[2]
        keys, values = self.store_L2BJUK[layer, 0], self.store_L2BJUK[layer, 1]
        keys[:, :, self.length : end] = k_BJTK
        values[:, :, self.length : end] = v_BJTK
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, steps: int) -> None:
        """Count the new positions; the model calls it once, after its last layer."""
        self.length += steps
