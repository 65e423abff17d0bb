"""A text larger than memory: its tokens in a file that is mapped, not read."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .errors import InputError
from .files import replace_file
from .text import TextCleaner, not_utf8
from .tokenizers import ByteTokenizer, Tokenizer

_FORMAT = "genkernels-tokens-1"
_DTYPES = {"uint8": torch.uint8, "uint16": torch.uint16}
_PIECE = 1 << 18  # bytes of text that are in memory at a time; their tokens take eight times that


def write_tokens(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    tokenizer: Tokenizer,
    show_progress: bool = False,
) -> None:
    """Write the tokens of a UTF-8 text file, as `tokenizer.encode(load_text(source))` has them.

    256 KiB of text are in memory at a time; with BPE also a word that is longer. `path` gets the
    tokens one after another, one byte each or, of more than 256, two, and `path` + ".json" says
    what they are. Both take the place of older ones when all is written. `show_progress` draws a
    bar on a terminal, which needs rich.

    Raises:
        InputError: no such file, not a readable file, not UTF-8 (names the byte), or no text in it.
        ValueError: a tokenizer of more than 65,536 tokens.
        OSError: the files cannot be written.
    """
    path = Path(path)
    dtype = "uint8" if tokenizer.vocab_size <= 1 << 8 else "uint16"
    if tokenizer.vocab_size > 1 << 16:
        raise ValueError(f"vocab_size must be at most 65536, got {tokenizer.vocab_size}")
    header = _header_of(path)
    count = 0
    with replace_file(header) as new_header, replace_file(path) as new_path:
        with new_path.open("wb") as file:
            for piece in _pieces(Path(source), tokenizer, show_progress):
                tokens = tokenizer.encode(piece)
                file.write(tokens.to(_DTYPES[dtype]).numpy().tobytes())
                count += len(tokens)
        description = {
            "format": _FORMAT,
            "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype,
            "count": count,
        }
        new_header.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        # The new one comes last: a reader meets tokens with their own, or none.
        header.unlink(missing_ok=True)


def load_tokens(path: str | os.PathLike[str], tokenizer: Tokenizer) -> Tensor:
    """Map what `write_tokens` wrote: uint8 or uint16 [N], of which only what is used is read.

    What is written to it stays in memory. Batches of it are int64, as of any tokens.

    Raises:
        InputError: no such file, a broken one, or tokens of another tokenizer.
    """
    path = Path(path)
    header = _read_header(_header_of(path))
    found = (header["tokenizer"], header["vocab_size"])
    expected = (tokenizer.name, tokenizer.vocab_size)
    if found != expected:
        raise InputError(
            f"{path}: tokens of {found[0]!r} with {found[1]!r} ids; "
            f"expected those of {expected[0]!r} with {expected[1]}"
        )
    dtype, count = _DTYPES[header["dtype"]], header["count"]
    try:
        size = path.stat().st_size
        path.open("rb").close()  # names the fault of a file that cannot be read
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a file of tokens") from error
    if size != count * dtype.itemsize:
        raise InputError(
            f"{path}: {size:,} bytes; expected {count * dtype.itemsize:,} by {_header_of(path)}"
        )
    return torch.from_file(str(path), shared=False, size=count, dtype=dtype)


def _header_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected that of a file of tokens") from error
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise InputError(f"{path}: not JSON ({error})") from error
    expected = {"format": [_FORMAT], "dtype": list(_DTYPES)}
    for key, values in expected.items():
        found = header.get(key) if isinstance(header, dict) else None
        if found not in values:
            raise InputError(f"{path}: {key} is {found!r}; expected {' or '.join(values)}")
    for key in ("tokenizer", "vocab_size", "count"):
        if key not in header:
            raise InputError(f"{path}: lacks {key!r}")
    if type(header["count"]) is not int or header["count"] < 1:
        raise InputError(f"{path}: count is {header['count']!r}; expected a number above 0")
    return header


def _pieces(source: Path, tokenizer: Tokenizer, show_progress: bool) -> Iterator[str]:
    """The text of a file, cleaned, in pieces whose tokens are together those of the whole."""
    has_text = False
    try:
        with _opened(source, show_progress) as file:
            pieces = _cleaned(source, file)
            if tokenizer.name != ByteTokenizer.name:
                pieces = _whole_words(pieces)
            for piece in pieces:
                has_text = has_text or (not piece.isspace() and piece != "")
                yield piece
    except OSError as error:
        raise InputError(f"{source}: {error.strerror}; expected a UTF-8 text file") from error
    if not has_text:
        raise InputError(f"{source}: no text in it; expected a UTF-8 text file")


def _opened(source: Path, show_progress: bool) -> Any:
    if not show_progress:
        return source.open("rb")
    from rich import progress
    from rich.console import Console

    console = Console()
    return progress.open(
        source,
        "rb",
        description=f"encoding {source.name}",
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


def _cleaned(source: Path, file: IO[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    cleaner = TextCleaner()
    start, is_end = 0, False
    while not is_end:
        piece = file.read(_PIECE)
        is_end = not piece
        held_back = len(decoder.getstate()[0])  # the first bytes of a character
        try:
            text = decoder.decode(piece, final=is_end)
        except UnicodeDecodeError as error:
            raise not_utf8(source, error, start - held_back) from error
        start += len(piece)
        yield cleaner.add(text)
    yield cleaner.end()


def _whole_words(pieces: Iterator[str]) -> Iterator[str]:
    """Cut a text before the white space after a word only, where byte-level BPE always does."""
    rest = ""
    for piece in pieces:
        text = rest + piece
        end = max(text.rfind(" "), text.rfind("\n"), 0)
        end = len(text[:end].rstrip())
        yield text[:end]
        rest = text[end:]
    yield rest
