"""Attention as the decoder calls it: queries, keys and values in, one vector for each head and position out.

    out_t = sum_{u <= t} softmax_u(q_t . k_u / sqrt(K)) v_u

Any function with the signature of `sdpa_attention` can take its place (`GPT(config, attention=...)`), also in
the middle of a training run: attention holds no weights.
Letters: B batch, H query heads, J key heads (J divides H), T queries, U keys, K head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sdpa_attention(q_BHTK: Tensor, k_BJUK: Tensor, v_BJUK: Tensor, mask_BTU: Tensor | None = None) -> Tensor:
    """Causal attention by PyTorch's fused kernel; with `mask_BTU` (True: may look) that mask replaces the causal one.

    When U > T the queries are the last T of the U positions, as in decoding with a cache.
    """
    T, U = q_BHTK.shape[-2], k_BJUK.shape[-2]
    if mask_BTU is None and 1 < T < U:
        mask_BTU = torch.ones(T, U, dtype=torch.bool, device=q_BHTK.device).tril(U - T)[None]
    mask = None if mask_BTU is None else mask_BTU[:, None]
    causal = mask is None and T > 1  # one query at the end sees every key: no mask at all
    grouped = q_BHTK.shape[1] != k_BJUK.shape[1]
    return F.scaled_dot_product_attention(q_BHTK, k_BJUK, v_BJUK, mask, is_causal=causal, enable_gqa=grouped)


def document_mask(document_BT: Tensor) -> Tensor:
    """Causal mask that keeps packed documents apart: position t sees u <= t of its own document. [B, T, T], bool."""
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return same_BTT.tril()
