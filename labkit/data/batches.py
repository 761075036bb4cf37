"""From a corpus to training batches: one long row of token ids, and random windows of it.

A window is drawn uniformly from all positions. Which windows step n sees depends on (seed, n) alone, never on what
was drawn before, so a run that is resumed at step n sees the batches that the uninterrupted run would have seen.
"""

import contextlib
import hashlib
import zipfile

import numpy as np
import torch
from torch import Tensor

from labkit.data.corpora import Corpus, load_corpus
from labkit.data.tokenizers import Tokenizer
from labkit.errors import LabError
from labkit.files import REPOSITORY, whole_file

CACHE = REPOSITORY / ".labkit" / "cache"
SPLITS = ("train", "held_out")
DAMAGE = (zipfile.BadZipFile, OSError, ValueError, EOFError, KeyError, RuntimeError)  # how numpy meets a damaged file


def tokens_of(corpus: str | Corpus, tokenizer: Tokenizer, split: str = "train", *, cache: bool = True) -> Tensor:
    """All tokens of one side of `Corpus.split()`: LongTensor [M], each document followed by the end token.

    `corpus` is a shipped corpus's name or a Corpus. With `cache`, the ids are kept under .labkit/cache, in a file
    named by corpus, tokenizer and split; a file that can't be read is made again.
    """
    if split not in SPLITS:
        raise LabError(f"There is no split {split!r}.", f"Use one of: {', '.join(SPLITS)}.")
    corpus = load_corpus(corpus) if isinstance(corpus, str) else corpus
    key = hashlib.sha256(f"{corpus.sha256} {tokenizer.fingerprint} {split}".encode()).hexdigest()[:24]
    path = CACHE / f"tokens-{key}.npz"
    if cache and path.is_file():
        # A damaged file is made again: it is only a cache. The zip's checksum notices even one flipped bit.
        with contextlib.suppress(*DAMAGE), open(path, "rb") as file:
            return torch.from_numpy(np.load(file)["tokens"].astype(np.int64))
    ids = _encode(corpus, tokenizer, split)
    if cache:
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, tokens=ids)
    return torch.from_numpy(ids.astype(np.int64))


def _encode(corpus: Corpus, tokenizer: Tokenizer, split: str) -> np.ndarray:
    texts = (document.text for document in corpus.split()[SPLITS.index(split)])
    kind = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    return np.concatenate([np.array([*ids, tokenizer.end], kind) for ids in tokenizer.encode_many(texts)])


def generator_for(seed: int, *stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one place of one run: its 64-bit seed is numpy's SeedSequence(seed, spawn_key=stream).

    Neighbouring seeds and streams, such as the steps of a run, give unrelated draws.
    """
    mixed = np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed))


def random_windows(tokens_M: Tensor, *, batch: int, length: int, seed: int, step: int) -> Tensor:
    """`batch` windows of `length` neighbouring tokens: [batch, length], a pure function of (seed, step).

    Starts are uniform on 0 … M - length, drawn on the CPU, so that every device sees the same windows.
    """
    if len(tokens_M) < length:
        raise LabError(f"A window of {length} tokens doesn't fit into a text of {len(tokens_M)}.",
                       "Use a shorter context or a longer text.")
    start_B = torch.randint(len(tokens_M) - length + 1, (batch,), generator=generator_for(seed, step))
    index_BT = start_B[:, None] + torch.arange(length)
    return tokens_M[index_BT.to(tokens_M.device)]
