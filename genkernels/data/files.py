"""Files: read one after another, a bad one passed over if asked, and replaced as a whole."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from .errors import InputError

Errors = Literal["raise", "skip"]

TEMPORARY = ".genkernels-"
_LONGEST = 512  # bytes by which a kind is known

_Content = TypeVar("_Content")


def files_in(
    folder: str | os.PathLike[str], suffixes: Collection[str], recursive: bool = False
) -> list[Path]:
    """Return the files with these suffixes, in any case, by name; hidden ones are left out.

    Raises:
        InputError: no such folder, one that cannot be read, or none with such files.
    """
    folder = Path(folder)
    expected = f"a folder of {', '.join(suffixes)}"
    try:
        next(folder.iterdir(), None)  # names the fault; rglob finds nothing without a word
        found = [
            path
            for path in folder.glob("**/*" if recursive else "*")
            if path.suffix.lower() in suffixes
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
            and path.is_file()
        ]
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; expected {expected}") from error
    if not found:
        raise InputError(f"{folder}: no such files in it; expected {expected}")
    return sorted(found)


def read_each(
    paths: Sequence[Path], read: Callable[[Path], _Content], errors: Errors, source: object
) -> list[tuple[Path, _Content]]:
    """Read files, and return each with its content. `source` is where they are from.

    "raise" stops at the first that `read` has an `InputError` for; "skip" warns of each, and leaves
    it out.

    Raises:
        InputError: one that cannot be used, or with "skip", none can.
        ValueError: errors is neither.
    """
    if errors not in ("raise", "skip"):
        raise ValueError(f"errors must be 'raise' or 'skip', got {errors!r}")
    contents = []
    for path in paths:
        try:
            contents.append((path, read(path)))
        except InputError as error:
            if errors == "raise":
                raise
            warnings.warn(f"skipped {error}", stacklevel=3)
    if not contents:
        raise InputError(f"{source}: none of {len(paths)} files can be used; expected at least one")
    return contents


def check_kind(path: Path, begin: bytes, expected: str) -> None:
    """Let a file be replaced that begins so (a regular expression), or is empty, but no other.

    Raises:
        InputError: it is another.
    """
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if not re.match(begin, file.read(_LONGEST), re.DOTALL):
                raise InputError(f"{path} is a file of another kind; expected {expected}, or none")


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Give a file to write, and let it take the place of `path` when the block ends well.

    Raises:
        OSError: of `path`, which cannot be written to.
    """
    temporary = path.parent / f"{TEMPORARY}{path.name}"
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # it was moved, or there is no place for it
            temporary.unlink()
