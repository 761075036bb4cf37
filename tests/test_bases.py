"""The shipped base models are what their manifest says: bytes, shape, and bits per byte."""

import math
import shutil

import pytest
import torch

from labkit.data import ByteTokenizer, load_corpus, tokens_of
from labkit.errors import LabError
from labkit.models import GPT, GPTConfig
from labkit.trainers.bases import BASES, FOLDER, bits_per_byte_of, load_base, recipe


@pytest.mark.parametrize("name", BASES)
def test_every_base_loads_and_knows_english(name):
    """Each model has the parameters its manifest states and finds English far likelier than the same words shuffled."""
    base = load_base(name)
    assert base.model.count_parameters() == base.facts["parameters"] and base.model.config == recipe(name)[0]
    text = "The state of the Union is strong, and the people of the United States have made it so."
    words = text.split()
    scores = [sequence_loss(base, sentence) for sentence in (text, " ".join(words[::-1]))]
    assert scores[0] < scores[1] - 0.3


def sequence_loss(base, text):
    """Nats a token of one sentence."""
    tokens_1T = torch.tensor([[base.tokenizer.end, *base.tokenizer.encode(text)]])
    with torch.no_grad():
        logits_TV = base.model(tokens_1T[:, :-1])[0]
    return float(torch.nn.functional.cross_entropy(logits_TV, tokens_1T[0, 1:]))


def test_stated_bits_per_byte_are_measured():
    """The smallest byte model, measured again on both held-out texts, gives the manifest's numbers."""
    base = load_base("sotu-byte-0.1M")
    for corpus in ("sotu", "web-bible"):
        text_bytes = sum(len(document.text.encode("utf-8")) for document in load_corpus(corpus).split()[1])
        measured = bits_per_byte_of(base.model, tokens_of(corpus, base.tokenizer, "held_out"), text_bytes)
        assert measured == pytest.approx(base.facts["bits_per_byte"][corpus], abs=2e-4)


def test_bits_per_byte_of_a_uniform_model():
    """A model with equal logits needs log2(V) bits a token, whatever the text: the unit is right."""
    model = GPT(GPTConfig(257, 16, 8, 1, 1))
    torch.nn.init.zeros_(model.embedding.weight)
    tokens = torch.tensor(ByteTokenizer().encode("abcdefgh" * 40))
    assert bits_per_byte_of(model, tokens, len(tokens)) == pytest.approx(math.log2(257), rel=1e-3)
    assert bits_per_byte_of(model, tokens, 2 * len(tokens)) == pytest.approx(math.log2(257) / 2, rel=1e-3)


def test_unknown_missing_or_altered_bases_are_refused(tmp_path):
    """Each of the three gets a sentence with the command that mends it."""
    with pytest.raises(LabError, match="no base model"):
        load_base("sotu-word-9M")
    folder = tmp_path / "checkpoints"
    shutil.copytree(FOLDER, folder)
    path = folder / "sotu-byte-0.1M.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(LabError, match="was altered"):
        load_base("sotu-byte-0.1M", folder)
    path.unlink()
    with pytest.raises(LabError, match="is missing"):
        load_base("sotu-byte-0.1M", folder)
