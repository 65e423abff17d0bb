"""The kernels are torch-free: what their objects contain, and a C++ program that runs them."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sysconfig.get_path("scripts")
KERNELS = (
    "gru_forward",
    "gru_backward",
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
    # Ways to share out the threads, caches, dtypes; of attention and the GRU, sizes too.
    others = [(level, op) for op in ("linear", "loss", "dropout", *["attention"] * 7)] * (6 * 2 * 2)
    assert lines == others + [(level, "float32"), (level, "float64")] * (2 * 6 * 2)
