"""Launches of Triton kernels.

Triton's own launch looks at each argument to find what it has compiled for such ones. Of a kernel
with 55 arguments that takes the CPU 60 microseconds, more than a GPU takes for many a launch. Here
what was compiled is found by a key that is made in 6 and tells apart whatever Triton does: dtypes,
constants, tensors that begin at multiples of 16 bytes, and numbers that are 1, that are multiples
of 16, or that 32 or 64 bits with a sign do not hold. Tensors are handed to the driver as addresses,
so that it does not ask of each where it lies: that they are the GPU's the launchers have checked.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

# Of these versions it is known what they tell apart; on AMD's GPUs the sizes of tensors, too.
_IS_KNOWN = triton.__version__.startswith(("3.5.", "3.6.", "3.7.")) and torch.version.hip is None
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], values: Sequence[Any], options: Mapping[str, Any]
) -> Any:
    """Equivalent to: ``kernel[grid](*values, **options)``, of all arguments, in order, which are
    tensors, numbers, None, and constants that can be hashed. Returns what was compiled for them;
    None from the interpreter and from a Triton that is not known."""
    if not _IS_KNOWN or not isinstance(kernel, triton.JITFunction):  # the interpreter's is none
        kernel[grid](*values, **options)
        return None
    addresses = _addresses(values)
    told_apart = map(_told_apart, values, addresses, _are_constants(kernel))
    key = (kernel.fn, driver.active.get_current_device(), *options.items(), *told_apart)
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = _compiled[key] = kernel[grid](*values, **options)
    else:
        compiled[_three(grid)](*addresses)
    return compiled


def launch_each(
    kernel: Any,
    steps: Iterable[tuple[tuple[int, ...], Sequence[Any]]],
    options: Mapping[str, Any],
    regular: int = 0,
) -> None:
    """A launch for each step, of its grid and arguments. `regular` is the number of steps if each
    from the third on differs from the one before in addresses alone, by the same multiples of 16
    bytes as the third from the second: then `steps` is read up to the third, and a launch takes 4
    microseconds."""
    before: Sequence[Any] = ()
    for number, (grid, values) in enumerate(steps):
        compiled = launch(kernel, grid, values, options)
        if number == 2 and regular > 3 and compiled is not None:
            run, stream = compiled[_three(grid)], _stream()
            ranges = map(_going_on, _addresses(before), _addresses(values))
            for rest in itertools.islice(zip(*ranges, strict=False), 1, regular - 2):
                run(*rest, stream=stream)
            return
        before = values


def _going_on(before: Any, value: Any) -> Iterable[Any]:
    if isinstance(value, int) and value != before:
        return itertools.count(value, value - before)
    return itertools.repeat(value)


def _addresses(values: Sequence[Any]) -> list[Any]:
    return [value.data_ptr() if isinstance(value, Tensor) else value for value in values]


def _three(grid: tuple[int, ...]) -> tuple[int, ...]:
    return (*grid, 1, 1)[:3]


def _stream() -> int:
    return driver.active.get_current_stream(driver.active.get_current_device())


def _told_apart(value: Any, address: Any, is_constant: bool) -> Any:
    if is_constant or value is None or isinstance(value, bool):
        return type(value), value  # True is not 1 there
    if isinstance(value, Tensor):
        return value.dtype, address % 16 == 0
    if isinstance(value, int):
        bits = 32 if -(2**31) <= value < 2**31 else 64 if value < 2**63 else -64
        return 1 if value == 1 else (value % 16 == 0, bits)
    return type(value)


_constants: dict[Any, tuple[bool, ...]] = {}


def _are_constants(kernel: Any) -> tuple[bool, ...]:
    found = _constants.get(kernel.fn)  # the kernel's own hash takes a microsecond
    if found is None:
        found = _constants[kernel.fn] = tuple(p.is_constexpr for p in kernel.params)
    return found
