"""Scoring answers: what a model thinks of given tokens that follow a prompt.

    logits at the position before each answer token;   log p(y_t | prompt, y_<t) and the entropy of that distribution

Only the answer's positions go through the head: the prompt's logits are never made.
"""

import torch
from torch import Tensor

from labkit.kernels.token_logprob import token_logprob
from labkit.models.gpt import GPT


def answer_hidden(model: GPT, prompt_NT: Tensor, answer_NA: Tensor) -> Tensor:
    """Normed hidden states that predict each answer token, [N, A, D]; prompts all have one length."""
    tokens_NT = torch.cat((prompt_NT, answer_NA[:, :-1]), 1)  # the last token predicts nothing
    return model.trunk(model.embed(tokens_NT))[:, prompt_NT.shape[1] - 1 :]


def answer_logits(model: GPT, prompt_NT: Tensor, answer_NA: Tensor) -> Tensor:
    """Logits that predict each answer token, [N, A, V]."""
    return model.head(answer_hidden(model, prompt_NT, answer_NA))


def answer_logprob(model: GPT, prompt_NT: Tensor, answer_NA: Tensor, *,
                   temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer token and the entropy of its distribution, both [N, A] in fp32, in nats."""
    logits_NAV = answer_logits(model, prompt_NT, answer_NA)
    logp_M, entropy_M, _ = token_logprob(logits_NAV.flatten(0, 1), answer_NA.flatten(), temperature=temperature)
    return logp_M.view(answer_NA.shape), entropy_M.view(answer_NA.shape)
