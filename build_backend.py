"""PEP 517 backend: setuptools, with torch as a build requirement only where none is found.

The extension needs torch's headers and libtorch_cpu at build time. An isolated build that asked
for torch would download it again although it is installed beside the interpreter, so the isolated
build uses that one.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403
from setuptools.build_meta import get_requires_for_build_editable as _requires_editable
from setuptools.build_meta import get_requires_for_build_wheel as _requires_wheel

MIN_TORCH = (2, 10)


def torch_version(torch_dir: Path, of: str = "__version__") -> str | None:
    """Version of the torch package in `torch_dir`, or that of the "cuda" it was built for, read
    from its text; None if there is none."""
    try:
        text = (torch_dir / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(rf"""^{of}\s*(?::.*)?=\s*['"]([^'"]+)['"]""", text, re.MULTILINE)
    return match[1] if match else None


def find_torch() -> tuple[Path, str]:
    """Folder and version of a torch that can be built against, without importing it.

    In order: GENKERNELS_TORCH_DIR, what this interpreter would import, its own site-packages
    (pip's build isolation hides them from sys.path only), the activated environment's, and the
    base interpreter's (`python -m build` isolates in a virtual environment of its own).
    Raises LookupError if there is none.
    """
    forced = os.environ.get("GENKERNELS_TORCH_DIR")
    if forced:
        candidates = [Path(forced).resolve()]
    else:
        spec = importlib.util.find_spec("torch")
        candidates = [Path(spec.origin).parent] if spec and spec.origin else []
        prefixes = [sys.prefix, os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX")]
        for prefix in filter(None, [*prefixes, sys.base_prefix]):
            paths = {"base": prefix, "platbase": prefix}
            candidates += [
                Path(sysconfig.get_path(name, vars=paths)) / "torch"
                for name in ("purelib", "platlib")
            ]
    found = f"none is in {forced}" if forced else "none was found"
    for torch_dir in candidates:
        version = torch_version(torch_dir)
        if version is None:
            continue
        if tuple(map(int, version.split(".")[:2])) >= MIN_TORCH:
            return torch_dir, version
        found = f"{torch_dir} has {version}"
    raise LookupError(found)


def find_nvcc() -> str:
    """CUDACXX, nvcc on PATH or that of CUDA_HOME. Raises LookupError if there is none."""
    folder = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    chosen = os.environ.get("CUDACXX")
    names = [chosen] if chosen else ["nvcc", str(Path(folder, "bin", "nvcc"))]
    nvcc = next(filter(None, map(shutil.which, names)), None)
    if nvcc is None:
        raise LookupError(f"CUDACXX={chosen} was not found" if chosen else "nvcc was not found")
    return nvcc


def find_cuda(torch_dir: Path, compiler: str) -> str:
    """An nvcc that can build for the torch in `torch_dir` beside the C++ compiler.

    Raises LookupError, with what is missing, if there is none.
    """
    needed = torch_version(torch_dir, "cuda")
    if needed is None or not any((torch_dir / "lib").glob("*torch_cuda.*")):
        raise LookupError(f"{torch_dir} has no CUDA")
    nvcc = find_nvcc()
    told = subprocess.run([nvcc, "--version"], text=True, capture_output=True)
    found = re.search(r"release (\d+)\.", told.stdout)
    if found is None or found[1] != needed.split(".")[0]:
        raise LookupError(f"{torch_dir} is for CUDA {needed}, and {nvcc} is not")
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cu")
        probe.touch()
        command = [nvcc, "-std=c++20", "-ccbin", compiler, "-E", str(probe)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            raise LookupError(f"{nvcc} does not take C++20 with {compiler}")
    return nvcc


def _torch_requirement() -> list[str]:
    if os.environ.get("GENKERNELS_SKIP_BUILD") != "1":
        try:
            find_torch()
        except LookupError:
            return ["torch>=" + ".".join(map(str, MIN_TORCH))]
    return []


def get_requires_for_build_wheel(config_settings=None):
    return [*_requires_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings=None):
    return [*_requires_editable(config_settings), *_torch_requirement()]
