"""Text corpora: reading, cleaning and the held-out split."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .dates import date_pairs
from .errors import InputError

DEFAULT_CORPUS = "pydoc_data.topics"
DATES = "dates"
_DATES = 20_000

_BYTE_ORDER_MARK = "\ufeff"
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# A shorter paragraph (a heading, "Note:", a refrain) is repeated by chance, not copied.
_SHORTEST_COPY = 64


class Corpus(NamedTuple):
    """A text cut in two: `training` to learn from, `held_out` to measure on."""

    training: str
    held_out: str


def clean_text(text: str) -> str:
    """Return `text` in one canonical form.

    Unicode normalisation form C; a leading byte order mark dropped; line ends CR LF and CR become
    LF; control characters (category Cc) other than LF and tab dropped.
    """
    text = text.removeprefix(_BYTE_ORDER_MARK)
    return _without_control(unicodedata.normalize("NFC", text))


def _without_control(text: str) -> str:
    return _CONTROL_CHARACTERS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


class TextCleaner:
    """Cleans a text that comes in pieces.

    What `add` returns, and `end` at last, is together `clean_text(all pieces)`: a character is held
    back while the next piece may change it.
    """

    def __init__(self) -> None:
        self._text = ""
        self._has_begun = False

    def add(self, text: str) -> str:
        """Take the next piece, and return what is certain now."""
        self._text = text = unicodedata.normalize("NFC", self._text + text)
        # The last character that is no accent takes up what follows; CR and LF are one line end.
        certain = len(text) - 1
        while certain > 0 and (
            unicodedata.combining(text[certain]) or text[certain - 1 : certain + 1] == "\r\n"
        ):
            certain -= 1
        return self._take(max(certain, 0))

    def end(self) -> str:
        """Return the rest."""
        return self._take(len(self._text))

    def _take(self, count: int) -> str:
        certain, self._text = self._text[:count], self._text[count:]
        if certain and not self._has_begun:
            self._has_begun = True
            certain = certain.removeprefix(_BYTE_ORDER_MARK)
        return _without_control(certain)


class TextStream:
    """Decodes and cleans a text whose tokens come a few at a time.

    What `add` returns, and `end` at last, is together `clean_text(decode(all tokens))`: a character
    is held back while the next token may be a part of it or change it.
    """

    def __init__(self, decode: Callable[[Tensor], str]) -> None:
        self._decode = decode
        self._tokens: list[Tensor] = []
        self._cleaner = TextCleaner()

    def add(self, tokens: Tensor) -> str:
        """Take the next tokens, int64 [N], and return what is certain now."""
        self._tokens.append(tokens)
        text = self._decode(torch.cat(self._tokens))
        if text.endswith("\ufffd"):  # perhaps the first bytes of a character
            return ""
        self._tokens.clear()
        return self._cleaner.add(text)

    def end(self) -> str:
        """Return the rest."""
        rest = self._decode(torch.cat(self._tokens)) if self._tokens else ""
        return self._cleaner.add(rest) + self._cleaner.end()


def load_text(path: str | os.PathLike[str] | None = None) -> str:
    """Read and clean a UTF-8 text file.

    Without a path: the text of Python's own documentation topics (`pydoc_data.topics`, about
    465 KB of English and code, in every CPython), joined in the order of the module. The path
    "dates" stands for no file but for dates of `date_pairs`, some 15,000 different ones, each a
    line of its words, a tab and its form in ISO 8601.

    Raises:
        InputError: no such file, not a readable file, not UTF-8 (names the byte), or no text in it.
    """
    if path is None:
        from pydoc_data.topics import topics

        return clean_text("\n".join(topics.values()))
    if os.fspath(path) == DATES:
        # Each date once, so that none of those that are held out is learned from.
        words_of = {date: words for words, date in date_pairs(_DATES)}
        return "\n".join(f"{words}\t{date}" for date, words in words_of.items())
    try:
        text = clean_text(Path(path).read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a UTF-8 text file") from error
    if not text.strip():
        raise InputError(f"{path}: no text in it; expected a UTF-8 text file")
    return text


def not_utf8(path: object, error: UnicodeDecodeError, start: int = 0) -> InputError:
    """Return what says so; `start` is the place in the file of the bytes that were decoded."""
    return InputError(
        f"{path}: not UTF-8 at byte {start + error.start} (0x{error.object[error.start]:02x}); "
        "expected a UTF-8 text file"
    )


def split_text(text: str, held_out: float = 0.1) -> Corpus:
    """Cut off the last `held_out` share of the characters as the held-out split.

    The tail is contiguous and the cut is made before anything is learned from the text (a
    tokenizer's vocabulary included). Paragraphs (between blank lines, of 64 characters or more)
    of the tail that stand word for word in the training part too are dropped from the held-out
    part: documentation and collections repeat themselves, and a memorised paragraph measures
    nothing.

    Raises:
        InputError: no text is left on one of the sides.
    """
    size = int(len(text) * held_out)
    cut = len(text) - size
    # Begin at a whole paragraph where one is near, else half a copy would go unnoticed.
    paragraph = text.find("\n\n", cut, cut + size // 4)
    if paragraph >= 0:
        cut = paragraph + 2
    training = text[:cut]
    known = {p.strip() for p in training.split("\n\n") if len(p.strip()) >= _SHORTEST_COPY}
    tail = "\n\n".join(p for p in text[cut:].split("\n\n") if p.strip() not in known)
    if not training or not tail.strip():
        raise InputError(
            f"nothing to hold out: the last {held_out:.0%} of the text is empty or a copy of what "
            "comes before; expected a longer text"
        )
    return Corpus(training, tail)
