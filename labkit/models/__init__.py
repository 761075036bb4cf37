"""One readable decoder, its parts, and the sampler.

gpt        GPTConfig, GPT: RoPE, RMSNorm, SwiGLU, grouped queries, optional QK-norm
attention  the default attention, and the mask of packed documents; explicit_attention: written out, with its logits
locked_blocks  architecture warm-up: blocks that start as identities and unlock (notebook 05)
lighthouse  attention on a short, chosen sequence, for training only (notebook 03)
cache      keys and values of a prefix, so that sampling never computes it twice
sample     generate: batched sampling with temperature, top-k, top-p and stop tokens
score      what a model thinks of given answers
byte_latent  bytes in, thinking in patches of T bytes (notebook 04)
llama      the same weights under the names of Hugging Face's Llama
"""

from labkit.models.attention import document_mask, sdpa_attention
from labkit.models.byte_latent import ByteLatent, ByteLatentConfig
from labkit.models.cache import KVCache
from labkit.models.gpt import GPT, GPTConfig
from labkit.models.lighthouse import Lighthouse, lighthouse_layers
from labkit.models.sample import Generation, generate
from labkit.models.score import answer_hidden, answer_logits, answer_logprob

__all__ = ["GPT", "ByteLatent", "ByteLatentConfig", "GPTConfig", "Generation", "KVCache", "Lighthouse",
           "answer_hidden", "answer_logits", "answer_logprob", "document_mask", "generate", "lighthouse_layers",
           "sdpa_attention"]
