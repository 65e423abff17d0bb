"""The GRU as the extension has it for CUDA tensors: a step's gates, beside PyTorch's products.

Without a GPU the gates' raw ops run in plain PyTorch, and what is around them runs as on one. That
the CUDA kernels compute the same on the CPU, tests/cpp/standalone.cpp sees.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import assert_op_parity, assert_parity
from test_backend import python
from test_bidirectional_gru import both, in_turn, together
from test_bidirectional_gru import raw_arguments as both_arguments
from test_gru import DTYPES, TENSORS, arguments, check, dtype_id, packed_arguments, raw_arguments
from torch import Tensor

import genkernels
from genkernels import backend, triton
from genkernels.ops.gru import (
    _reference_bidirectional_backward,
    _reference_bidirectional_forward,
    _reference_cell_backward,
    _reference_cell_forward,
    _reference_forward,
    _with_gates,
    reference_backward,
)
from genkernels.reference.gru import gru_gates_backward, gru_gates_forward

__all__ = ["both_arguments", "raw_arguments"]  # of the process below

CUDA = torch.device("cuda")
ON_CUDA = {
    "gru_forward": _reference_forward,
    "gru_backward": reference_backward,
    "bidirectional_gru_forward": _reference_bidirectional_forward,
    "bidirectional_gru_backward": _reference_bidirectional_backward,
    "gru_cell_forward": _reference_cell_forward,
    "gru_cell_backward": _reference_cell_backward,
}
OPS = {"gru_gates_forward": gru_gates_forward, "gru_gates_backward": gru_gates_backward}


@pytest.fixture
def as_on_cuda() -> Iterator[None]:
    """CPU tensors take the way of CUDA's, and each test takes it."""
    overrides = torch.library.Library("genkernels", "IMPL")
    with warnings.catch_warnings():  # that they take the compiled kernels' place
        warnings.simplefilter("ignore")
        for name, function in ON_CUDA.items():
            overrides.impl(name, _with_gates(function), "CPU", allow_override=True)
    genkernels.stats(reset=True)
    yield
    overrides._destroy()
    assert {name for name, _ in genkernels.stats(reset=True)} == {
        "gru_gates_forward",
        "gru_gates_backward",
    }


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reverse": True},
        {"recompute": True},
        {"resets": torch.arange(12).view(4, 3) % 5 == 0},
        {"batch_sizes": torch.tensor([3, 3, 1])},
        {"batch_sizes": torch.tensor([3, 3, 1]), "reverse": True, "recompute": True},
        {"bias": False},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_sequences(options: dict[str, Any], dtype: torch.dtype) -> None:
    def draw(seed: int) -> dict[str, Any]:
        if "batch_sizes" in options:
            values = packed_arguments([3, 3, 1], 9, 18, dtype, seed=seed)
        else:
            values = arguments(4, 3, 9, 18, dtype, bias=options.get("bias", True), seed=seed)
        given = {name: options[name] for name in options if name not in ("bias", "recompute")}
        return values | given

    check(draw, op=partial(genkernels.gru, recompute=options.get("recompute", False)))


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_cells(dtype: torch.dtype) -> None:
    def draw(seed: int) -> dict[str, Any]:
        values = arguments(1, 7, 9, 18, dtype, seed=seed)
        return values | {"input": values["input"][0]}

    def plain(**values: Tensor) -> tuple[Tensor]:
        return (torch.gru_cell(*(values[name] for name in TENSORS)),)

    def op(**values: Tensor) -> tuple[Tensor]:
        return (genkernels.gru_cell(**values),)

    assert_op_parity(op, plain, plain, ("h",), *map(draw, range(4)))


@pytest.mark.usefixtures("as_on_cuda")
def test_both_directions() -> None:
    """As two calls."""
    leaves = both(arguments(4, 3, 9, 18))
    results = []
    for function in (together, in_turn):
        values = {name: value.detach().requires_grad_() for name, value in leaves.items()}
        output, h_n = function(**values)
        grads = torch.autograd.grad(output.sin().sum() + h_n.sum(), list(values.values()))
        results.append((output, h_n, *grads))
    torch.testing.assert_close(*results)


