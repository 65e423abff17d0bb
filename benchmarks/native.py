"""C++ beside the benchmarks: compiled at first use, into ~/.cache/genkernels."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path


def compiler() -> list[str] | None:
    """The C++ compiler's command, None where there is none."""
    found = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    return found.split() if found else None


def load(source: Path, *flags: str) -> ctypes.CDLL:
    """Compile `source` to a shared library, unless that was done before, and load it."""
    command = compiler()
    if command is None:
        raise RuntimeError(
            f"{source.name} needs a C++ compiler: none of c++, g++, clang++ was found"
        )
    command += ["-std=c++20", "-O2", "-shared", "-fPIC", str(source), *flags]
    digest = hashlib.sha256(" ".join(command).encode() + source.read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "genkernels"
    target = cache / f"{source.stem}-{digest}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / target.name
            subprocess.run([*command, "-o", str(built)], check=True, stdout=2)
            os.replace(built, target)
    return ctypes.CDLL(str(target))
