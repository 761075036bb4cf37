"""Tokens of a corpus, windows that depend on (seed, step) alone, and packing that loses nothing."""

import multiprocessing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.data import (
    ByteTokenizer,
    Corpus,
    Document,
    batches,
    load_corpus,
    load_tokenizer,
    pack_documents,
    random_windows,
    tokens_of,
)
from labkit.data.packing import PADDING
from labkit.errors import LabError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_tokens_are_documents_each_with_an_end(cache):
    """Cut at the end tokens, the row gives back exactly the split's documents, in order, and nothing of the other
    side."""
    corpus, tokenizer = load_corpus("gnome-help-10script"), ByteTokenizer()
    for split, documents in zip(("train", "held_out"), corpus.split(), strict=True):
        row = tokens_of("gnome-help-10script", tokenizer, split)
        assert row.dtype == torch.long and row[-1] == tokenizer.end
        ends = (row == tokenizer.end).nonzero().flatten().tolist()
        pieces = [row[start:stop].tolist() for start, stop in zip([0, *(end + 1 for end in ends)], ends, strict=False)]
        assert [tokenizer.decode(piece) for piece in pieces] == [document.text for document in documents]


def test_cache_gives_the_same_tokens_without_encoding_again(cache, monkeypatch):
    """The second call must read the file: with the encoder broken it still answers, and equally."""
    tokenizer = load_tokenizer("sotu-bpe-1024")
    first = tokens_of("udhr", tokenizer, "held_out")
    monkeypatch.setattr(batches, "_encode", None)
    assert torch.equal(tokens_of("udhr", tokenizer, "held_out"), first)
    with pytest.raises(TypeError):
        tokens_of("udhr", tokenizer, "held_out", cache=False)


def test_cache_tells_corpus_tokenizer_and_split_apart(cache):
    """Four different requests make four files; none may answer for another."""
    small = [Corpus("same name", [Document(text), Document(text * 2)], f"digest of {text}") for text in ("one", "two")]
    rows = [tokens_of(corpus, ByteTokenizer(), split).tolist() for corpus in small for split in ("train", "held_out")]
    assert len({tuple(row) for row in rows}) == 4 == len(list(cache.iterdir()))
    assert tokens_of(small[0], load_tokenizer("sotu-bpe-1024"), "train").max() == 1023


@pytest.mark.parametrize("damage", [lambda b: b[:50], lambda b: b"", lambda b: b[:300] + bytes([b[300] ^ 4]) + b[301:]])
def test_damaged_cache_file_is_made_again(cache, damage):
    """A cut file, an empty one, or one flipped bit must not reach a training run, nor stop it."""
    first = tokens_of("udhr", ByteTokenizer())
    path = next(cache.iterdir())
    path.write_bytes(damage(path.read_bytes()))
    assert torch.equal(tokens_of("udhr", ByteTokenizer()), first)
    assert torch.equal(tokens_of("udhr", ByteTokenizer()), first) and len(list(cache.iterdir())) == 1


def _ask(folder, queue):
    batches.CACHE = folder
    queue.put(int(tokens_of("udhr", ByteTokenizer()).numpy().sum()))  # torch's threads don't survive a fork


def test_two_processes_may_fill_the_cache_together(cache):
    """Both start without a file and both get the right tokens; one whole file and no remains are left."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_ask, args=(cache, queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    sums = {queue.get(timeout=30) for _ in workers}
    for worker in workers:
        worker.join()
    assert sums == {int(tokens_of("udhr", ByteTokenizer(), cache=False).sum())} and len(list(cache.iterdir())) == 1


def test_unknown_split():
    """"test" is a natural guess; the answer names the two splits."""
    with pytest.raises(LabError, match="train, held_out"):
        tokens_of("udhr", ByteTokenizer(), "test")


@settings(deadline=None, max_examples=50)
@given(size=st.integers(1, 60), length=st.integers(1, 60), seed=st.integers(0, 2**64), step=st.integers(0, 2**40))
def test_windows_are_neighbouring_tokens_and_a_pure_function(size, length, seed, step):
    """Over the tokens 0, 1, 2, … a window is a run of consecutive numbers; it is the same whatever torch drew
    before."""
    if length > size:
        with pytest.raises(LabError, match="doesn't fit"):
            random_windows(torch.arange(size), batch=3, length=length, seed=seed, step=step)
        return
    first = random_windows(torch.arange(size), batch=3, length=length, seed=seed, step=step)
    torch.rand(3)
    assert first.shape == (3, length) and first.dtype == torch.long
    assert torch.equal(first, first[:, :1] + torch.arange(length)) and 0 <= first.min() and first.max() < size
    assert torch.equal(first, random_windows(torch.arange(size), batch=3, length=length, seed=seed, step=step))


def test_windows_reach_both_ends_uniformly():
    """5 possible starts, 20,000 draws: each start's share is 0.2 within 5 standard errors (0.0028 each)."""
    start = random_windows(torch.arange(8), batch=20_000, length=4, seed=0, step=0)[:, 0]
    share = start.bincount(minlength=5) / 20_000
    assert len(share) == 5 and (share - 0.2).abs().max() < 5 * 0.0029


def test_neighbouring_seeds_and_steps_do_not_collide():
    """seed + step or any other sum would give (0, 1) and (1, 0) the same batch; 3,000 pairs must give 3,000 batches."""
    tokens, seeds = torch.arange(250_000), [*range(50), *(2**32 * k for k in range(1, 51))]
    rows = {tuple(random_windows(tokens, batch=4, length=1, seed=seed, step=step).flatten().tolist())
            for seed in seeds for step in range(30)}
    assert len(rows) == 3000


documents = st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=8)


@settings(deadline=None, max_examples=200)
@given(parts=documents, length=st.integers(1, 16))
def test_packing_loses_nothing_and_marks_every_border(parts, length):
    """Reading the rows by document id gives back each document with its end; ids rise by one after each end, nowhere
    else."""
    end = 10
    token_BT, document_BT = pack_documents([torch.tensor(part, dtype=torch.long) for part in parts], length, end)
    assert token_BT.shape == document_BT.shape and token_BT.shape[1] == length
    token_M, document_M = token_BT.flatten(), document_BT.flatten()
    for index, part in enumerate(parts):
        assert token_M[document_M == index].tolist() == [*part, end]
    padding_M = document_M == PADDING
    real = len(document_M) - int(padding_M.sum())
    assert padding_M[real:].all() and (token_M[real:] == end).all() and len(padding_M) - real < length
    assert torch.equal(document_M[1:real] - document_M[: real - 1], (token_M[: real - 1] == end).long())


def test_packing_refuses_nothing_to_pack():
    """No documents, or rows of no length, is an error of the caller's data, said plainly."""
    with pytest.raises(LabError, match="can't be packed"):
        pack_documents([], 8, 0)
    with pytest.raises(LabError, match="can't be packed"):
        pack_documents([torch.arange(3)], 0, 0)
