"""The base models shipped with the course: small decoders trained on State of the Union addresses.

Later labs start from them, so that a quick run begins where a language model is already something. Three sizes, each
on bytes and on a BPE of 1,024; `python data/build_checkpoints.py` makes them anew. Their quality is stated in bits per
byte, the unit that tokenizers share, on held-out addresses and on a second domain, the World English Bible:

    bits per byte = (sum of -log p over all tokens, in nats) / (ln 2 * bytes of the text)
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from labkit.data import Tokenizer, bits_per_byte, load_tokenizer
from labkit.data.corpora import checked_file, read_manifest
from labkit.errors import LabError
from labkit.files import DATA
from labkit.models import GPT, GPTConfig
from labkit.objectives import next_token_loss
from labkit.trainers.checkpoint import load_model
from labkit.trainers.loop import TrainSettings

FOLDER = DATA / "checkpoints"
SHAPES = {"0.1M": (64, 2, 2), "0.3M": (96, 3, 3), "1M": (160, 3, 5)}  # width, layers, heads of size 32
TOKENIZERS = {"byte": "byte", "bpe": "sotu-bpe-1024"}
CONTEXT = 256
BASES = tuple(f"sotu-{kind}-{size}" for size in SHAPES for kind in TOKENIZERS)


@dataclass(frozen=True)
class Base:
    """A shipped model, its tokenizer, and what the manifest says of it."""

    model: GPT
    tokenizer: Tokenizer
    facts: dict


def recipe(name: str) -> tuple[GPTConfig, str, TrainSettings]:
    """Shape, tokenizer and training settings of a base model. Raises LabError for an unknown name."""
    if name not in BASES:
        raise LabError(f"There is no base model {name!r}.", f"The base models are: {', '.join(BASES)}.")
    _, kind, size = name.split("-")
    width, layers, heads = SHAPES[size]
    tokenizer = load_tokenizer(TOKENIZERS[kind])
    config = GPTConfig(tokenizer.vocab_size, CONTEXT, width, layers, heads)
    settings = TrainSettings(steps=2000 if kind == "byte" else 1500, learning_rate=4e-3 if size == "0.1M" else 3e-3,
                             batch=16, context=CONTEXT, warmup=100, decay=0.3, checkpoint_every=250)
    return config, TOKENIZERS[kind], settings


def load_base(name: str, folder: Path = FOLDER, device: torch.device | str = "cpu") -> Base:
    """A shipped base model, after checking its sha256. Raises LabError where it is unknown, missing or altered."""
    recipe(name)
    facts = read_manifest(folder).get(name)
    if facts is None:
        raise LabError(f"The base model {name} has not been made yet.",
                       f"Make it: python data/build_checkpoints.py {name}")
    return Base(load_model(checked_file(name, folder), device), load_tokenizer(facts["tokenizer"]), facts)


@torch.no_grad()
def bits_per_byte_of(model: GPT, tokens_M: Tensor, text_bytes: int, batch: int = 32) -> float:
    """Bits per byte of a whole text, read in windows of the model's context that overlap by one token.

    Every token but the first is predicted once; the tokens at the start of a window have little to go on, so this is an
    upper bound of what the model knows. The last incomplete window is left out, with its share of the bytes.
    """
    context, device = model.config.context, model.embedding.weight.device
    if len(tokens_M) <= context:
        raise LabError(f"{len(tokens_M)} tokens do not fill one window of {context}.", "Measure on a longer text.")
    windows_NT = tokens_M.unfold(0, context + 1, context)
    parts = (part.to(device) for part in windows_NT.split(batch))
    nats = sum(float(next_token_loss(model(part[:, :-1]), part[:, 1:])) * len(part) for part in parts) / len(windows_NT)
    return bits_per_byte(nats, bytes_per_token=text_bytes / len(tokens_M))
