"""Text to token ids and back: bytes, and byte-level byte-pair encoding (BPE).

BPE (Sennrich et al., arXiv 1508.07909) starts from the 256 bytes and merges the most frequent neighbouring pair until
the vocabulary is full. The training and the encoding are Hugging Face `tokenizers`; this file adds what a language
model needs: an end-of-text id that no text can produce. It is the last id and is unknown to the encoder, so a
document that holds the characters "<|end|>" stays text.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from labkit.data.corpora import checked_file
from labkit.errors import LabError
from labkit.files import DATA, whole_file

FOLDER = DATA / "tokenizers"
# No word of GPT-2's splitting holds a space after something else: cutting a text there before encoding changes nothing.
WORD_BORDER = re.compile(r"(?<=\S)(?=[ \n\t])")
SHIPPED = ("sotu-bpe-1024", "sotu-bpe-2048", "sotu-bpe-4096")


class Tokenizer(Protocol):
    """What the rest of labkit asks of a tokenizer. `fingerprint` identifies it in cache keys."""

    name: str
    vocab_size: int
    end: int
    fingerprint: str

    def encode(self, text: str) -> list[int]: ...
    def encode_many(self, texts: Iterable[str]) -> Iterator[list[int]]: ...
    def decode(self, tokens: Iterable[int]) -> str: ...
    def bytes_per_token(self, text: str) -> float: ...


class _Shared:
    def encode_many(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """One list of ids for each text, one text at a time."""
        return map(self.encode, texts)

    def bytes_per_token(self, text: str) -> float:
        """UTF-8 bytes of `text` divided by its tokens (the end token isn't counted)."""
        tokens = len(self.encode(text))
        if not tokens:
            raise LabError("An empty text has no bytes per token.", "Give a text with at least one character.")
        return len(text.encode("utf-8")) / tokens


class ByteTokenizer(_Shared):
    """UTF-8 bytes as they are: ids 0 to 255, and 256 for the end of a text."""

    name, fingerprint = "byte", "byte"
    end, vocab_size = 256, 257

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`, without an end token."""
        return list(text.encode("utf-8"))

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the ids; the end token adds nothing, and bytes that aren't UTF-8 become U+FFFD."""
        return bytes(token for token in tokens if token != self.end).decode("utf-8", errors="replace")


class BPETokenizer(_Shared):
    """Byte-level BPE with `vocab_size` ids: 256 bytes, the merges, and the end token as the last id."""

    def __init__(self, encoder: HuggingFaceTokenizer, name: str = "bpe"):
        self._encoder, self.name = encoder, name
        self.end = encoder.get_vocab_size()
        self.vocab_size = self.end + 1
        self.fingerprint = hashlib.sha256(encoder.to_str().encode("utf-8")).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, name: str = "bpe") -> "BPETokenizer":
        """Learn the merges from `texts`. Deterministic: equal texts give equal files.

        Words are split as in GPT-2 before merging (no prefix space), so no merge crosses a word. Raises LabError
        where `vocab_size` leaves no room for a merge or the texts hold too few different pairs to fill it.
        """
        if vocab_size < 258:
            raise LabError(f"A vocabulary of {vocab_size} has no room for a merge.",
                           "Use 258 or more: 256 bytes, the end of text, and a merge.")
        encoder = HuggingFaceTokenizer(models.BPE())
        encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        encoder.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, special_tokens=[], show_progress=False,
                                      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
        encoder.train_from_iterator(texts, trainer)
        tokenizer = cls(encoder, name)
        if tokenizer.vocab_size != vocab_size:
            raise LabError(f"These texts give only {tokenizer.vocab_size} tokens, not {vocab_size}.",
                           f"Use more text, or a vocabulary of at most {tokenizer.vocab_size}.")
        return tokenizer

    @classmethod
    def load(cls, path: Path) -> "BPETokenizer":
        """Read a file that `save` wrote; its name without ending becomes the tokenizer's name."""
        path = Path(path)
        if not path.is_file():
            raise LabError(f"There is no tokenizer file {path}.", "Check the path, or use BPETokenizer.train.")
        try:
            return cls(HuggingFaceTokenizer.from_file(str(path)), path.stem)
        except Exception as error:  # the library raises a bare Exception for whatever it can't parse
            raise LabError(f"The tokenizer file {path} can't be read: {error}.",
                           "Restore it from its source, or train it again.") from None

    def save(self, path: Path) -> None:
        """Write the vocabulary and merges as JSON, whole or not at all."""
        with whole_file(path) as temporary:
            temporary.write_text(self._encoder.to_str(), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end token; never the end token, whatever the text says."""
        return self._encoder.encode(text).ids

    def encode_many(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """What `encode` gives for each text, three to five times faster: each different word is encoded once."""
        known: dict[str, list[int]] = {}
        for text in texts:
            words = WORD_BORDER.split(text)
            new = [word for word in dict.fromkeys(words) if word not in known]
            known.update(zip(new, (encoding.ids for encoding in self._encoder.encode_batch(new)), strict=True))
            yield list(chain.from_iterable(map(known.__getitem__, words)))

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the ids; the end token adds nothing, and bytes that aren't UTF-8 become U+FFFD."""
        return self._encoder.decode([token for token in tokens if token != self.end])


def load_tokenizer(name: str, folder: Path = FOLDER) -> Tokenizer:
    """"byte", or a BPE shipped with the course ("sotu-bpe-1024", ...), after checking its sha256."""
    if name == "byte":
        return ByteTokenizer()
    if name not in SHIPPED:
        raise LabError(f"There is no tokenizer {name!r}.", f"The tokenizers are: byte, {', '.join(SHIPPED)}.")
    return BPETokenizer.load(checked_file(name, folder))


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Loss in a unit that tokenizers share: bits per byte = nats per token / (ln 2 · bytes per token)."""
    return nats_per_token / (math.log(2) * bytes_per_token)
