"""Attention written out, so that its logits can be seen, capped and differentiated twice.

    logit_tu = q_t . k_u / sqrt(K)       capped: c tanh(logit / c)       out_t = sum_{u <= t} softmax_u(logit_tu) v_u

Fused kernels hide the logits and have no second derivative; Hessian-vector products need one. The largest logit is
what growing queries and keys show first: softmax then has one winner, and its gradient jumps (Wortsman et al., arXiv
2309.14322). Two cures act on it: soft-capping (Gemma 2, 2408.00118) and QK-clip (Kimi K2, 2507.20534), which after an
update shrinks the query and key matrices of each head whose largest logit S passed a limit c, both by sqrt(c / S).
Letters: B batch, H query heads, J key heads, T queries, U keys, K head size, L layers, M models in a stack.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.models.gpt import GPTConfig


class ExplicitAttention:
    """Takes the place of `sdpa_attention`. `peaks` collects the largest logit of each head that softmax sees, one [H] a
    call (so one a layer and forward pass); empty it before a pass."""

    def __init__(self, cap: float | None = None):
        if cap is not None and not cap > 0:
            raise LabError(f"Logits cannot be capped at {cap}.", "Use a cap above 0, or None.")
        self.cap, self.peaks = cap, []

    def __call__(self, q_BHTK: Tensor, k_BJUK: Tensor, v_BJUK: Tensor, mask_BTU: Tensor | None = None) -> Tensor:
        T, U, share = q_BHTK.shape[-2], k_BJUK.shape[-2], q_BHTK.shape[1] // k_BJUK.shape[1]
        k_BHUK, v_BHUK = (x.repeat_interleave(share, 1) if share > 1 else x for x in (k_BJUK, v_BJUK))
        logit_BHTU = q_BHTK @ k_BHUK.transpose(-1, -2) * q_BHTK.shape[-1] ** -0.5
        if self.cap is not None:
            logit_BHTU = self.cap * torch.tanh(logit_BHTU / self.cap)
        if mask_BTU is None:
            mask_BTU = torch.ones(1, T, U, dtype=torch.bool, device=q_BHTK.device).tril(U - T)
        logit_BHTU = logit_BHTU.masked_fill(~mask_BTU[:, None], -torch.inf)
        if logit_BHTU.numel():
            self.peaks.append(logit_BHTU.detach().amax((0, 2, 3)))
        return logit_BHTU.softmax(-1) @ v_BHUK


@torch.no_grad()
def clip_queries_and_keys(weights: Mapping[str, Tensor], layers: Sequence[int], peak_LH: Tensor, limit: float,
                          config: GPTConfig) -> None:
    """QK-clip, in place: rows of W_q and W_k of head h in layer l times sqrt(min(1, limit / peak)).

    weights: named parameters of a GPT; a stack of models has an M in front, of weights and of peaks alike.
    layers: the layers that `peak_LH` [..., L, H] speaks of, in its order. A peak that is not above `limit`, or is not
    a number, changes nothing.
    """
    if config.kv_heads != config.heads or config.qk_norm:
        raise LabError("QK-clip needs a key head of its own for every query head, and no QK-norm.",
                       "Use kv_heads = heads and qk_norm=False.")
    factor_LH = torch.where(peak_LH > limit, limit / peak_LH, 1.0).sqrt()
    for place, layer in enumerate(layers):
        qkv = weights[f"blocks.{layer}.attention.qkv.weight"]
        rows = factor_LH[..., place, :].repeat_interleave(config.head_size, -1)
        qkv[..., : 2 * rows.shape[-1], :] *= torch.cat((rows, rows), -1)[..., None].to(qkv.dtype)
