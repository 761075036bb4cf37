"""The same decoder under other names: weights of Hugging Face's Llama in, a labkit GPT out.

Llama keeps q, k, v and gate, up as separate matrices; the GPT stacks them, so that each input is read once.
"""

import torch
from torch import Tensor

from labkit.models.gpt import GPT, GPTConfig

STACKED = {"attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
           "ffn.gate_up": ("mlp.gate_proj", "mlp.up_proj")}
RENAMED = {"attention.out": "self_attn.o_proj", "ffn.down": "mlp.down_proj",
           "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def from_llama(llama_state: dict[str, Tensor], config: GPTConfig) -> GPT:
    """A GPT that computes what the Llama of this state dict computes.

    Args:
        llama_state: `LlamaForCausalLM.state_dict()`, with or without `lm_head.weight`.
        config: the same shape; `tied=True` takes the head from the embedding.
    """
    state = {"embedding.weight": llama_state["model.embed_tokens.weight"],
             "norm.weight": llama_state["model.norm.weight"]}
    if not config.tied:
        state["unembedding.weight"] = llama_state["lm_head.weight"]
    for layer in range(config.layers):
        here, there = f"blocks.{layer}.", f"model.layers.{layer}."
        for ours, theirs in STACKED.items():
            state[f"{here}{ours}.weight"] = torch.cat([llama_state[f"{there}{name}.weight"] for name in theirs])
        for ours, theirs in RENAMED.items():
            state[f"{here}{ours}.weight"] = llama_state[f"{there}{theirs}.weight"]
    model = GPT(config)
    model.load_state_dict(state)
    return model
