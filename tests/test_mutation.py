"""The suite sees a broken kernel: real builds of this tree, each with one line of csrc changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = {
    "gate_order": (  # W_r and W_z change places
        "recurrent_layer.h",
        "(n / kUnits * H + unit) * K",
        "((n / kUnits < 2 ? 1 - n / kUnits : 2) * H + unit) * K",
        "output: largest error",
    ),
    "unwritten_row": (  # nothing but the poisoned memory shows it
        "gru.cpp",
        "if (output != nullptr) store(output + i * H",
        "if (output != nullptr && i != 1) store(output + i * H",
        "output: NaN or Inf unlike PyTorch's",
    ),
    "gradient": (  # the derivative of r * (W_hn h + b_hn) forgets r
        "gru.cpp",
        "store(to + 3 * H + u, dn * r, count);",
        "store(to + 3 * H + u, dn, count);",
        "grad of hx: largest error",
    ),
    "slope": (  # of tanh
        "rnn.cpp",
        "dh * (A(1) - h * h)",
        "dh * (A(1) - h)",
        "grad of input: largest error",
    ),
    "one_chain": (  # right, but summed less accurately than PyTorch sums
        "gemm.h",
        "kChain = 256;",
        "kChain = int64_t(1) << 40;",
        "largest error",
    ),
    "activation": (  # of the output alone: what the backward pass has is right
        "linear.cpp",
        "case Activation::silu: return x * sigmoid(x);",
        "case Activation::silu: return x * sigmoid(x * A(1.001));",
        "output: largest error",
    ),
    "second_block": (  # sums of the rows after the first 256
        "linear.cpp",
        "Range(N, share, shares, kLanes<A>), base == 0)",
        "Range(N, share, shares, kLanes<A>), true)",
        "grad of bias: largest error",
    ),
    "target": (  # its class' gradient lacks the one that is taken off
        "linear_cross_entropy.cpp",
        "row[target] -= ",
        "row[target] += 0 * ",
        "grad of input: largest error",
    ),
    "random_place": (  # each 64 elements drop what the first do
        "dropout.cpp",
        "uint32_t(group >> 28), uint32_t(group), numbers",
        "uint32_t(group >> 28), 0, numbers",
        "output: largest error",
    ),
    "raised_maximum": (  # sums of the keys before a larger score
        "attention_forward.cpp",
        "store(block.totals + column, load(block.totals + column) * factor);",
        "",
        "output: largest error",
    ),
    "later_queries": (  # of 192 queries each
        "attention_gradients.h",
        "load(value, lanes) + sum[i][v] * factor",
        "sum[i][v] * factor",
        "grad of key: largest error",
    ),
    "later_chunk": (  # of keys, whose exponents are relative to another maximum
        "attention_decode.cpp",
        "parts.most[at(chunk)] - most;",
        "A(0);",
        "output: largest error",
    ),
}
# The tests that are asked for a file's mutants.
SUITES = {
    "linear.cpp": ("test_linear.py", "TestParity and (many_rows or activations)"),
    "dropout.cpp": ("test_dropout.py", "TestParity and test_shapes"),
    "linear_cross_entropy.cpp": ("test_linear_cross_entropy.py", "TestParity and shapes"),
    "rnn.cpp": ("test_rnn_op.py", "TestParity and test_shapes"),
    **dict.fromkeys(
        ("attention_forward.cpp", "attention_gradients.h", "attention_decode.cpp"),
        ("test_attention.py", "TestParity and (test_order_of_scores or test_long)"),
    ),
}
USUAL_SUITE = ("test_gru.py", "TestParity and test_shapes")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a copy of this tree, at the baseline SIMD level alone, with one line changed."""
    folder = tmp_path_factory.mktemp("mutant")
    ignore = shutil.ignore_patterns("_C.*", "__pycache__")
    for name in ("csrc", "genkernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy2(file, folder)
    levels = {"CMAKE_ARGS": "-DGENKERNELS_SIMD_LEVELS=baseline"}

    mutated: list[Path] = []

    def build(file: str | None = None, line: str = "", changed: str = "") -> Path:
        shutil.copytree(ROOT / "csrc", folder / "csrc", dirs_exist_ok=True)
        while mutated:  # restored with its old time, it would not be compiled again
            mutated.pop().touch()
        if file is not None:
            mutated.append(folder / "csrc" / "kernels" / file)
            replace_once(mutated[0], line, changed)
        subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            cwd=folder,
            env={**os.environ, **levels},
            check=True,
        )
        return folder

    return build


def replace_once(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file.name} has no longer exactly one {old!r}"
    file.write_text(text.replace(old, new), encoding="utf-8")


def run_suite(folder: Path, file: str, tests: str) -> subprocess.CompletedProcess[str]:
    selection = f"{tests} and float32 and baseline"
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", f"tests/{file}", "-k", selection],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_unchanged(build: Callable[..., Path]) -> None:
    folder = build()
    for suite in {USUAL_SUITE, *SUITES.values()}:
        result = run_suite(folder, *suite)
        assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_seen(build: Callable[..., Path], mutant: str) -> None:
    file, line, changed, message = MUTANTS[mutant]
    result = run_suite(build(file, line, changed), *SUITES.get(file, USUAL_SUITE))
    assert result.returncode == 1, f"the suite passed, or did not run: {result.stdout}"
    assert message in result.stdout
