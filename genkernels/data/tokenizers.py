"""Tokenizers: bytes as they are, or byte-level BPE learned from a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .audio import AudioTokenizer
from .errors import InputError


class Tokenizer(Protocol):
    """What a model needs to know about a tokenizer.

    `byte_lengths` is int64 [vocab_size], the UTF-8 bytes that each token stands for: bits per byte
    are counted over them, so that models with different tokenizers can be compared.
    """

    name: str
    vocab_size: int
    byte_lengths: Tensor

    def encode(self, text: str) -> Tensor:
        """Return the token ids of `text`, int64 [N]."""

    def decode(self, tokens: Tensor) -> str:
        """Return the text of the token ids [N]; bytes that are not UTF-8 become U+FFFD."""

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` needs into `folder`."""


class ByteTokenizer:
    """One token a byte of UTF-8: 256 ids, nothing to learn, no unknown tokens."""

    name = "bytes"
    vocab_size = 256
    byte_lengths = torch.ones(256, dtype=torch.int64)

    def encode(self, text: str) -> Tensor:
        data = bytearray(text.encode())  # frombuffer refuses none
        return (torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0)).long()

    def decode(self, tokens: Tensor) -> str:
        return bytes(tokens.tolist()).decode(errors="replace")

    def save(self, folder: Path) -> None:
        pass


class BPETokenizer:
    """Byte-level byte pair encoding (as in GPT-2) by the library `tokenizers`.

    All 256 bytes are in the vocabulary, so every text can be encoded and decodes to itself.
    """

    name = "bpe"
    file = "tokenizer.json"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        # Byte-level BPE spells a token with one character for each of its bytes.
        spellings = (tokenizer.id_to_token(token) for token in range(self.vocab_size))
        self.byte_lengths = torch.tensor([len(spelling) for spelling in spellings])

    @classmethod
    def train(cls, text: str, vocab_size: int) -> BPETokenizer:
        """Learn at most `vocab_size` tokens (at least 256) from `text`."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([text], trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, folder: Path) -> BPETokenizer:
        from tokenizers import Tokenizer

        path = folder / cls.file
        try:
            return cls(Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except Exception as error:  # `tokenizers` raises bare Exception
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: not a tokenizer file ({reason})") from error

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self._tokenizer.encode(text).ids, dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        return self._tokenizer.decode(tokens.tolist())

    def save(self, folder: Path) -> None:
        (folder / self.file).write_text(self._tokenizer.to_str(), encoding="utf-8")


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Return a tokenizer of at most `vocab_size` tokens: 256 is bytes, more is BPE of `text`."""
    return ByteTokenizer() if vocab_size == 256 else BPETokenizer.train(text, vocab_size)


def load_tokenizer(name: str, folder: Path) -> Tokenizer | AudioTokenizer:
    """Return the tokenizer `name` that `Tokenizer.save` left in `folder`."""
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    if name == BPETokenizer.name:
        return BPETokenizer.load(folder)
    if name == AudioTokenizer.name:
        return AudioTokenizer.load(folder)
    raise InputError(f"{folder}: unknown tokenizer {name!r}; expected bytes, bpe or mu-law")
