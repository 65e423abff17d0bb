"""What the commands of this folder share: their options, their ends and what they write."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.workers import Failure


def add_only(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="cases whose name contains this (default: all)"
    )


def add_rounds(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument(
        "--rounds", type=int, default=7, metavar="N", help=f"{help} (default: %(default)s)"
    )


def add_save(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--save", metavar="FOLDER", help=f"{what} there (default: print only)")


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with one line and exit code 2 where --rounds or --save cannot be meant."""
    if getattr(options, "rounds", 1) < 1:
        parser.error(f"argument --rounds: expected at least 1, got {options.rounds}")
    if options.save and not Path(options.save).is_dir():
        parser.error(f"argument --save: {options.save}: expected an existing folder")


def run(name: str, work: Callable[[], int]) -> int:
    """The exit code of a command: that of `work`, or 2 after one line where it fails."""
    try:
        return work()
    except Failure as failure:
        print(f"{name}: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then rename: an interrupted run leaves what was there."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder, path.name)
        write(temporary)
        os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
