"""The command `genkernels`: train, generate, attend, evaluate, score, compare, info."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence

EXTRA = ("typer", "rich", "tokenizers", "safetensors", "matplotlib")
INTERRUPTED = "interrupted; nothing was written"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done. 1: nobody reads the output any more. 2: bad input, or no room for the output; one line
    on stderr says what, where and what was expected. 130: interrupted, by Ctrl-C, by SIGTERM, as
    job schedulers send it before they kill, or by SIGHUP, as a terminal does when it closes.
    """
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"needs {', '.join(missing)}: pip install 'genkernels[train]'", 2)

    if threading.current_thread() is threading.main_thread():
        for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup has SIGHUP ignored
                signal.signal(number, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal cannot show

    try:
        import typer

        from ..data import InputError
        from .app import app

        # Every complaint about options and arguments derives from it; typer does not export it.
        usage_error: type[Exception] = typer.BadParameter.__mro__[1]
        code = app(args=argv, prog_name="genkernels", standalone_mode=False) or 0
        if code == 130:  # what typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, 130)
    except typer.Abort as error:  # with a command's own word on its interrupt, or typer's, without
        return _fail(str(error) or INTERRUPTED, 130)
    except usage_error as error:
        message = error.format_message()  # type: ignore[attr-defined]
        message = message.replace("Value error, ", "")  # pydantic's, in some versions of typer
        return _fail(message, 2) if message else 2  # none where typer has printed the help instead
    except (InputError, FloatingPointError) as error:
        return _fail(str(error), 2)
    except OSError as error:  # what is read is checked where it is read
        where = "stdout" if _stdout_is_lost() else error.filename or "output folder"
        if isinstance(error, BrokenPipeError):
            return 1
        return _fail(
            f"{where}: {error.strerror or error}; expected a place that can be written to", 2
        )
    except (RuntimeError, MemoryError) as error:
        tried = re.search(r"tried to allocate \d+ bytes", str(error))
        if not tried and not isinstance(error, MemoryError):
            raise
        what = f" ({tried[0]})" if tried else ""
        return _fail(f"out of memory{what}; expected a smaller model, batch or text", 2)


def _stdout_is_lost() -> bool:
    """Try stdout; where it fails, keep the interpreter from trying it again when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _fail(message: str, code: int) -> int:
    print("genkernels:", " ".join(message.split()), file=sys.stderr)
    return code
