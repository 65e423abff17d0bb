"""Fixtures for the tests of every op."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import parity
import pytest
import torch

import genkernels
from genkernels import backend, triton

LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--report", metavar="FILE", type=Path, help="write there, as JSON, what ran and on what"
    )


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Device, driver, versions, commit, how many tests passed, and which did not."""
    path = config.getoption("--report")
    if path is None:
        return
    from benchmarks import command, gpu

    outcomes = terminalreporter.stats
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = gpu.machine_with(device) | {
        "passed": len(outcomes.get("passed", [])),
        **{
            outcome: [entry.nodeid for entry in outcomes.get(outcome, [])]
            for outcome in ("failed", "error", "skipped")
        },
    }
    command.write_json(path, report)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what avx512_bf16 repeats: only bfloat16 has code of its own there, the other dtypes
    have that of avx512. Under pytest-xdist, share out the rest."""

    def is_repeated(item: pytest.Item) -> bool:
        values = parameters(item).values()
        dtypes = {value for value in values if isinstance(value, torch.dtype)}
        return (
            "avx512_bf16" in [v for v in values if isinstance(v, str)]
            and bool(dtypes)
            and torch.bfloat16 not in dtypes
        )

    repeated = [item for item in items if is_repeated(item)]
    config.hook.pytest_deselected(items=repeated)
    items[:] = [item for item in items if not is_repeated(item)]
    if hasattr(config, "workerinput"):
        share_out(items)


def share_out(items: list[pytest.Item]) -> None:
    """Files that have slow tests are begun first, then those that have many, so that at the end no
    worker waits for a long one. A file is one worker's, in its order (`--dist loadfile`)."""
    counts = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -counts[item.path]))


def parameters(item: pytest.Item) -> dict[str, Any]:
    return dict(item.callspec.params) if hasattr(item, "callspec") else {}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """At every SIMD level a case is compared with the same."""
    values = parameters(item)
    level = values.get("simd") or values.get("kernel")
    function = item.nodeid.partition("[")[0]
    parity.begin_test(function, level and item.nodeid.replace(level, "", 1))


@pytest.fixture(params=LEVELS)
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once at every SIMD level that this CPU and build have."""
    if request.param not in backend.simd_levels():
        pytest.skip(f"SIMD level {request.param}: not on this CPU or not in this build")
    with backend.use_simd(request.param):
        yield request.param


@pytest.fixture(autouse=triton.IS_INTERPRETED)
def sanitizer() -> Iterator[None]:
    """Fail the test at an access of a Triton kernel that is out of bounds or a race."""
    from benchmarks.sanitizer import Sanitizer

    with Sanitizer():
        yield


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Hand out uninitialised tensors full of NaN, so that an element left unwritten is seen."""
    previous = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    if backend._extension is not None:
        backend._extension.poison_memory(True)
    yield
    if backend._extension is not None:
        backend._extension.poison_memory(False)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = previous


@pytest.fixture
def compiled_only() -> Iterator[None]:
    """Fail the test unless every op that it called ran in the compiled CPU kernel alone."""
    yield from _compiled(lambda op: True)


@pytest.fixture
def compiled_gru() -> Iterator[None]:
    """The same of the GRU alone: a model that trains hands its last layer over to PyTorch."""
    yield from _compiled(lambda op: "gru" in op)


def _compiled(is_meant: Callable[[str], bool]) -> Iterator[None]:
    genkernels.stats(reset=True)
    yield
    calls = {call: n for call, n in genkernels.stats(reset=True).items() if is_meant(call[0])}
    assert calls, "no op of genkernels was called"
    assert {name for _, name in calls} == {"cpp"}, (
        f"not every call ran the compiled kernel: {calls}"
    )


@pytest.fixture
def nothing_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of `linear` runs sizes, too, that PyTorch does as fast."""
    for limit in ("LEAST_ROWS", "LEAST_PRODUCTS", "LEAST_PRODUCTS_BESIDE_MKL"):
        monkeypatch.setattr(sys.modules["genkernels.ops.linear"], limit, 0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and on a busy machine wait long for them."""
    yield from _threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    yield from _threads(2)


def _threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(previous)
