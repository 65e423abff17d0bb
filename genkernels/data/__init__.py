"""Text into tokens: reading, cleaning, the held-out split, tokenizers and batches."""

from .errors import InputError, errors_in
from .streams import batchify, sequence_batches
from .text import DEFAULT_CORPUS, Corpus, clean_text, load_text, split_text
from .tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "DEFAULT_CORPUS",
    "BPETokenizer",
    "ByteTokenizer",
    "Corpus",
    "InputError",
    "Tokenizer",
    "batchify",
    "clean_text",
    "errors_in",
    "load_text",
    "load_tokenizer",
    "sequence_batches",
    "split_text",
    "train_tokenizer",
]
