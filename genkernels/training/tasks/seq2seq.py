"""A recurrent encoder-decoder: answers to sources."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from ...data import DATES
from ...models import Seq2Seq
from ..presets import SEQ2SEQ_PRESETS
from .pairs import PairsTask


class Seq2SeqTask(PairsTask):
    """The target of a source; of dates in words their form in ISO 8601, where no file is given."""

    model_class = Seq2Seq
    presets = SEQ2SEQ_PRESETS
    tiny: ClassVar = {
        "vocab_size": 260,
        "embedding_dim": 8,
        "hidden_size": 16,
        "num_layers": 1,
        "batch_size": 4,
        "sequence_length": 16,
    }
    kernel = "gru"
    temperature = 0
    default = Path(DATES)