def gates_arguments(
    op: str, dtype: torch.dtype = torch.float32, B: int = 7, H: int = 13, seed: int = 0
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    projected, recurrent, hx, grad = (
        torch.randn(B, columns, generator=generator).to(dtype) for columns in (3 * H, 3 * H, H, H)
    )
    if op == "gru_gates_forward":
        return projected, recurrent, hx, True
    return grad, gru_gates_forward(projected, recurrent, hx, True)[1], hx


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    args = gates_arguments(op)
    raw = getattr(torch.ops.genkernels, op).default
    torch.library.opcheck(raw, args)
    if op == "gru_gates_forward":
        torch.library.opcheck(raw, (*args[:3], False))


def test_gradients_are_autograd_s() -> None:
    *products, hx, _ = gates_arguments("gru_gates_forward", torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (*products, hx)]
    output, gates = gru_gates_forward(*leaves, True)
    grad = torch.randn_like(output)
    deltas, grad_hx = torch.ops.genkernels.gru_gates_backward(grad, gates.detach(), hx.detach())
    n, r, z, q = deltas.chunk(4, -1)
    expected = torch.autograd.grad(output, leaves, grad)
    actual = (torch.cat([r, z, n], -1), torch.cat([r, z, q], -1), grad_hx)
    torch.testing.assert_close(actual, expected)


def test_what_stands_against_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def obstacle(op: str = "gru", dtype: torch.dtype = torch.float32) -> str | None:
        return backend._obstacle(op, "cpp", CUDA, dtype)

    assert obstacle("linear") == "it runs on CPU tensors, and these are on cuda"
    if not backend.CUDA_ARCHITECTURES:
        assert obstacle() == "the extension was built without CUDA kernels"
        monkeypatch.setattr(backend, "CUDA_ARCHITECTURES", (800, 900))
    monkeypatch.setattr(triton, "is_installed", lambda: True)
    assert obstacle() == "its CUDA kernels are for where Triton is missing"
    monkeypatch.setattr(triton, "is_installed", lambda: False)
    assert obstacle(dtype=torch.int64) == "it has no CUDA kernel for torch.int64"
    assert [obstacle(op) for op in ("gru", "gru_cell", "bidirectional_gru")] == [None] * 3
    assert backend.select("gru", CUDA, torch.float64) == "cpp"


def test_registered_where_triton_is_missing() -> None:
    """In a process that finds no Triton, with an extension that says it has CUDA kernels."""
    extension = backend._extension
    if extension is None:
        pytest.skip("the compiled extension: not built")
    code = f"""
import importlib.util, sys
sys.modules["triton"] = None
spec = importlib.util.spec_from_file_location("genkernels._C", {extension.__file__!r})
import torch
sys.modules["genkernels._C"] = extension = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extension)
extension.cuda_architectures = [800, 900]
sys.path.insert(0, {str(Path(__file__).parent)!r})
import genkernels
from test_gru_gates import ON_CUDA, both_arguments, raw_arguments

keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
for name, function in ON_CUDA.items():
    if name.startswith("bidirectional"):
        args = both_arguments(None, True, name.endswith("backward"))
    else:
        args = raw_arguments(name)
    genkernels.stats(reset=True)
    results = getattr(torch.ops.genkernels, name).default.redispatch(keys, *args)
    assert all(map(torch.equal, results, function(*args))), name
    assert {{op.rpartition("_")[2] for op, _ in genkernels.stats()}} == {{name.rpartition("_")[2]}}
    assert {{op[:9] for op, _ in genkernels.stats()}} == {{"gru_gates"}}
with torch._subclasses.FakeTensorMode():
    print(genkernels.explain("gru", torch.empty(1, 1, 1, device="cuda")))
"""
    result = python(code, GENKERNELS_BACKEND="")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[:2] == ["gru: cpp", "  cpp: runs"]


@pytest.mark.skipif(
    not (torch.cuda.is_available() and backend.CUDA_ARCHITECTURES),
    reason="CUDA device and an extension with CUDA kernels: not here",
)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("H", [1, 13, 64, 72])
def test_kernels_on_a_gpu(op: str, dtype: torch.dtype, H: int) -> None:
    """The same numbers as on the CPU, of rows at multiples of 16 bytes and between those."""
    plain = OPS[op]
    args = gates_arguments(op, dtype, 37, H)
    expected = plain(*args)
    exact = plain(*(a.double() if isinstance(a, Tensor) else a for a in args))
    for offset in (0, 1):  # what starts between two multiples of 16 bytes
        moved = [a.cuda() if isinstance(a, Tensor) else a for a in args]
        if offset:
            moved[0] = (
                moved[0].new_empty(moved[0].numel() + 1)[1:].view_as(moved[0]).copy_(moved[0])
            )
        results = getattr(torch.ops.genkernels, op)(*moved)
        for i, values in enumerate(zip(results, expected, exact, strict=True)):
            assert_parity(f"result {i}", values[0].cpu(), *values[1:])
