"""The one accuracy rule, for every op, output and gradient.

Against float64, a kernel's largest error is at most twice the largest error of plain PyTorch in the
same dtype, plus a floor of 4 * eps(dtype) * max|float64 result|. NaN and Inf must stand where plain
PyTorch has them.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
Result = TypeVar("Result")


def assert_parity(name: str, actual: Tensor, plain: Tensor, exact: Tensor) -> float:
    """Apply the rule to one tensor and return its largest error.

    `plain` is what PyTorch computes in the dtype of `actual`, `exact` the same in float64.
    """
    assert exact.dtype == torch.float64, f"{name}: the reference is {exact.dtype}, not float64"
    assert actual.dtype == plain.dtype, f"{name}: dtype {actual.dtype}, expected {plain.dtype}"
    assert actual.shape == plain.shape == exact.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(plain.shape)}"
    )
    actual, plain, exact = actual.detach(), plain.detach(), exact.detach()
    misplaced = _special(actual) != _special(plain)
    assert not misplaced.any(), (
        f"{name}: NaN or Inf unlike PyTorch's at {misplaced.nonzero()[:5].tolist()}"
    )
    finite = plain.isfinite() & exact.isfinite()
    if not finite.any():
        return 0.0
    exact = exact[finite]
    errors = (actual[finite].double() - exact).abs()
    error = errors.max().item()
    plain_error = (plain[finite].double() - exact).abs().max().item()
    largest = exact.abs().max().item()
    floor = 4 * torch.finfo(actual.dtype).eps * largest
    assert error <= 2 * plain_error + floor, (
        f"{name}: largest error {error:.3e} at {finite.nonzero()[errors.argmax()].tolist()}, "
        f"allowed 2 * {plain_error:.3e} (PyTorch's in {actual.dtype}) + {floor:.3e}; "
        f"max|exact| {largest:.3e}"
    )
    return error


def assert_op_parity(
    op: Callable[..., tuple[Tensor, ...]],
    plain: Callable[..., tuple[Tensor, ...]],
    exact: Callable[..., tuple[Tensor, ...]],
    outputs: Sequence[str],
    *draws: Mapping[str, Any],
) -> None:
    """Apply the rule to every output and to the gradient of every floating-point argument.

    `op` and `plain` are called with a draw's arguments as they are, strides included, `exact` with
    their values in float64; all three are differentiated along the same random cotangents. Errors
    are the largest of all draws: of a few elements alone, PyTorch's error may be small by luck.
    """
    results: tuple[list[dict[str, Tensor]], ...] = ([], [], [])
    for draw in draws:

        def compared_with(draw: Mapping[str, Any] = draw) -> tuple[Any, ...]:
            expected, cotangents = _differentiate(plain, draw, outputs)
            double = {k: v.double() if _floats(v) else v for k, v in draw.items()}
            is_double = any(tensor.dtype == torch.float64 for tensor in expected.values())
            with ExactSums() if is_double else nullcontext():
                wide = [cotangent.double() for cotangent in cotangents]
                reference, _ = _differentiate(exact, double, outputs, wide)
            return expected, cotangents, reference

        expected, cotangents, reference = once_for_all_levels(compared_with, draw)
        actual, _ = _differentiate(op, draw, outputs, cotangents)
        for kept, result in zip(results, (actual, expected, reference), strict=True):
            kept.append(result)
    for name in results[0][0]:
        assert_parity(name, *(torch.stack([d[name] for d in kept]) for kept in results))


class _Test:
    """The running test, and what tests of its function computed at other SIMD levels."""

    function: str | None = None
    case: str | None = None  # without the level
    calls = 0
    kept: ClassVar[dict[Any, Any]] = {}


def begin_test(function: str | None, case: str | None) -> None:
    """Called before each test; a case is the same at every level, and None has no levels."""
    if function != _Test.function:
        _Test.kept = {}
    _Test.function, _Test.case, _Test.calls = function, case, 0


def once_for_all_levels(compute: Callable[[], Result], *given: Any) -> Result:
    """What results are compared with, which is most of a test's time, is the same at every level.

    It is told apart by the case, how many such calls the test made before, and all that is given,
    values and strides: what was drawn otherwise is computed anew.
    """
    _Test.calls += 1
    if _Test.case is None:
        return compute()
    key = (_Test.case, _Test.calls, _digest(given))
    if key not in _Test.kept:
        _Test.kept[key] = compute()
    return _Test.kept[key]


def _digest(given: Any) -> Any:
    if isinstance(given, Tensor):
        data = given.detach().contiguous().view(-1).view(torch.uint8)
        layout = (given.dtype, given.shape, given.stride())
        return *layout, hashlib.blake2b(data.numpy(), digest_size=16).digest()
    if isinstance(given, Mapping):
        return tuple((key, _digest(value)) for key, value in given.items())
    if isinstance(given, (list, tuple)):
        return tuple(map(_digest, given))
    return given


def _differentiate(
    function: Callable[..., tuple[Tensor, ...]],
    arguments: Mapping[str, Any],
    outputs: Sequence[str],
    cotangents: Sequence[Tensor] | None = None,
) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
    """The outputs and gradients of a function by name, and the cotangents they were taken along."""
    leaves = {k: v.detach().requires_grad_() for k, v in arguments.items() if _floats(v)}
    values = function(**{**arguments, **leaves})
    if cotangents is None:
        generator = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(v.shape, generator=generator).to(v.dtype) for v in values]
    gradients = torch.autograd.grad(values, list(leaves.values()), cotangents)
    names = [*outputs, *(f"grad of {name}" for name in leaves)]
    results = [tensor.detach() for tensor in (*values, *gradients)]
    return dict(zip(names, results, strict=True)), cotangents


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors that a module returned."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [] if result is None else [tensor for part in result for tensor in tensors_of(part)]


def run_module(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs of a module at its own dtype and gradients of all it was given, by name."""
    leaves: dict[str, Tensor] = dict(module.named_parameters())
    prepared: dict[int, Tensor] = {}  # what was given twice is so again

    def prepare(name: str, value: Any) -> Any:
        if isinstance(value, PackedSequence):
            return value._replace(data=prepare(name, value.data))
        if not _floats(value):
            return value
        if id(value) not in prepared:
            leaves[name] = prepared[id(value)] = value.detach().to(dtype).requires_grad_()
        return prepared[id(value)]

    args = [prepare(f"argument {i}", value) for i, value in enumerate(args)]
    kwargs = {name: prepare(name, value) for name, value in kwargs.items()}
    outputs = tensors_of(module(*args, **kwargs))
    generator = torch.Generator().manual_seed(0)
    cotangents = [
        torch.randn(output.shape, generator=generator).to(torch.float32).to(dtype)
        for output in outputs
    ]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return {f"output {i}": output for i, output in enumerate(outputs)} | {
        f"grad of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def assert_module_parity(
    theirs: nn.Module,
    ours: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    draws: int = 64,
) -> None:
    """Apply the rule to every output of a module and to the gradients of its parameters and
    arguments.

    Errors are the largest of all draws of the parameters: the modules are small, and of a few
    elements alone PyTorch's error may be small by luck.
    """
    dtype = next(theirs.parameters()).dtype
    results: tuple[list[dict[str, Tensor]], ...] = ([], [], [])
    for draw in range(draws):
        if draw > 0:
            torch.manual_seed(draw)
            with torch.no_grad():
                for parameter in theirs.parameters():
                    parameter.uniform_(-(parameter.size(-1) ** -0.5), parameter.size(-1) ** -0.5)
            ours.load_state_dict(theirs.state_dict())
        plain = run_module(theirs, args, kwargs, dtype)
        exact = run_module(copy.deepcopy(theirs).double(), args, kwargs, torch.float64)
        actual = run_module(ours, args, kwargs, dtype)
        assert actual.keys() == plain.keys()
        for kept, result in zip(results, (actual, plain, exact), strict=True):
            kept.append(result)
    for name in results[0][0]:
        assert_parity(name, *(torch.stack([d[name].detach() for d in kept]) for kept in results))


