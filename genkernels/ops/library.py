"""What all ops share in their registration with PyTorch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backend

_library = torch.library.Library("genkernels", "DEF")


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines a raw op and returns it.

    The schema stands here once. The compiled extension has attached its kernel to the CPU key under
    the same name; every other device, and a CPU without the extension, gets the reference.
    """
    name = schema.partition("(")[0]

    def run_reference(*args: Any) -> Any:
        backend.count(name, "reference")
        return reference(*args)

    _library.define(schema)
    _library.impl(name, run_reference, "CompositeExplicitAutograd")
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


def is_autocast_enabled(device: str) -> bool:
    # Devices without an autocast of their own, such as meta, make torch's question an error. The
    # compiler of torch 2.10 cannot trace what asks for that.
    is_available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return is_available and torch.is_autocast_enabled(device)


def needs_autograd(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way.

    A raw op would ignore it and give a tangent of zero. An autograd.Function has a rule for it, or
    raises NotImplementedError as for forward mode.
    """
    return (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


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
