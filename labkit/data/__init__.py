"""Text in, token batches out: corpora, tokenizers, windows, packing, a synthetic language, agent traces, and checks of
integrity."""

from labkit.data.batches import generator_for, random_windows, tokens_of
from labkit.data.chats import ChatTokenizer, first_fit, pack_chats
from labkit.data.corpora import CORPORA, Corpus, Document, load_corpus, parity, translations
from labkit.data.near_duplicates import jaccard, keep_first, shingles, signatures, words
from labkit.data.packing import pack_documents
from labkit.data.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, bits_per_byte, load_tokenizer
from labkit.data.topic_language import TopicLanguage
from labkit.data.trajectories import SCHEMA, load_trajectories, validate, write_trajectories
from labkit.data.trajectory_survey import Survey, contamination, survey

__all__ = ["CORPORA", "SCHEMA", "BPETokenizer", "ByteTokenizer", "ChatTokenizer", "Corpus", "Document", "Survey",
           "Tokenizer", "TopicLanguage", "bits_per_byte", "contamination", "first_fit", "generator_for", "jaccard",
           "keep_first", "load_corpus", "load_tokenizer", "load_trajectories", "pack_chats", "pack_documents", "parity",
           "random_windows", "shingles", "signatures", "survey", "tokens_of", "translations", "validate", "words",
           "write_trajectories"]
