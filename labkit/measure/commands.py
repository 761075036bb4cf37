"""How often a model writes the agent's next command, token for token, given everything before it and its thought.

    match = share of turns whose bash block and end token are all the likeliest tokens,   the turn's thought being given

A scripted agent says "Look at the files." or "First I list the files." by chance, which nobody can predict, so thoughts
are read and not judged. Everything before the command is the teacher's (teacher forcing): the match says what is
learned of each kind of command, not how a rollout of the model's own would end.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from labkit.data.chats import ChatTokenizer
from labkit.errors import LabError
from labkit.models import GPT
from labkit.tasks.agent import MARKER, parse_command

KINDS = ("list", "search", "read", "edit", "submit", "other")
WORDS = {"ls": "list", "find": "list", "grep": "search", "cat": "read", "head": "read", "tail": "read"}
FENCE = "```bash"


def command_kind(text: str) -> str | None:
    """What the command of an assistant's turn is for, one of KINDS; None where the turn holds no command."""
    command = parse_command(text)
    if command is None:
        return None
    if MARKER in command:
        return "submit"
    if re.match(r"sed\b.*-i", command):
        return "edit"
    return "read" if command.startswith("sed") else WORDS.get((command.split() or [""])[0], "other")


@dataclass(frozen=True)
class MarkedChat:
    """A chat's tokens, the number of the turn whose command each belongs to (-1: none), and the turns' kinds."""

    tokens_T: Tensor
    turn_T: Tensor
    kinds: tuple[str, ...]


def mark_commands(messages: Sequence[Mapping[str, str]], chat: ChatTokenizer, longest: int | None = None) -> MarkedChat:
    """The chat of `chat.encode`, cut to `longest` tokens; a command counts only where its end token is still there.

    Raises LabError for a tokenizer that joins a thought's last characters with the fence of the command.
    """
    tokens, turns, kinds = [], [], []
    for message in messages:
        kind = command_kind(message["content"]) if message["role"] == "assistant" else None
        thought, fence, command = message["content"].partition(FENCE) if kind else (message["content"], "", "")
        before, after = [chat.header(message["role"]), *chat.text.encode(thought)], chat.text.encode(fence + command)
        tokens += [*before, *after, chat.end]
        turns += [-1] * len(before) + [len(kinds) if kind else -1] * (len(after) + 1)
        kinds += [kind] if kind else []
    if tokens != chat.encode(messages)[0].tolist():
        raise LabError("This tokenizer joins thoughts and commands in one token.", "Use a BPE that splits at spaces.")
    longest = longest or len(tokens)
    whole = turns[:longest] if len(tokens) <= longest else [turn if turns[longest:].count(turn) == 0 else -1
                                                            for turn in turns[:longest]]
    return MarkedChat(torch.tensor(tokens[:longest]), torch.tensor(whole), tuple(kinds))


@dataclass(frozen=True)
class CommandMatch:
    """One entry a command: whether it matched, its kind, and how many commands stood before it in its chat."""

    right_N: np.ndarray
    kind_N: np.ndarray
    place_N: np.ndarray

    def share(self, kind: str | None = None) -> float:
        """The match, of all commands or of one kind; nan where there is none."""
        chosen_N = self.right_N if kind is None else self.right_N[self.kind_N == kind]
        return float(chosen_N.mean()) if len(chosen_N) else float("nan")


@torch.no_grad()
def command_match(model: GPT, chats: Sequence[MarkedChat], *, batch: int = 8) -> CommandMatch:
    """Judge every command of the chats. Raises LabError where they hold none."""
    right, kinds, places = [], [], []
    device = model.embedding.weight.device
    for start in range(0, len(chats), batch):
        part = chats[start : start + batch]
        tokens_BT, turn_BT = (torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=fill).to(device)
                              for each, fill in (([chat.tokens_T for chat in part], 0),
                                                 ([chat.turn_T for chat in part], -1)))
        hit_BT = model(tokens_BT[:, :-1]).argmax(dim=-1) == tokens_BT[:, 1:]
        for chat, hit_T, turn_T in zip(part, hit_BT.cpu(), turn_BT[:, 1:].cpu(), strict=True):
            for turn in turn_T[turn_T >= 0].unique().tolist():
                right.append(bool(hit_T[turn_T == turn].all()))
                kinds.append(chat.kinds[turn])
                places.append(turn)
    if not right:
        raise LabError("There is no command to judge.", "Give chats with an assistant's bash block.")
    return CommandMatch(np.array(right, float), np.array(kinds), np.array(places))
