"""The command `genkernels`: train, generate, evaluate, info."""

from __future__ import annotations

import importlib.util
import io
import signal
import sys
import threading
from collections.abc import Sequence

EXTRA = ("typer", "rich", "tokenizers", "safetensors", "matplotlib")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done. 2: bad input; one line on stderr says what, where and what was expected. 130:
    interrupted, by Ctrl-C or by SIGTERM, as job schedulers send it before they kill.
    """
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"needs {', '.join(missing)}: pip install 'genkernels[train]'", 2)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal cannot show

    import typer

    from ..data import InputError
    from .app import app

    # Every complaint about options and arguments derives from it; typer does not export it.
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]
    try:
        return app(args=argv, prog_name="genkernels", standalone_mode=False) or 0
    except usage_error as error:
        message = error.format_message()  # type: ignore[attr-defined]
        return _fail(message, 2) if message else 2  # none where typer has printed the help instead
    except (InputError, FloatingPointError) as error:
        return _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; nothing was written", 130)


def _fail(message: str, code: int) -> int:
    print("genkernels:", " ".join(message.split()), file=sys.stderr)
    return code
