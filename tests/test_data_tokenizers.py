"""Tokenizers give back what they were given, and no text can produce the end token."""

import math
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.data import BPETokenizer, ByteTokenizer, bits_per_byte, load_corpus, load_tokenizer
from labkit.data.tokenizers import FOLDER, SHIPPED
from labkit.errors import LabError

NAMES = ("byte", *SHIPPED)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=80)
pieces = [*"ab'sé漢7,.;(_ \n\t\r\u00a0\u2028\u0085\x1c", "ll", "  ", "<|end|>"]
wordy = st.lists(st.sampled_from(pieces), max_size=40).map("".join)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=60)
@given(text=texts | wordy)
def test_round_trip_and_end_token(name, text):
    """decode(encode(text)) is text for any Unicode; ids stay below the end token, which is the last id and decodes to
    nothing."""
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, tokenizer.end]) == text
    assert all(0 <= token < tokenizer.end for token in ids) and tokenizer.end == tokenizer.vocab_size - 1


@pytest.mark.parametrize("name", NAMES)
def test_a_written_end_token_stays_text(name):
    """A document may talk about "<|end|>" or "<|endoftext|>" without ending itself."""
    tokenizer = load_tokenizer(name)
    for written in ("<|end|>", "a <|endoftext|> b", "</s>"):
        ids = tokenizer.encode(written)
        assert tokenizer.end not in ids and tokenizer.decode(ids) == written


@pytest.fixture(scope="module")
def spacious():
    """A BPE with merges of runs of spaces and lines, which the shipped ones lack: any wrong cut shows in its ids."""
    words = ["a", "7;", "漢", "ab's", "é(", "_ll"]
    spaces = [" ", "  ", "   ", "\n", "\n\n", "\n\t\t", "\t", " \n ", "\r\n"]
    return BPETokenizer.train([word + space for word in words for space in spaces for _ in range(20)], 270)


@settings(deadline=None, max_examples=200)
@given(text=wordy | texts)
def test_many_at_once_equals_one_by_one(spacious, text):
    """encode_many cuts texts at spaces to encode each word once; the ids must be those of the whole text."""
    for tokenizer in (spacious, load_tokenizer("sotu-bpe-1024")):
        both = [text, text + " the end"]
        assert list(tokenizer.encode_many(both)) == [tokenizer.encode(one) for one in both]


def test_many_at_once_equals_one_by_one_on_real_text():
    """The same on real addresses, with their dashes, quotes and numbers."""
    tokenizer = load_tokenizer("sotu-bpe-4096")
    speeches = [document.text[:20_000] for document in load_corpus("sotu").documents[::20]]
    assert list(tokenizer.encode_many(speeches)) == [tokenizer.encode(text) for text in speeches]


def test_training_is_deterministic_and_first_merge_is_the_most_frequent_pair(tmp_path):
    """Equal texts give equal files; in "ab ab ab" the first merge can only be a+b; encoding uses it."""
    training = ["ab ab ab cab ", "ab abc the then there"] * 3
    one, two = (BPETokenizer.train(training, 262) for _ in range(2))
    assert one.fingerprint == two.fingerprint and one.vocab_size == 262
    assert len(one.encode("ab")) == 1 and len(one.encode("ba")) == 2
    one.save(tmp_path / "small.json")
    loaded = BPETokenizer.load(tmp_path / "small.json")
    assert (loaded.fingerprint, loaded.name) == (one.fingerprint, "small")
    assert loaded.encode("cab then") == one.encode("cab then")
    assert loaded.decode(loaded.encode("<|end|>")) == "<|end|>" and loaded.end == 261 not in loaded.encode("<|end|>")


def test_no_prefix_space():
    """The first word has no space before it: a byte more or less at the start of a text changes bits per byte."""
    tokenizer = load_tokenizer("sotu-bpe-1024")
    assert tokenizer.decode(tokenizer.encode("the")) == "the" and tokenizer.encode("the") != tokenizer.encode(" the")


@pytest.mark.parametrize("size", [1024, 2048, 4096])
def test_shipped_vocabularies(size):
    """Sizes as named, and bytes per token on held-out text as SOURCES.md says."""
    tokenizer = load_tokenizer(f"sotu-bpe-{size}")
    held_out = [document.text for document in load_corpus("sotu").split()[1]]
    assert tokenizer.vocab_size == size
    count, total = sum(map(len, tokenizer.encode_many(held_out))), sum(len(text.encode()) for text in held_out)
    assert total / count == pytest.approx({1024: 2.98, 2048: 3.66, 4096: 4.32}[size], abs=0.01)


def test_bytes_per_token_counts_bytes_not_characters():
    """"é" is two bytes: one token a byte gives 1 for bytes whatever the script. An empty text has no ratio."""
    assert ByteTokenizer().bytes_per_token("naïve 漢字") == 1
    with pytest.raises(LabError, match="empty text"):
        ByteTokenizer().bytes_per_token("")


def test_bits_per_byte():
    """A uniform guess over 256 bytes costs ln 256 nats a token = 8 bits a byte; twice the bytes a token halve it."""
    assert bits_per_byte(math.log(256), 1) == pytest.approx(8)
    assert bits_per_byte(math.log(256), 2) == pytest.approx(4)


def test_unfinished_bytes_decode_to_a_replacement():
    """A model may stop inside a character: that shows as U+FFFD, not as an exception."""
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"
    tokenizer = load_tokenizer("sotu-bpe-1024")
    assert "\ufffd" in tokenizer.decode(tokenizer.encode("é")[:1])


@pytest.mark.parametrize("size", [200, 257, 100_000])
def test_impossible_vocabulary_is_refused(size):
    """Too small for one merge, or too large for the text: both are said before a model is built on it."""
    with pytest.raises(LabError, match=r"no room|give only"):
        BPETokenizer.train(["a short text"], size)


@pytest.mark.parametrize("kind", ["missing", "altered"])
def test_damaged_shipped_tokenizer(kind, tmp_path):
    """One changed byte is noticed by sha256 and answered with the commands that mend it."""
    shutil.copytree(FOLDER, tmp_path / "tokenizers")
    path = tmp_path / "tokenizers" / "sotu-bpe-1024.json"
    path.unlink() if kind == "missing" else path.write_bytes(path.read_bytes().replace(b"the", b"teh", 1))
    with pytest.raises(LabError, match=r"sotu-bpe-1024.json.*git checkout -- data/tokenizers/sotu-bpe-1024.json"):
        load_tokenizer("sotu-bpe-1024", tmp_path / "tokenizers")


def test_unreadable_file_and_unknown_name(tmp_path):
    """Every way to ask for a tokenizer that isn't there ends in one sentence."""
    (tmp_path / "cut.json").write_text('{"version": "1.0", "model": {')
    with pytest.raises(LabError, match="can't be read"):
        BPETokenizer.load(tmp_path / "cut.json")
    with pytest.raises(LabError, match="no tokenizer file"):
        BPETokenizer.load(tmp_path / "none.json")
    with pytest.raises(LabError, match="byte, sotu-bpe-1024"):
        load_tokenizer("gpt2")
