"""A decoder-only transformer in the form most open models share, short enough to read in one sitting.

    x_0     = E[token]
    x      <- x + gate(Attention(RMSNorm(x)))     RoPE on queries and keys, grouped queries, optional QK-norm
    x      <- x + gate(SwiGLU(RMSNorm(x)))        SwiGLU(x) = W_down (silu(W_gate x) * W_up x)
    logits  = W_head RMSNorm(x_L)

Two parts can be replaced without touching the rest: `attention`, a function (labkit.models.attention), and
`gate`, a small module on each residual branch (the identity here; notebook 05 starts it at zero).
With equal weights the logits equal those of Hugging Face's Llama (labkit.models.llama).
Sources: Llama 2 (arXiv 2307.09288), RoPE (2104.09864), RMSNorm (1910.07467), SwiGLU (2002.05202),
grouped queries (2305.13245), QK-norm (2010.04245).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.errors import LabError
from labkit.kernels.qk_norm import qk_norm
from labkit.kernels.rms_norm import rms_norm
from labkit.models.attention import sdpa_attention
from labkit.models.cache import KVCache


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a decoder. `None` means: as many key heads as query heads, width / heads, and 8/3 of the width."""

    vocab_size: int  # V
    context: int  # the longest T
    width: int  # D
    layers: int  # L
    heads: int  # H
    kv_heads: int | None = None  # J
    head_size: int | None = None  # K
    ffn: int | None = None
    tied: bool = True
    qk_norm: bool = False
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        if min(self.vocab_size, self.context, self.width, self.layers, self.heads) < 1 or self.kv_heads == 0:
            raise LabError(f"A decoder with vocab_size={self.vocab_size}, context={self.context}, width={self.width}, "
                           f"layers={self.layers}, heads={self.heads}, kv_heads={self.kv_heads} cannot be built.",
                           "Use whole numbers of 1 or more.")
        fill = {
            "kv_heads": self.heads,
            "head_size": self.width // self.heads,
            "ffn": round(self.width * 8 / 3 / 16) * 16,  # multiples of 16 keep the matrix products on fast paths
        }
        for name, default in fill.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.heads % self.kv_heads:
            raise LabError(f"{self.heads} query heads cannot share {self.kv_heads} key heads.",
                           "Choose kv_heads that divides heads.")
        if self.head_size % 2:
            raise LabError(f"A head of size {self.head_size} has no pairs for RoPE to rotate.",
                           "Choose an even head_size (width / heads by default).")


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps), the mean over the last dimension. On a GPU a kernel of labkit computes it."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rope_tables(context: int, head_size: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of t * base^(-2i/K), each [context, K]; the angles stand twice, once for each half of the head."""
    frequency = base ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    angle_TK = torch.outer(torch.arange(context, dtype=torch.float64), frequency).repeat(1, 2)
    return angle_TK.cos().float(), angle_TK.sin().float()


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Turn the pair (x_i, x_{i+K/2}) of position t by its angle: RoPE in Llama's half-split layout."""
    first, second = x_BHTK.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BHTK * cos_TK.to(x_BHTK.dtype) + turned * sin_TK.to(x_BHTK.dtype)


class Attention(nn.Module):
    """Projections, optional QK-norm, RoPE and the cache round a replaceable attention function."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        H, J, K = config.heads, config.kv_heads, config.head_size
        self.layer, self.split = layer, (H * K, J * K, J * K)
        self.head_size = K
        self.qkv = nn.Linear(config.width, sum(self.split), bias=False)
        self.out = nn.Linear(H * K, config.width, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(K, config.norm_eps) if config.qk_norm else None for _ in range(2))

    def forward(self, x_BTD: Tensor, rope, attention, mask_BTU: Tensor | None, cache: KVCache | None) -> Tensor:
        q_BTHK, k_BTJK, v_BTJK = (part.unflatten(-1, (-1, self.head_size))
                                  for part in self.qkv(x_BTD).split(self.split, dim=-1))
        if self.q_norm is not None:
            q_BTHK, k_BTJK = self.normed(q_BTHK, k_BTJK)
        q_BHTK, k_BJTK = rotate(q_BTHK.transpose(1, 2), *rope), rotate(k_BTJK.transpose(1, 2), *rope)
        v_BJTK = v_BTJK.transpose(1, 2)
        if cache is not None:
            k_BJTK, v_BJTK = cache.extend(self.layer, k_BJTK, v_BJTK)
        out_BHTK = attention(q_BHTK, k_BJTK, v_BJTK, mask_BTU)
        return self.out(out_BHTK.transpose(1, 2).flatten(2))

    def normed(self, q_BTHK: Tensor, k_BTJK: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, each head normed by itself; one launch for both on a GPU."""
        q_NHK, k_NJK = qk_norm(q_BTHK.flatten(0, 1), k_BTJK.flatten(0, 1), self.q_norm.weight, self.k_norm.weight,
                               self.q_norm.eps)
        return q_NHK.view(q_BTHK.shape), k_NJK.view(k_BTJK.shape)


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x); gate and up are one matrix, so that the input is read once."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention and feed-forward, each normed before and gated after."""

    def __init__(self, config: GPTConfig, layer: int, gate: Callable[[GPTConfig, int], nn.Module]):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config.width, config.norm_eps), Attention(config, layer)
        self.ffn_norm, self.ffn = RMSNorm(config.width, config.norm_eps), SwiGLU(config)
        self.attention_gate, self.ffn_gate = gate(config, layer), gate(config, layer)
        self.locked = False  # a locked block is the identity and is not computed (labkit.models.locked_blocks)

    def forward(self, x_BTD: Tensor, rope, attention, mask_BTU, cache) -> Tensor:
        mixed_BTD = self.attention(self.attention_norm(x_BTD), rope, attention, mask_BTU, cache)
        x_BTD = x_BTD + self.attention_gate(mixed_BTD)
        return x_BTD + self.ffn_gate(self.ffn(self.ffn_norm(x_BTD)))


