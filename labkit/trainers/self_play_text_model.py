"""A real instruct model as self-play needs it: prompts from its chat template, answers in batches, their log p.

    context 0 = chat(q)        context 1 = chat(q + "\\n\\nHint: " + h)        one user turn, no system prompt
    a row of a batch:  prompt, which ends at the right edge | answer, which begins there        PADDING (-1) is no token

No id of the vocabulary stands for "nothing", since many tokenizers pad with the token that ends an answer. The model
gets an attention mask and positions that count from a row's first token, so a row says the same in any batch.
Source: hint_delta.py of G-Zero's code (arXiv 2605.09959).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from labkit.data.packing import PADDING
from labkit.errors import LabError
from labkit.kernels.token_logprob import token_logprob
from labkit.measure.decoders import HuggingFaceDecoder
from labkit.progress import bar

EXAMPLE = "Qwen/Qwen3-0.6B"


def load_instruct(name: str, device: torch.device | str = "cpu"):
    """(model, tokenizer) of a folder, or of a name on the Hugging Face hub; weights in fp32, dropout off.

    Raises LabError where the library is missing, nothing of this name can be opened, or it has no chat template.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise LabError("A real instruct model needs the library `transformers`.",
                       "Install it: pip install -e '.[hf]'") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name)
    except Exception as error:  # dozens of kinds: no network, no such model, no causal language model
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise LabError(f"The model {name!r} can't be opened: {why[0]}",
                       f"Name a folder, or a model of the hub such as {EXAMPLE}; without a network it must have been "
                       "downloaded before (hf download NAME).") from None
    check_chat(model, tokenizer)
    return model.to(device, torch.float32).eval(), tokenizer


def check_chat(model: nn.Module, tokenizer) -> None:
    """Raises LabError for a model that cannot be chatted with."""
    if not getattr(tokenizer, "chat_template", None):
        raise LabError("This model has no chat template, so it is no instruct model.",
                       f"Name one that was tuned to chat, such as {EXAMPLE}.")
    if not ends_of(model, tokenizer):
        raise LabError("Neither the model nor its tokenizer says which token ends an answer.",
                       "Set tokenizer.eos_token to the token that closes a turn in its chat template.")


def ends_of(model: nn.Module, tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer: those of the model's generation settings, and the tokenizer's."""
    told = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    told = [told] if isinstance(told, int) else list(told or [])
    return tuple(dict.fromkeys(end for end in (*told, tokenizer.eos_token_id) if end is not None))


def inputs_of(text_BT: Tensor) -> dict[str, Tensor]:
    """What a transformers model needs to read rows with PADDING in them."""
    shown_BT = text_BT != PADDING
    return {"input_ids": text_BT.clamp(min=0), "attention_mask": shown_BT.long(),
            "position_ids": (shown_BT.cumsum(1) - 1).clamp(min=0)}


def answer_counts(answer_NA: Tensor) -> Tensor:
    """Which of the answers' tokens count: all but PADDING."""
    return answer_NA != PADDING


def cut_behind(drawn_NA: Tensor, ends: Sequence[int]) -> Tensor:
    """The same answers with PADDING behind the first token that ends one."""
    ended_NA = torch.isin(drawn_NA, torch.tensor(ends, device=drawn_NA.device))
    return drawn_NA.masked_fill(ended_NA.cumsum(1) - ended_NA.long() > 0, PADDING)


@dataclass(frozen=True)
class Instruct:
    """A model with its tokenizer, and how it is asked."""

    model: nn.Module
    tokenizer: object
    new: int = 128  # the most tokens of an answer
    temperature: float = 0.7  # of drawing; log-probabilities are at 1
    drawn_at_once: int = 64  # rows of a batch
    scored_at_once: int = 4
    precision: str = "fp32"  # or "bf16": products in bfloat16, as in labkit.trainers.loop

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @contextmanager
    def products(self) -> Iterator[None]:
        """Inside, matrix products have the precision that was chosen."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def prompt(self, question: str, hint: str | None = None) -> Tensor:
        """One user turn, up to where the answer begins, [P]. Models that can think first are told not to."""
        turn = {"role": "user", "content": question if hint is None else f"{question}\n\nHint: {hint}"}
        ids = self.tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=True,
                                                 enable_thinking=False)
        return torch.tensor(list(ids["input_ids"] if isinstance(ids, Mapping) else ids))

    def prompts(self, questions: Sequence[str], hints: Sequence[str | None] | None = None) -> Tensor:
        """All prompts, ending at the right edge, [N, P] on the model's device."""
        rows = [self.prompt(*each) for each in zip(questions, hints or [None] * len(questions), strict=True)]
        return pad_sequence(rows, batch_first=True, padding_value=PADDING, padding_side="left").to(self.device)

    @torch.no_grad()
    def answers(self, prompt_NP: Tensor, generator: torch.Generator | None = None, *, label: str = "answers") -> Tensor:
        """One drawn answer to each prompt with the token that ends it, [N, new]."""
        ends, parts = ends_of(self.model, self.tokenizer), []
        with bar(len(prompt_NP), label, "answer") as progress, self.products():
            for prompt_BP in prompt_NP.split(self.drawn_at_once):
                drawn_BA = HuggingFaceDecoder(self.model).draw(prompt_BP.clamp(min=0), prompt_BP != PADDING, self.new,
                                                               ends, 1, generator, temperature=self.temperature)
                parts.append(cut_behind(drawn_BA, ends))
                progress.update(len(prompt_BP))
        return torch.cat(parts)

    def texts(self, answer_NA: Tensor) -> list[str]:
        """The answers as text, without the tokens that end them."""
        ends = ends_of(self.model, self.tokenizer)
        return [self.tokenizer.decode([token for token in row if token != PADDING and token not in ends],
                                      skip_special_tokens=True) for row in answer_NA.tolist()]

    def finished(self, answer_NA: Tensor) -> Tensor:
        """Whether each answer came to its end, [N]."""
        return torch.isin(answer_NA, torch.tensor(ends_of(self.model, self.tokenizer), device=answer_NA.device)).any(1)

    def logprob(self, prompt_NP: Tensor, answer_NA: Tensor) -> Tensor:
        """log p of each answer token at temperature 1, [N, A] in fp32; 0 where there is none.

        A few rows at a time. Where a gradient is asked for, each part is computed again on the way back, so that the
        memory is that of one part.
        """
        parts = [checkpoint(self._part, *both, use_reentrant=False) if torch.is_grad_enabled() else self._part(*both)
                 for both in zip(prompt_NP.split(self.scored_at_once), answer_NA.split(self.scored_at_once),
                                 strict=True)]
        return torch.cat(parts)

    def _part(self, prompt_BP: Tensor, answer_BA: Tensor) -> Tensor:
        prompt_BP, short_BA = (each[:, (each != PADDING).any(0)] for each in (prompt_BP, answer_BA))
        text_BT = torch.cat((prompt_BP, short_BA[:, :-1]), 1)  # the last token predicts nothing
        with self.products():
            logits_BAV = self.model(**inputs_of(text_BT), use_cache=False, logits_to_keep=short_BA.shape[1]).logits
        logp_M = token_logprob(logits_BAV.flatten(0, 1), short_BA.flatten(), ignore_index=PADDING)[0]
        return F.pad(logp_M.view(short_BA.shape), (0, answer_BA.shape[1] - short_BA.shape[1]))
