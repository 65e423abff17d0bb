"""Launches of the Triton kernels, without a GPU: kernels are compiled for sm_90, and a driver keeps
what it is to launch. It is to be what Triton's own launch makes of the same arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from genkernels import triton

pytest.importorskip("triton", reason="triton: not installed (pip install 'genkernels[triton]')")
if triton.IS_INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: set, and what is interpreted is not compiled", True)

from triton import jit
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from genkernels.triton import attention, gru, launch

Launch = tuple[int, tuple[int, ...], tuple[Any, ...]]


class Driver:
    """What Triton asks of a driver, of a GPU that is not there."""

    def __init__(self) -> None:
        self.launched: list[Launch] = []
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def run(*args: Any) -> None:
            # Of the kernel, which this function stands for, the grid and, behind what describes
            # the launch, the arguments.
            values = (a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args[9:])
            self.launched.append((id(run), args[:3], tuple(values)))

        return run

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *args: Any) -> tuple[int, ...]:
        return (0, 0, 32, 0, 1024)


DRIVER = Driver()  # of all tests: Triton keeps what it compiled, with the launcher that it has


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    monkeypatch.setattr(launch, "_compiled", {})
    for module in (attention, gru):
        monkeypatch.setattr(module, "architecture_of", lambda _: "sm_90")
    kept = driver._active
    driver.set_active(DRIVER)
    yield DRIVER
    driver._active = kept


def twice(gpu: Driver, monkeypatch: pytest.MonkeyPatch, run: Callable[[], None]) -> list[Launch]:
    """What is launched by Triton's own launch, then by ours, at the first call and the second."""
    launched = []
    for is_known in (False, True, True):
        monkeypatch.setattr(launch, "_IS_KNOWN", is_known)
        gpu.launched.clear()
        run()
        launched.append(list(gpu.launched))
    assert launched[0] == launched[1] == launched[2] != []
    return launched[0]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    ("B", "H", "dtype"),
    [(5, 136, torch.float32), (3, 200, torch.bfloat16), (4, 133, torch.float32)],
)
@pytest.mark.parametrize("way", ["dense", "reverse", "resets", "packed", "off by one"])
def test_steps_of_a_gru(
    gpu: Driver,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    B: int,
    H: int,
    dtype: torch.dtype,
    way: str,
) -> None:
    """Their addresses go on from one to the next."""
    sizes = torch.tensor([B - t * (B - 1) // steps for t in range(steps)])
    if way != "packed":
        sizes = torch.full((steps,), B)
    rows = int(sizes.sum())

    def of(*shape: int) -> torch.Tensor:
        return torch.zeros(shape if way == "packed" else (steps, B, *shape[1:]), dtype=dtype)

    hx = torch.zeros(B * H + 1, dtype=dtype)[way == "off by one" :][: B * H].view(B, H)
    weights = [torch.zeros(3 * H, H, dtype=dtype), torch.zeros(3 * H, dtype=dtype)]
    output, gates, has_resets = of(rows, H), of(rows, 4 * H), way == "resets"
    projected, carry = of(rows, 3 * H), torch.zeros(B, H)
    resets = torch.zeros(steps, B, dtype=torch.bool) if has_resets else output
    flags = {"HAS_BIAS": True, "HAS_RESETS": has_resets, "SAVE_GATES": True}
    flags_back = {"HAS_GRAD_OUTPUT": True, "HAS_RESETS": has_resets, "SAVE_STATES": False}
    batch_sizes = sizes if way == "packed" else None
    # It makes a tensor anew, whose address is another.
    monkeypatch.setattr(gru, "handed_on", lambda rows, *_: rows)

    def run() -> None:
        reverse = way == "reverse"
        tensors = (projected, hx, *weights, resets, output, gates)
        gru._run_forward_steps(tensors, batch_sizes, flags, reverse)
        tensors = (carry, weights[0], resets, output, output, gates, gates, gates)
        gru._run_backward_steps(tensors, batch_sizes, flags_back, reverse)

    assert len(twice(gpu, monkeypatch, run)) == 2 * steps + 1


@pytest.mark.parametrize("causal", [0, 1, 2])
@pytest.mark.parametrize("length", [1, 16, 33])
def test_attention(gpu: Driver, monkeypatch: pytest.MonkeyPatch, causal: int, length: int) -> None:
    """A kernel of many arguments, of which some are 1 and some are multiples of 16."""
    q, k, v = (torch.zeros(2, 4, n, 24).bfloat16() for n in (length, 48, 48))

    def run() -> None:
        settings: Any = (0.0, causal, 0.5)
        output, statistics = attention.attention_forward(q, k, v, None, None, *settings)
        saved = (q, k, v, None, None, torch.zeros_like(output), statistics)
        attention.attention_backward(output, None, *saved, *settings, False)

    # The backward pass pads what is not a multiple of 16 anew: which changes addresses.
    monkeypatch.setattr(attention, "_aligned", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 16 * tensor.dim())
    twice(gpu, monkeypatch, run)


@jit
def noted(pointer, number, factor, other, CONSTANT: tl.constexpr):
    if other is not None:
        tl.store(other, number)
    tl.store(pointer, factor * CONSTANT)


def test_what_the_compiler_tells_apart(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments that Triton compiles anew for are never launched with another's kernel."""
    numbers = [0, 1, 2, 15, 16, 17, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40, 3 * 2**40 + 1]
    numbers += [True, False, 2**63, 2**64 - 1]
    block = torch.zeros(64, dtype=torch.float32)
    pointers = [block, block[1:], block[4:], block.view(torch.int32), block.bfloat16()]
    every = list(
        itertools.product(pointers, numbers, [1.0, 0.5], [None, block], [1, 2, 3, 16, True])
    )

    def run() -> None:
        for values in every:
            launch.launch(noted, (1,), values, {"num_warps": 4})

    kernels = {kernel for kernel, *_ in twice(gpu, monkeypatch, run)}
    assert len(kernels) > 30
    # Nor is what was compiled for another choice of the compiler's options.
    gpu.launched.clear()
    for warps in (4, 8, 4):
        launch.launch(noted, (1,), every[0], {"num_warps": warps})
    first, second, third = (kernel for kernel, *_ in gpu.launched)
    assert first == third != second
