"""Supervised fine-tuning on whole conversations: many turns a row, and a mask that says which tokens are learned.

    L = - sum_t m_t log p(y_t | y_<t) / sum_t m_t

With m on the assistant's turns this is what SWE-ZERO's training code does; with m = 1 everywhere it is next-token
training on transcripts, in which the model also learns to write what the shell answers. `labkit.data.ChatTokenizer`
makes tokens and masks; trainers.sft is the same for single questions and answers.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from labkit.data.chats import pack_chats
from labkit.errors import LabError
from labkit.models import GPT
from labkit.models.attention import document_mask
from labkit.objectives import next_token_loss
from labkit.trainers.loop import History, TrainSettings, train

Chat = tuple[Tensor, Tensor]  # tokens [T] and mask [T]


def whole_mask(chats: Sequence[Chat]) -> list[Chat]:
    """The same chats with every token learned."""
    return [(tokens_T, torch.ones_like(learned_T)) for tokens_T, learned_T in chats]


def cut_chats(chats: Sequence[Chat], longest: int) -> list[Chat]:
    """The first `longest` tokens of each, as a short context leaves them."""
    return [(tokens_T[:longest], learned_T[:longest]) for tokens_T, learned_T in chats]


def learned_share(chats: Sequence[Chat]) -> float:
    """The part of all tokens that the loss counts."""
    return sum(int(mask_T.sum()) for _, mask_T in chats) / sum(len(tokens_T) for tokens_T, _ in chats)


def pad_chats(chats: Sequence[Chat]) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] and masks [B, T], padded on the right, where a causal model never looks, and not learned."""
    tokens, masks = zip(*chats, strict=True)
    return tuple(torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (tokens, masks))


def chat_loss(model: GPT, tokens_BT: Tensor, learned_BT: Tensor, chat_BT: Tensor | None = None) -> Tensor:
    """Mean loss over the learned tokens; `chat_BT` (from pack_chats) keeps the chats of a row apart."""
    mask_BTT = None if chat_BT is None else document_mask(chat_BT[:, :-1])
    logits_BTV = model(tokens_BT[:, :-1], document_mask_BTT=mask_BTT)
    return next_token_loss(logits_BTV, tokens_BT[:, 1:], learned_BT[:, 1:])


def tune_on_chats(model: GPT, chats: Sequence[Chat], settings: TrainSettings, *, packed: bool = False,
                  label: str = "tuning") -> History:
    """Train `model` in place on batches drawn from (seed, step), with replacement.

    `settings.batch` counts chats, or with `packed` rows of `settings.context` tokens that hold several whole chats.
    Raises LabError where there is no chat, or one is longer than the context.
    """
    longest = max((len(tokens_T) for tokens_T, _ in chats), default=0)
    if not chats or longest > settings.context:
        raise LabError(f"{len(chats)} chats of up to {longest} tokens don't fit a context of {settings.context}.",
                       "Give at least one chat, and shorten long ones with cut_chats.")
    device = model.embedding.weight.device
    rows = [part.to(device) for part in pack_chats(chats, settings.context, 0)] if packed else None

    def loss_at(model: GPT, step: int) -> Tensor:
        count = len(rows[0]) if packed else len(chats)
        chosen = np.random.default_rng((settings.seed, step)).integers(count, size=settings.batch)
        if packed:
            return chat_loss(model, *(part[torch.from_numpy(chosen).to(device)] for part in rows))
        return chat_loss(model, *(part.to(device) for part in pad_chats([chats[i] for i in chosen])))

    return train(model, loss_at, settings, label=label)