class ExactSums(TorchDispatchMode):
    """Rounds float64 matrix products and sums once, as if they were added in infinite precision.

    Added in float64, those of a reference err as much as those of the float64 kernel that is
    measured against it.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (aten.mm.default, aten.bmm.default):
            return _exact_product(*args)
        if func is aten.addmm.default and not kwargs:
            return args[0] + _exact_product(*args[1:])
        if func is aten.sum.dim_IntList and args[0].dim() == 2 and args[1] == [0]:
            total = _exact_product(args[0].new_ones(1, len(args[0])), args[0])
            return total if args[2:] == (True,) else total[0]
        return func(*args, **(kwargs or {}))


def _exact_product(a: Tensor, b: Tensor) -> Tensor:
    # Rows of a and columns of b are cut into slices of 20 bits: products of two slices are sums of
    # 40-bit integers, which float64 adds without rounding up to 2^13 of them. (Ozaki et al. 2012,
    # https://doi.org/10.1007/s11075-011-9478-1)
    if a.size(-1) > 2**13 or not (a.isfinite().all() and b.isfinite().all()):
        return a @ b
    left, right = _slices(a, -1), _slices(b, -2)
    total = torch.zeros_like(a @ b)
    for order in reversed(range(5)):  # the smallest first
        for i in range(max(0, order - 2), min(3, order + 1)):
            total = total + left[i] @ right[order - i]
    return total


def _slices(values: Tensor, dim: int) -> list[Tensor]:
    slices = []
    for _ in range(3):
        largest = (
            values.abs().amax(dim, keepdim=True) if values.size(dim) else values.sum(dim, True)
        )
        unit = torch.exp2(torch.frexp(largest).exponent.double() - 20)
        slices.append((values / unit).round() * unit)
        values = values - slices[-1]
    return slices


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _special(tensor: Tensor) -> Tensor:
    """1 for NaN, 2 for Inf, 3 for -Inf, 0 elsewhere."""
    return tensor.isnan() + 2 * tensor.isposinf() + 3 * tensor.isneginf()
