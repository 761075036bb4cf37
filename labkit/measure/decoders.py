"""One way to ask any decoder two things: to draw answers, and what it thinks of given ones.

Ours and Hugging Face's, so that a measure is written once. Prompts are rows of one length; where a text is shorter it
stands at the right end, and the mask is False in front of it (only Hugging Face's decoders can take such a mask).
"""

from typing import Protocol

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.models import GPT, answer_hidden, generate
from labkit.models.sample import draw as draw_token


class Decoder(Protocol):
    """What a measure needs of a model."""

    vocabulary: int

    def draw(self, prompt_NT: Tensor, shown_NT: Tensor, new: int, stops: tuple[int, ...], samples: int,
             generator: torch.Generator) -> Tensor:
        """`samples` answers to each prompt at temperature 1, [N * samples, new]; stops[0] behind each answer's end."""

    def states(self, prompt_BT: Tensor, shown_BT: Tensor, answer_BA: Tensor) -> tuple[Tensor, Tensor]:
        """What the head reads and what it says at each answer token: hidden [B, A, D] and logits [B, A, V]."""


class OurDecoder:
    """A labkit GPT."""

    def __init__(self, model: GPT):
        self.model, self.vocabulary = model, model.config.vocab_size

    def draw(self, prompt_NT, shown_NT, new, stops, samples, generator):
        self._whole(shown_NT)
        return generate(self.model, prompt_NT, max_new_tokens=new, stop_tokens=stops, samples=samples,
                        generator=generator).tokens_BT

    def states(self, prompt_BT, shown_BT, answer_BA):
        self._whole(shown_BT)
        hidden_BAD = answer_hidden(self.model, prompt_BT, answer_BA)
        return hidden_BAD, self.model.head(hidden_BAD)

    @staticmethod
    def _whole(shown_BT: Tensor) -> None:
        if not shown_BT.all():
            raise LabError("A labkit GPT reads prompts of one length only.", "Give prompts without padding.")


class HuggingFaceDecoder:
    """A transformers model for causal language modelling (the optional extra: pip install labkit[hf])."""

    def __init__(self, model):
        self.model, self.vocabulary = model, model.get_output_embeddings().weight.shape[0]

    def draw(self, prompt_NT, shown_NT, new, stops, samples, generator, *, temperature=1.0):
        prompt_BT, shown_BT = (each.repeat_interleave(samples, 0) for each in (prompt_NT, shown_NT))
        answer_BA = prompt_BT.new_full((len(prompt_BT), new), stops[0])
        ended_B, inputs_BT, past = torch.zeros_like(prompt_BT[:, 0], dtype=torch.bool), prompt_BT, None
        stop_S = torch.tensor(stops, device=prompt_BT.device)
        for step in range(new):
            place_BT = (shown_BT.cumsum(1) - 1).clamp(min=0)[:, -inputs_BT.shape[1]:]
            out = self.model(input_ids=inputs_BT, attention_mask=shown_BT.long(), position_ids=place_BT,
                             past_key_values=past, use_cache=True, logits_to_keep=1)
            token_B, _ = draw_token(out.logits[:, -1], temperature=temperature, top_k=None, top_p=None,
                                    generator=generator)
            answer_BA[:, step] = torch.where(ended_B, stops[0], token_B)
            ended_B |= torch.isin(token_B, stop_S)
            if ended_B.all():
                break
            inputs_BT, past = answer_BA[:, step : step + 1], out.past_key_values
            shown_BT = torch.cat((shown_BT, torch.ones_like(shown_BT[:, :1])), 1)
        return answer_BA

    def states(self, prompt_BT, shown_BT, answer_BA):
        text_BU = torch.cat((prompt_BT, answer_BA[:, :-1]), 1)
        shown_BU = torch.cat((shown_BT, torch.ones_like(answer_BA[:, :-1], dtype=torch.bool)), 1)
        place_BU = (shown_BU.cumsum(1) - 1).clamp(min=0)
        heard = []  # what the head reads: `hidden_states` is before the last norm in some families, after it in others
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
        try:
            logits_BUV = self.model(input_ids=text_BU, attention_mask=shown_BU.long(), position_ids=place_BU).logits
        finally:
            hook.remove()
        A = answer_BA.shape[1]
        return heard[0][:, -A:].float(), logits_BUV[:, -A:].float()


def decoder_for(model) -> Decoder:
    """The decoder of a labkit GPT or of a transformers model. Raises LabError for anything else."""
    if isinstance(model, GPT):
        return OurDecoder(model)
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return HuggingFaceDecoder(model)
    raise LabError(f"A {type(model).__name__} is no decoder that can be asked.",
                   "Give a labkit GPT or a transformers model for causal language modelling.")
