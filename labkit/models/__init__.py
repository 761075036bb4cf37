"""One readable decoder, its parts, and the sampler.

gpt        GPTConfig, GPT: RoPE, RMSNorm, SwiGLU, grouped queries, optional QK-norm
attention  the default attention, and the mask of packed documents
cache      keys and values of a prefix, so that sampling never computes it twice
sample     generate: batched sampling with temperature, top-k, top-p and stop tokens
score      what a model thinks of given answers
llama      the same weights under the names of Hugging Face's Llama
"""

from labkit.models.attention import document_mask, sdpa_attention
from labkit.models.cache import KVCache
from labkit.models.gpt import GPT, GPTConfig
from labkit.models.sample import Generation, generate
from labkit.models.score import answer_hidden, answer_logits, answer_logprob

__all__ = ["GPT", "GPTConfig", "Generation", "KVCache", "answer_hidden", "answer_logits", "answer_logprob",
           "document_mask", "generate", "sdpa_attention"]
