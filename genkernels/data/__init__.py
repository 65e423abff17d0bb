"""Text, tables, images and sound: reading, cleaning, the held-out split, tokenizers and batches."""

from .audio import (
    MELODY,
    AudioTokenizer,
    is_audio,
    load_audio,
    load_audio_folder,
    melody,
    mu_law_decode,
    mu_law_encode,
    save_audio,
)
from .batches import Batches, CropBatches, RowBatches, windows_of
from .dates import date_pairs, split_date_pairs
from .errors import InputError, errors_in
from .files import Errors, check_kind, replace_file
from .images import (
    IMAGE_SETS,
    ImageSet,
    denormalize_images,
    load_image_set,
    load_images,
    normalize_images,
    save_grid,
    split_images,
)
from .masking import (
    LabelledBatches,
    MaskedBatches,
    SpecialTokens,
    framed,
    mask_tokens,
    masked_windows,
)
from .pairs import PairBatches, load_pairs
from .series import PROCESSES, AutoRegression, Process, Sinusoid, synthetic_series
from .spans import SpanBatches, TextToTextTokens, corrupt_spans, corrupted_windows
from .special import (
    MASK,
    encode_masked,
    encode_source,
    spell,
    spell_answer,
    spell_masked,
)
from .streams import SequenceBatches, batchify, sequence_batches
from .table import Table, load_table
from .text import (
    DATES,
    DEFAULT_CORPUS,
    Corpus,
    TextCleaner,
    TextStream,
    clean_text,
    load_text,
    split_text,
)
from .token_file import load_tokens, write_tokens
from .tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "DATES",
    "DEFAULT_CORPUS",
    "IMAGE_SETS",
    "MASK",
    "MELODY",
    "PROCESSES",
    "AudioTokenizer",
    "AutoRegression",
    "BPETokenizer",
    "Batches",
    "ByteTokenizer",
    "Corpus",
    "CropBatches",
    "Errors",
    "ImageSet",
    "InputError",
    "LabelledBatches",
    "MaskedBatches",
    "PairBatches",
    "Process",
    "RowBatches",
    "SequenceBatches",
    "Sinusoid",
    "SpanBatches",
    "SpecialTokens",
    "Table",
    "TextCleaner",
    "TextStream",
    "TextToTextTokens",
    "Tokenizer",
    "batchify",
    "check_kind",
    "clean_text",
    "corrupt_spans",
    "corrupted_windows",
    "date_pairs",
    "denormalize_images",
    "encode_masked",
    "encode_source",
    "errors_in",
    "framed",
    "is_audio",
    "load_audio",
    "load_audio_folder",
    "load_image_set",
    "load_images",
    "load_pairs",
    "load_table",
    "load_text",
    "load_tokenizer",
    "load_tokens",
    "mask_tokens",
    "masked_windows",
    "melody",
    "mu_law_decode",
    "mu_law_encode",
    "normalize_images",
    "replace_file",
    "save_audio",
    "save_grid",
    "sequence_batches",
    "spell",
    "spell_answer",
    "spell_masked",
    "split_date_pairs",
    "split_images",
    "split_text",
    "synthetic_series",
    "train_tokenizer",
    "windows_of",
    "write_tokens",
]