def no_gate(config: GPTConfig, layer: int) -> nn.Module:
    """The plain residual connection."""
    return nn.Identity()


class GPT(nn.Module):
    """The decoder. `model(tokens_BT)` gives logits_BTV; `embed`, `trunk` and `head` are its three steps.

    Args:
        config: the shape.
        attention: a function with the signature of `sdpa_attention`, or a list of one for each layer; may be exchanged
            at any time.
        gate: makes the module on each residual branch from (config, layer).
        seed: of the initial weights, which depend on nothing else.
    """

    def __init__(self, config: GPTConfig, *, attention=sdpa_attention, gate=no_gate, seed: int = 0):
        super().__init__()
        self.config, self.attention = config, attention
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, layer, gate) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.unembedding = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        cos_TK, sin_TK = rope_tables(config.context, config.head_size, config.rope_base)
        self.register_buffer("cos_TK", cos_TK, persistent=False)
        self.register_buffer("sin_TK", sin_TK, persistent=False)
        self.initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Embedding and head: N(0, 0.02^2). Matrices: N(0, 1/fan_in), those that end a branch smaller by sqrt(2L),
        so that the sum of 2L branches keeps the variance of one."""
        self.initialise_vocabulary(generator)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith((".qkv.weight", ".gate_up.weight")):
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
            elif name.endswith((".out.weight", ".down.weight")):
                parameter.normal_(0, (2 * self.config.layers * parameter.shape[1]) ** -0.5, generator=generator)

    @torch.no_grad()
    def initialise_vocabulary(self, generator: torch.Generator) -> None:
        """Draw the embedding and the head afresh and leave the rest as it is (an ablation of notebook 02)."""
        self.embedding.weight.normal_(0, 0.02, generator=generator)
        if self.unembedding is not None:
            self.unembedding.weight.normal_(0, 0.02, generator=generator)

    def forward(self, tokens_BT: Tensor, *, document_mask_BTT: Tensor | None = None, cache: KVCache | None = None):
        """Logits of the next token at every position, [B, T, V]."""
        return self.head(self.trunk(self.embed(tokens_BT), mask_BTU=document_mask_BTT, cache=cache))

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows of the embedding matrix: any shape of token ids in, the same shape with D behind it out."""
        return self.embedding(tokens)

    def trunk(self, x_BTD: Tensor, *, mask_BTU: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """All layers and the last norm, from embedded input. What sits at a position need not be one token."""
        start = 0 if cache is None else cache.length
        end = start + x_BTD.shape[1]
        limit = self.config.context if cache is None else min(cache.capacity, self.config.context)
        if end > limit:
            raise LabError(f"{end} positions do not fit into a context of {limit}.",
                           "Give a shorter input, or a GPTConfig with a longer context.")
        rope = self.cos_TK[start:end], self.sin_TK[start:end]
        attend = [self.attention] * len(self.blocks) if callable(self.attention) else self.attention
        for block, attention in zip(self.blocks, attend, strict=True):
            if block.locked:
                continue
            x_BTD = block(x_BTD, rope, attention, mask_BTU, cache)
        if cache is not None:
            cache.advance(x_BTD.shape[1])
        return self.norm(x_BTD)

    @property
    def head_weight(self) -> Tensor:
        """The matrix [V, D] of the head; a tied head reads the embedding."""
        return self.embedding.weight if self.unembedding is None else self.unembedding.weight

    def head(self, hidden: Tensor) -> Tensor:
        """Logits from normed hidden states."""
        return F.linear(hidden, self.head_weight)

    def count_parameters(self) -> int:
        """Trainable numbers; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())
