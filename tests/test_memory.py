"""Large blocks that are kept from one call to the next."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import genkernels

# What is saved of such a call is 25 MB of gates, its largest gradient 1.8 MB.
STEPS, BATCH, INPUT, HIDDEN = 64, 64, 128, 384


@pytest.fixture(autouse=True)
def no_cache() -> Iterator[None]:
    if not sys.platform.startswith("linux") or not has_torch_from_blob():
        pytest.skip("memory is kept on Linux, with torch >= 2.11")
    genkernels.empty_cache()
    yield
    genkernels.empty_cache()


@functools.cache
def has_torch_from_blob() -> bool:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return hasattr(ctypes.CDLL(str(library)), "torch_from_blob")


def training_step(seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    module = genkernels.nn.GRU(INPUT, HIDDEN)
    output, _ = module(torch.randn(STEPS, BATCH, INPUT))
    return list(torch.autograd.grad(output.square().sum(), list(module.parameters())))


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def test_blocks_are_used_again() -> None:
    """As long as a gradient lives its memory is its own, and then the next one's."""
    first = training_step()
    second = training_step()
    places = {gradient.data_ptr() for gradient in first if gradient.nbytes >= 1 << 20}
    assert places
    assert places.isdisjoint(gradient.data_ptr() for gradient in second)
    del first
    third = training_step()
    assert places & {gradient.data_ptr() for gradient in third}


def test_results_stay_what_they_are() -> None:
    kept = training_step(seed=0)
    copies = [gradient.clone() for gradient in kept]
    for seed in (1, 2):
        training_step(seed)
    assert all(map(torch.equal, kept, copies))
    assert all(map(torch.equal, training_step(seed=0), copies))


def test_graphs_that_live_at_the_same_time() -> None:
    module = genkernels.nn.GRU(INPUT, HIDDEN)
    inputs = [torch.randn(STEPS, BATCH, INPUT) for _ in range(2)]
    weights = list(module.parameters())
    expected = [torch.autograd.grad(module(x)[0].sum(), weights) for x in inputs]
    outputs = [module(x)[0].sum() for x in inputs]
    for output, gradients in zip(outputs, expected, strict=True):
        actual = torch.autograd.grad(output, weights)
        assert all(map(torch.equal, actual, gradients))


def test_empty_cache_gives_memory_back() -> None:
    training_step()
    before = resident_bytes()
    genkernels.empty_cache()
    assert before - resident_bytes() > 16 << 20


def test_gradients_are_ordinary_tensors() -> None:
    """They outlive the cache, and can be changed and saved."""
    gradient = next(g for g in training_step() if g.nbytes >= 1 << 20)
    genkernels.empty_cache()
    total = gradient.sum().item()
    gradient.mul_(2)
    assert gradient.sum().item() == pytest.approx(2 * total, rel=1e-4)
    assert torch.equal(gradient.clone().view(-1), gradient.flatten())


# Gradients of 3 MiB for little work, in blocks mapped anew each time: a call often holds the lock.
FORK = """
import os, threading, torch, genkernels
values = [torch.randn(s) for s in ((1, 2048), (1, 128), (384, 2048), (384, 128))]
h, gates = torch.ops.genkernels.gru_cell_forward(*values, None, None, True, None)
def call():
    torch.ops.genkernels.gru_cell_backward(h, *values, None, None, gates, True, True)
    genkernels.empty_cache()
is_done = False
def calls():
    while not is_done:
        call()
thread = threading.Thread(target=calls)
thread.start()
codes = []
for _ in range(300):
    child = os.fork()
    if child == 0:
        call()
        os._exit(0)
    codes.append(os.waitpid(child, 0)[1])
is_done = True
thread.join()
assert codes == [0] * 300
"""


def test_fork_beside_a_thread_that_uses_it() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", FORK], env=environment, timeout=60, check=True)
