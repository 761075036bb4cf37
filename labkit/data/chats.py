"""A conversation as one row of tokens, and which of them the model must learn to write.

    <role> content <end> <role> content <end> ...

Each message is a role header (one token for system, one for user, one for assistant), its text, and the end-of-turn
token. In an agent's trace only the assistant's tokens are the agent's: everything else is written by people or by the
shell. So the mask is True on the text of assistant messages *and on their end token* (a model that never learns to end
a turn goes on and invents the observation), and False on headers, which the loop writes. Shift after masking:

    loss = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:], mask[:, 1:])

Qwen3's own template marks no assistant tokens, so the training code of marin-community/marin brings one of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.data.packing import PADDING
from labkit.data.tokenizers import Tokenizer
from labkit.errors import LabError

HEADERS = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with three more ids behind its own: the role headers. The end of a turn is the tokenizer's `end`."""

    text: Tokenizer

    @property
    def vocab_size(self) -> int:
        """Ids of the text, and the headers."""
        return self.text.vocab_size + len(HEADERS)

    @property
    def end(self) -> int:
        """The id that ends a turn."""
        return self.text.end

    def header(self, role: str) -> int:
        """The id that begins a turn of `role`."""
        if role not in HEADERS:
            raise LabError(f"There is no role {role!r} in a chat.", f"Use one of {', '.join(HEADERS)}.")
        return self.text.vocab_size + HEADERS.index(role)

    def encode(self, messages: Sequence[Mapping[str, str]]) -> tuple[Tensor, Tensor]:
        """Tokens [T] and the mask [T] of what an assistant wrote, its end tokens included."""
        tokens, learned = [], []
        for message, ids in zip(messages, self.text.encode_many([m["content"] for m in messages]), strict=True):
            tokens += [self.header(message["role"]), *ids, self.end]
            learned += [False] + [message["role"] == "assistant"] * (len(ids) + 1)
        return torch.tensor(tokens, dtype=torch.long), torch.tensor(learned, dtype=torch.bool)

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens up to the header under which the assistant must write now."""
        tokens_T, _ = self.encode(messages)
        return [*tokens_T.tolist(), self.header("assistant")]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; headers and ends add nothing."""
        return self.text.decode([token for token in tokens if token < self.text.vocab_size])


def first_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Rows of at most `length` tokens that hold whole documents: first fit, the longest first.

    Each document goes into the first row with room. At most 11/9 of the fewest rows possible, and two thirds of a row
    more (Dosa 2007). Returns the documents' numbers row by row. Raises LabError where one is longer than a row.
    """
    if sizes and max(sizes) > length:
        raise LabError(f"A document of {max(sizes)} tokens doesn't fit into rows of {length}.",
                       "Cut or drop it first, or use longer rows.")
    rows, room = [], []
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        row = next((row for row, space in enumerate(room) if space >= sizes[number]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(number)
        room[row] -= sizes[number]
    return rows


def pack_chats(chats: Sequence[tuple[Tensor, Tensor]], length: int, fill: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole chats packed by `first_fit`: tokens [R, length], their masks [R, length], and whose they are [R, length].

    `fill` stands behind the last chat of a row, unmasked, under the id PADDING. With `document_mask` on the third, a
    chat sees itself alone; rotary positions are relative, so they need no reset.
    """
    rows = first_fit([len(tokens_T) for tokens_T, _ in chats], length)
    tokens_RT = torch.full((len(rows), length), fill)
    learned_RT = torch.zeros(len(rows), length, dtype=torch.bool)
    chat_RT = torch.full((len(rows), length), PADDING)
    for row, numbers in enumerate(rows):
        start = 0
        for number in numbers:
            tokens_T, learned_T = chats[number]
            end = start + len(tokens_T)
            tokens_RT[row, start:end], learned_RT[row, start:end] = tokens_T, learned_T
            chat_RT[row, start:end] = number
            start = end
    return tokens_RT, learned_RT, chat_RT
