"""The parallel corpora under a tokenizer: BPE gives every language back, and what is compared is the same text."""

import pytest

from labkit.data import BPETokenizer, ByteTokenizer, load_corpus
from labkit.data.corpora import parity, translations

HELP, RIGHTS = load_corpus("gnome-help-10script"), load_corpus("udhr")
LANGUAGES = {"gnome-help-9lang": 9, "gnome-help-10script": 10, "udhr": 24}


@pytest.fixture(scope="module")
def tokenizers():
    """Bytes, a BPE that has seen all ten languages, and one that has seen English only."""
    texts = {code: [document.meta[code] for document in HELP.documents[:60]] for code in translations(HELP)}
    return [ByteTokenizer(), BPETokenizer.train([text for each in texts.values() for text in each], 800),
            BPETokenizer.train(texts["en"], 500)]


@pytest.mark.parametrize("corpus", [HELP, RIGHTS], ids=lambda corpus: corpus.name)
def test_every_language_comes_back(corpus, tokenizers):
    """decode(encode(text)) is the text in each language, seen in training or not: a byte-level tokenizer knows no
    unknown characters. A token never holds less than a byte."""
    for code in translations(corpus):
        for document in corpus.documents[:40]:
            for tokenizer in tokenizers:
                ids = tokenizer.encode(document.meta[code])
                assert tokenizer.decode(ids) == document.meta[code], (code, tokenizer.name)
                assert len(ids) <= len(document.meta[code].encode())


@pytest.mark.parametrize(("name", "count"), LANGUAGES.items())
def test_all_languages_are_found(name, count):
    """As many languages as data/SOURCES.md says, English first; page and number are no languages."""
    codes = translations(load_corpus(name))
    assert len(codes) == count and codes[0] == "en" and not {"page", "i", "article"} & set(codes)


def test_parity_is_a_ratio_of_bytes_of_the_same_text():
    """1 for English; by hand for one language; a document without a translation counts on neither side (Amharic has no
    preamble); Georgian and Tamil take about three bytes where English takes one."""
    both = [(document.meta["ru"].encode(), document.meta["en"].encode()) for document in HELP.documents]
    assert parity(HELP, "en") == 1
    assert parity(HELP, "ru") == sum(len(own) for own, _ in both) / sum(len(english) for _, english in both)
    assert 1.7 < parity(RIGHTS, "am") < 2.1 and 2.9 < parity(RIGHTS, "ka") < 3.6 and 2.9 < parity(RIGHTS, "ta") < 3.6
