"""A recurrent language model: the next token of a text, or of sound."""

from __future__ import annotations

from pathlib import Path

from ...data import AudioTokenizer, is_audio
from ..checkpoint import Checkpoint
from .audio import AudioTask
from .language import CausalTextTask, RecurrentTask
from .task import Task


class RNNTask(CausalTextTask, RecurrentTask):
    """The next token of a text, from all of those before it; of sound that of `AudioTask`."""

    @classmethod
    def of(cls, data: Path | None) -> type[Task]:
        return AudioTask if data and is_audio(data) else cls

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> type[Task]:
        return AudioTask if isinstance(checkpoint.tokenizer, AudioTokenizer) else cls
