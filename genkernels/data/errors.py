"""The one exception for bad input."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


class InputError(ValueError):
    """Input from outside that cannot be used.

    The message is one line that says what was found, where, and what was expected: the commands
    print it as it is and exit with code 2.
    """


@contextlib.contextmanager
def errors_in(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put `path` before the message of an `InputError` about what was read from there."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
