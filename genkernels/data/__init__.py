"""Text into tokens: reading, cleaning, the held-out split, tokenizers and batches."""

from .batches import Batches, CropBatches
from .errors import InputError, errors_in
from .streams import batchify, sequence_batches
from .text import DEFAULT_CORPUS, Corpus, clean_text, load_text, split_text
from .tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "DEFAULT_CORPUS",
    "BPETokenizer",
    "Batches",
    "ByteTokenizer",
    "Corpus",
    "CropBatches",
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
