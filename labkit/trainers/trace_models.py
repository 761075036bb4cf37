"""The two small decoders of notebook 14: a base that has read repositories, and a student of the scripted agent.

trace-base has read text about made-up repositories (listings, files, grep's lines, statements of what a function
returns), each fact several times; it has never seen a role, a thought or a command. trace-student is the base
after fine-tuning on the assistant's turns of rollouts in 250 repositories. `python data/build_trajectories.py` makes
both, and the rows and the tokenizer.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.data.chats import ChatTokenizer
from labkit.data.corpora import checked_file
from labkit.data.tokenizers import BPETokenizer
from labkit.data.trajectories import FOLDER
from labkit.errors import LabError
from labkit.models import GPT, GPTConfig
from labkit.objectives import next_token_loss
from labkit.tasks.agent import SHORT_SYSTEM
from labkit.tasks.repositories import NAMES, OWNERS, drafts, module_text
from labkit.trainers.checkpoint import load_model
from labkit.trainers.loop import History, TrainSettings, train

MODELS = ("trace-base", "trace-student")
VOCABULARY, CONTEXT, WINDOW = 512, 1024, 256
BASE_SETTINGS = TrainSettings(steps=2000, learning_rate=4e-3, batch=8, context=WINDOW, warmup=50, decay=0.4)
STUDENT_SETTINGS = TrainSettings(steps=2500, learning_rate=3e-3, batch=4, context=CONTEXT, warmup=50, decay=0.4)


def trace_tokenizer() -> ChatTokenizer:
    """The shipped BPE of 512, trained on the shipped rows' training repositories, with the role headers."""
    return ChatTokenizer(BPETokenizer.load(checked_file("trace-tokenizer", FOLDER)))


def trace_config(chat: ChatTokenizer, width: int = 64, layers: int = 2) -> GPTConfig:
    """The shape of both models."""
    return GPTConfig(chat.vocab_size, CONTEXT, width, layers, heads=width // 16)


def load_trace_model(name: str, device: torch.device | str = "cpu") -> GPT:
    """A shipped model after checking its sha256. Raises LabError for an unknown name and an altered file."""
    if name not in MODELS:
        raise LabError(f"There is no model {name!r} of agent traces.", f"The models are: {', '.join(MODELS)}.")
    return load_model(checked_file(name, FOLDER), device)


def short_messages(row: Mapping) -> list[dict[str, str]]:
    """A row's messages with system and task in a line each, as `rollouts(..., short=True)` writes them.

    Raises LabError where the task's message does not have the parts of labkit.tasks.agent's.
    """
    _, head, rest = row["messages"][1]["content"].partition("## Issue\n\n")
    issue, end, _ = rest.partition("\n\n## Repository")
    if not (head and end):
        raise LabError(f"The task of {row['instance_id']} has no parts `## Issue` and `## Repository`.",
                       "Shorten only rows that labkit.tasks.rollouts made.")
    first = [{"role": "system", "content": SHORT_SYSTEM}, {"role": "user", "content": f"{row['repo']}: {issue}"}]
    return first + row["messages"][2:]


@dataclass(frozen=True)
class Facts:
    """What can be said of a made-up repository: its file list, files, and a line or sentence for each function."""

    name: str
    statements: tuple[str, ...]

    @classmethod
    def draw(cls, rng: random.Random) -> "Facts":
        """A repository that exists only as text."""
        functions = drafts(rng)
        paths, broken = sorted({function.path for function in functions}), rng.choice(functions)
        texts = {path: module_text(path, functions, broken) for path in paths}
        said = ["\n".join(paths) + "\n", *texts.values()]
        for function in functions:
            head, body = function.wrong if function is broken else function.right
            name, line = head[4:].split("(")[0], texts[function.path].split("\n").index(head) + 1
            said += [f"{function.path}:{line}:{head}\n", f"`{name}` in {function.path}: {body.strip()}\n"]
        return cls(f"{rng.choice(OWNERS)}/{rng.choice(NAMES)}\n", tuple(said))

    def text(self, rng: random.Random, characters: int) -> str:
        """Statements drawn with replacement: what comes again can be copied."""
        parts = [self.name]
        while sum(map(len, parts)) < characters:
            parts.append(rng.choice(self.statements) + "\n")
        return "".join(parts)


def repository_windows(chat: ChatTokenizer, batch: int, seed: int, step: int) -> Tensor:
    """Token windows [batch, WINDOW], each about one repository: a pure function of (seed, step)."""
    rows = []
    for number in range(batch):
        rng = random.Random(f"{seed} {step} {number}")
        rows.append(chat.text.encode(Facts.draw(rng).text(rng, 6 * WINDOW))[:WINDOW])
    return torch.tensor(rows)


def train_base(model: GPT, chat: ChatTokenizer, settings: TrainSettings = BASE_SETTINGS) -> History:
    """Next-token training on repositories' text."""
    def loss_at(model: GPT, step: int) -> Tensor:
        windows_BT = repository_windows(chat, settings.batch, settings.seed, step).to(model.embedding.weight.device)
        return next_token_loss(model(windows_BT[:, :-1]), windows_BT[:, 1:])

    return train(model, loss_at, settings, label="trace-base")
