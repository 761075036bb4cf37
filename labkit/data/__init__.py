"""Text in, token batches out: corpora, tokenizers, windows, packing, a synthetic language, and checks of integrity."""

from labkit.data.batches import generator_for, random_windows, tokens_of
from labkit.data.corpora import CORPORA, Corpus, Document, load_corpus, parity, translations
from labkit.data.packing import pack_documents
from labkit.data.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, bits_per_byte, load_tokenizer
from labkit.data.topic_language import TopicLanguage

__all__ = ["CORPORA", "BPETokenizer", "ByteTokenizer", "Corpus", "Document", "Tokenizer", "TopicLanguage",
           "bits_per_byte", "generator_for", "load_corpus", "load_tokenizer", "pack_documents", "parity",
           "random_windows", "tokens_of", "translations"]
