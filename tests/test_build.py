"""The kernels are torch-free: what their objects contain, and a C++ program that runs them."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from build_backend import find_cuda, torch_version
from genkernels import backend

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sysconfig.get_path("scripts")
KERNELS = (
    "gru_forward",
    "gru_backward",
    "rnn_forward",
    "rnn_backward",
    "linear_forward",
    "linear_backward",
    "linear_cross_entropy",
    "dropout",
    "attention_forward",
    "attention_backward",
    "attention_double_backward",
)
LEVELS = ["baseline", "avx2", "avx512", "avx512_bf16"]


def tool(name):
    return shutil.which(name, path=SCRIPTS) or shutil.which(name) or pytest.skip(f"no {name} here")


@pytest.fixture(scope="module")
def build():
    """The folder of the extension's build, with the torch-free program as well."""
    folder = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
    if not (folder / "CMakeCache.txt").exists():
        pytest.skip("the extension was not built in this source tree")
    subprocess.run([tool("cmake"), "--build", folder, "--target", "standalone"], check=True)
    return folder


@pytest.fixture(scope="module")
def symbols(build):
    """(level, type, demangled name) of every symbol in the kernels' objects."""
    found = []
    for item in (build / "CMakeFiles").glob("kernels_*.dir/**/*.o"):
        level = re.search(r"kernels_(\w+)\.dir", str(item))[1]
        output = subprocess.run(
            [tool("nm"), "-C", item], check=True, capture_output=True, text=True
        )
        for line in output.stdout.splitlines():
            kind, name = line[17:].split(" ", 1)  # the address, or blanks, take 16 columns
            found.append((level, kind, name))
    return found


def test_objects_hold_every_level_that_was_built(build, symbols):
    cache = (build / "CMakeCache.txt").read_text()
    asked_for = re.search(r"GENKERNELS_SIMD_LEVELS:STRING=(.*)", cache)[1].upper().split(";")
    built = set(re.findall(r"GENKERNELS_COMPILES_(\w+):INTERNAL=1", cache))
    built &= {"BASELINE", *asked_for}
    assert "BASELINE" in built
    for level in built:
        defined = [name for at, kind, name in symbols if at == level.lower() and kind == "T"]
        for kernel in KERNELS:
            assert any(f"genkernels::{level.lower()}::{kernel}(" in name for name in defined)


def test_objects_need_only_the_c_library(symbols):
    """And each other, within a level."""
    needed = {
        name
        for level, kind, name in symbols
        if kind == "U" and not name.startswith(f"genkernels::{level}::")
    }
    assert needed <= {
        "_GLOBAL_OFFSET_TABLE_",
        "erfc",
        "exp",
        "log",
        "tanh",
        "memcpy",
        "memmove",
        "memset",
    }


def test_objects_share_no_weak_symbol(symbols):
    # The linker keeps one copy of a weak symbol: AVX-512 code for a CPU without it.
    weak = {
        name
        for level, kind, name in symbols
        if kind in "VWu" and f"genkernels::{level}::" not in name
    }
    assert weak == set()


def test_objects_hold_no_static_data(symbols):
    assert {name for _, kind, name in symbols if kind in "bBdDC"} == set()


@pytest.mark.parametrize("level", LEVELS)
def test_kernels_run_without_torch(build, level):
    result = subprocess.run([build / "standalone", level], capture_output=True, text=True)
    if "has no level" in result.stderr:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    lines = re.findall(r"^(\w+) +(\w+) ", result.stdout, re.MULTILINE)
    # Ways to share out the threads, caches, dtypes; of attention and the recurrent cells, which
    # are two, sizes too.
    others = [(level, op) for op in ("linear", "loss", "dropout", *["attention"] * 7)] * (6 * 2 * 2)
    gates = [("gates", name) for name in ("float32", "float64", "bfloat16") for _ in range(2)]
    assert lines == gates + others + [(level, "float32"), (level, "float64")] * (2 * 2 * 6 * 2)


def test_cuda_kernels_are_built_beside_a_torch_for_cuda(build):
    if torch.version.cuda is not None or os.environ.get("GENKERNELS_CUDA"):
        pytest.skip("torch without CUDA, and GENKERNELS_CUDA=auto: not here")
    assert "GENKERNELS_CUDA:BOOL=OFF" in (build / "CMakeCache.txt").read_text()
    assert backend.CUDA_ARCHITECTURES == ()


def fake_torch(folder, cuda, has_library=True):
    """As much of a torch as says what it was built for."""
    (folder / "lib").mkdir()
    (folder / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: Optional[str] = {cuda!r}\n")
    if has_library:
        (folder / "lib" / "libtorch_cuda.so").touch()
    return folder


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("yes", "GENKERNELS_CUDA=yes: expected auto, 0 or 1"),
        ("1", "GENKERNELS_CUDA=1 needs nvcc (CUDA >= 12) and a torch for CUDA: {} has no CUDA"),
    ],
)
def test_cuda_that_cannot_be_is_one_sentence(tmp_path, value, said):
    variables = {"GENKERNELS_CUDA": value, "GENKERNELS_TORCH_DIR": str(fake_torch(tmp_path, None))}
    result = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1] == f"error: {said.format(tmp_path)}"
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("cuda", "has_library", "variables", "said"),
    [
        (None, True, {}, "{} has no CUDA"),
        ("13.0", False, {}, "{} has no CUDA"),
        ("13.0", True, {"CUDACXX": "no-such-nvcc"}, "CUDACXX=no-such-nvcc was not found"),
        ("13.0", True, {"PATH": "", "CUDA_HOME": "/nonexistent"}, "nvcc was not found"),
    ],
)
def test_what_cuda_lacks_is_said(monkeypatch, tmp_path, cuda, has_library, variables, said):
    monkeypatch.delenv("CUDACXX", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LookupError, match=re.escape(said.format(tmp_path))):
        find_cuda(fake_torch(tmp_path, cuda, has_library), "c++")


def test_nvcc_is_that_of_torch(tmp_path):
    nvcc = tool("nvcc")
    told = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    version = re.search(r"release ([\d.]+)", told)[1]
    torch_dir = fake_torch(tmp_path, version)
    assert torch_version(torch_dir, "cuda") == version
    assert find_cuda(torch_dir, tool("c++")) == nvcc
    with pytest.raises(LookupError, match="does not take C"):
        find_cuda(torch_dir, "no-such-compiler")
    (torch_dir / "version.py").write_text("__version__ = '2.13.0'\ncuda = '9.2'\n")
    with pytest.raises(LookupError, match=re.escape(f"is for CUDA 9.2, and {nvcc} is not")):
        find_cuda(torch_dir, tool("c++"))
