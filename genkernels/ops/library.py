"""What all ops share in their registration with PyTorch."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backend, triton

_library = torch.library.Library("genkernels", "DEF")


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    on_cuda: Callable[..., Any] | None = None,
) -> Any:
    """Defines a raw op and returns it.

    The schema stands here once. The compiled extension has attached its kernel to the CPU key under
    the same name, and a Triton kernel is attached to CUDA's, or `on_cuda`, which is made of the
    extension's CUDA kernels, where Triton is missing and those were built; every other device, and
    a CPU without the extension, gets the reference.
    """
    name = schema.partition("(")[0]

    def run_reference(*args: Any) -> Any:
        backend.count(name, "reference")
        return reference(*args)

    _library.define(schema)
    _library.impl(name, run_reference, "CompositeExplicitAutograd")
    triton.register(_library, name, run_reference)
    if on_cuda is not None and backend.CUDA_ARCHITECTURES and not triton.is_installed():
        _library.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"genkernels::{name}", fake, lib=_library)
    return getattr(torch.ops.genkernels, name).default


def autocast(device: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts floating-point tensors as PyTorch's autocast casts the arguments of a matrix product;
    float64 stays."""
    if not is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def autocast_dtype(input: Tensor) -> torch.dtype:
    """The dtype that the kernel will be called with."""
    if is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype


def described(reason: Callable[[], str]) -> str:
    """The reason for handing over. Within torch.compile without its numbers: to write one down
    makes a graph for that number alone."""
    return "PyTorch's own is as fast" if torch.compiler.is_compiling() else reason()


def is_autocast_enabled(device: str) -> bool:
    if device != "cpu" and not torch.compiler.is_compiling():
        # Devices without an autocast of their own, such as meta, make torch's question an error.
        # The compiler of torch 2.10 cannot trace what asks for that.
        return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.is_autocast_enabled(device)


def draw_seed(device: torch.device) -> Tensor:
    """A key of Philox, int64 [1], from PyTorch's default generator."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64).to(device)


def needs_autograd(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110  a generator takes twice as long, at each small product
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way.

    A raw op would ignore it and give a tangent of zero. An autograd.Function has a rule for it, or
    raises NotImplementedError as for forward mode.
    """
    return (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` for a function with a `setup_context`, which torch.func needs.

    At every call PyTorch binds the arguments of such a one to its signature, which takes longer
    than a small kernel: 25 microseconds. Where no transform is under way, a form without it runs.
    """
    if torch.compiler.is_compiling() or is_transformed():
        return function.apply(*args)
    return _eager(function).apply(*args)


@functools.cache
def _eager(function: Any) -> Any:
    def forward(ctx: Any, *args: Any) -> Any:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.Function,), members)


def needed(gradients: Any, is_needed: Any) -> list[Tensor | None]:
    """Gradients, and None for those that nobody needs."""
    return [gradient if need else None for gradient, need in zip(gradients, is_needed, strict=True)]


def map_slices(
    function: type[torch.autograd.Function],
    info: Any,
    in_dims: tuple[int | None, ...],
    args: tuple[Any, ...],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """A vmap rule: one call for each slice of the mapped dimension. The kernels are batched
    already, so what reaches this is mostly per-sample gradients, where each slice has weights'
    gradients of its own."""
    results = []
    for i in range(info.batch_size):
        slices = [
            arg if dim is None else arg.select(dim, i)
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        results.append(function.apply(*slices))
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
