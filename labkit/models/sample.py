"""Batched sampling: draw tokens from p(next | prefix) until a stop token or a length.

    p = softmax(logits / temperature), cut to the k likeliest (top-k) and to the smallest set that holds
    mass p (top-p, Holtzman et al., arXiv 1904.09751), then renormalised.

The prefix is computed once (KVCache), also where one prompt has many continuations. The host asks the device only every
sixteen steps whether all rows have stopped, because each question waits for the device.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.errors import LabError
from labkit.models.cache import KVCache
from labkit.models.gpt import GPT

ASK_EVERY = 16


@dataclass
class Generation:
    """What was drawn. Positions from `length_B` on hold the stop token (or 0) and log-probability 0."""

    tokens_BT: Tensor  # new tokens only, the stop token included
    length_B: Tensor  # how many of them count, the stop token included
    logprob_BT: Tensor  # log p(token) at the given temperature, before top-k and top-p cut the distribution
    stopped_B: Tensor  # True where a stop token ended the row, False where the length did


def cut_to_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """-inf for all but the k largest logits of a row (ties at the border stay)."""
    smallest_B1 = logits_BV.topk(min(k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < smallest_B1, float("-inf"))


def cut_to_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """-inf outside the smallest set of tokens whose mass reaches p; the likeliest token always stays."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    mass_BV = sorted_BV.softmax(dim=-1)
    before_BV = mass_BV.cumsum(dim=-1) - mass_BV
    out_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(1, order_BV, before_BV >= p)
    return logits_BV.masked_fill(out_BV, float("-inf"))


def draw(logits_BV: Tensor, *, temperature: float, top_k: int | None, top_p: float | None,
         generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability; temperature 0 takes the likeliest."""
    scaled_BV = logits_BV.float() / temperature if temperature > 0 else logits_BV.float()
    logprob_BV = F.log_softmax(scaled_BV, dim=-1)
    if temperature == 0:
        token_B = scaled_BV.argmax(dim=-1)
    else:
        kept_BV = scaled_BV if top_k is None else cut_to_top_k(scaled_BV, top_k)
        kept_BV = kept_BV if top_p is None else cut_to_top_p(kept_BV, top_p)
        token_B = torch.multinomial(kept_BV.softmax(dim=-1), 1, generator=generator).squeeze(1)
    return token_B, logprob_BV.gather(1, token_B[:, None]).squeeze(1)


def check_settings(model: GPT, prompt_BT: Tensor, new: int, temperature: float, top_k, top_p,
                   samples: int) -> None:
    """One sentence for each setting that cannot work."""
    if prompt_BT.shape[1] < 1:
        raise LabError("An empty prompt has no position to continue from.", "Begin it with the end-of-text token.")
    if prompt_BT.shape[1] + new > model.config.context + 1:
        raise LabError(f"A prompt of {prompt_BT.shape[1]} and {new} new tokens exceed a context of "
                       f"{model.config.context}.", "Ask for fewer tokens.")
    if new < 1 or samples < 1:
        raise LabError(f"{samples} x {new} new tokens cannot be drawn.", "Ask for at least one.")
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise LabError(f"temperature {temperature}, top_k {top_k}, top_p {top_p} describe no distribution.",
                       "Use temperature >= 0, top_k >= 1 and 0 < top_p <= 1.")


@torch.no_grad()  # not inference_mode: trainers use these tokens in a graph
def generate(model: GPT, prompt_BT: Tensor, *, max_new_tokens: int, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, stop_tokens: tuple[int, ...] = (),
             generator: torch.Generator | None = None, samples: int = 1) -> Generation:
    """Continue every prompt of a batch (all of one length), each `samples` times.

    Args:
        model: the decoder.
        prompt_BT: token ids, [B, T] with T >= 1.
        max_new_tokens: the most tokens to draw a row.
        temperature: 0 takes the likeliest token.
        top_k, top_p: cut the distribution before drawing; None does not.
        stop_tokens: a row ends with the first of these.
        generator: of the draws, on the model's device.
        samples: continuations of each prompt; row i continues prompt i // samples.
    Raises:
        LabError: the settings describe no distribution, or the text would not fit into the context.
    """
    check_settings(model, prompt_BT, max_new_tokens, temperature, top_k, top_p, samples)
    N, T = prompt_BT.shape
    B = N * samples
    device, dtype = prompt_BT.device, model.embedding.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    cache = KVCache(model.config, N, T + max_new_tokens, device=device, dtype=dtype)
    stop_S = torch.tensor(stop_tokens, device=device, dtype=torch.long)
    fill = stop_tokens[0] if stop_tokens else 0
    tokens_BT = torch.full((B, max_new_tokens), fill, device=device)
    logprob_BT = torch.zeros(B, max_new_tokens, device=device)
    stopped_B = torch.zeros(B, dtype=torch.bool, device=device)
    length_B = torch.zeros(B, dtype=torch.long, device=device)
    step_input_BT = prompt_BT
    for step in range(max_new_tokens):
        logits_BV = model.head(model.trunk(model.embed(step_input_BT), cache=cache)[:, -1])
        if step == 0 and samples > 1:
            logits_BV, cache = logits_BV.repeat_interleave(samples, 0), cache.repeated(samples)
        token_B, logprob_B = draw(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        tokens_BT[:, step] = torch.where(stopped_B, fill, token_B)
        logprob_BT[:, step] = torch.where(stopped_B, 0.0, logprob_B)
        length_B += ~stopped_B
        stopped_B |= torch.isin(token_B, stop_S)
        step_input_BT = tokens_BT[:, step : step + 1]
        if step % ASK_EVERY == ASK_EVERY - 1 and bool(stopped_B.all()):
            break
    return Generation(tokens_BT, length_B, logprob_BT, stopped_B)
