"""The one exception for bad input, and for what it takes to read it."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any


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


def import_library(module: str, package: str) -> Any:
    """Import a module of one of the packages in the extra `data`.

    Raises:
        InputError: it is not installed, or does not load (says why).
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a shared library that is not there
        raise InputError(
            f"{module}: cannot be imported ({error}); expected the package {package}, "
            "as of pip install 'genkernels[data]'"
        ) from error
