"""GPU kernels in Triton, under the same raw ops as the compiled CPU kernels.

A module here has the kernels of an op, and launchers: functions with the raw ops' own signatures,
results and saved tensors, so that one autograd formula serves every device. They are registered
for CUDA tensors (and ROCm's, whose key that is) without importing Triton, which the first call
does. Where TRITON_INTERPRET=1 is set when genkernels is imported, Triton's interpreter runs them on
CPU tensors, too: that is how they are tested where there is no GPU.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # of NVIDIA's GPUs that the kernels are made for, at least
MISSING = "Triton is not installed (pip install 'genkernels[triton]')"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The public ops of each module, and the raw ops that it has launchers for.
_OPS = {
    "gru": ("gru", "gru_cell", "bidirectional_gru"),
    "attention": ("scaled_dot_product_attention", "varlen_attn"),
    "linear_cross_entropy": ("linear_cross_entropy", "linear_log_prob"),
}
_RAW_OPS = {
    f"{op}_{pass_}": module
    for module, ops in (
        ("gru", ("gru", "gru_cell", "bidirectional_gru")),
        ("attention", ("attention", "varlen_attn")),
    )
    for op in ops
    for pass_ in ("forward", "backward")
} | {"linear_cross_entropy_pass": "linear_cross_entropy"}
MODULES = tuple(_OPS)  # each has KERNELS, its launchers by raw op, and configs(architecture)


class Config(NamedTuple):
    """A kernel as its launcher runs it: the dtypes of its tensors, its constants, the compiler's
    options, and those of its other arguments, which are numbers, that are multiples of 16, for
    which the compiler makes wider loads. None of an optional tensor is a constant. Whether it
    multiplies matrices, and why its tiles are small, if they are, is asked of what is compiled."""

    name: str
    dtype: torch.dtype
    kernel: Any
    tensors: dict[str, torch.dtype]
    constants: dict[str, Any]
    options: dict[str, int]
    divisible: tuple[str, ...] = ()
    has_products: bool = True
    reason: str = ""


_IS_INSTALLED = importlib.util.find_spec("triton") is not None  # torch.compile cannot trace that


def is_installed() -> bool:
    return _IS_INSTALLED


def obstacle(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot run an op on this device in this dtype; None if it can."""
    if not any(op in ops for ops in _OPS.values()):
        return "this version has no Triton kernel for it"
    if device.type != "cuda" and not (IS_INTERPRETED and device.type == "cpu"):
        return f"it runs on CUDA tensors, and these are on {device.type}"
    if not is_installed():
        return MISSING
    if device.type == "cuda" and torch.cuda.is_available() and torch.version.hip is None:
        # Read by PyTorch once. torch.compile knows this as a constant, and not the capability.
        properties = torch.cuda.get_device_properties(device)
        capability = properties.major, properties.minor
        if capability < CAPABILITY:
            needed, own = (".".join(map(str, each)) for each in (CAPABILITY, capability))
            return f"the GPU has compute capability {own}, and its kernels need {needed}"
    if dtype not in DTYPES:
        return f"it has no kernel for {dtype}"
    return None


def architecture_of(device: torch.device) -> str:
    """Whose configurations a kernel takes there; what is interpreted runs as on the first."""
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def check_like(
    op: str,
    name: str,
    tensor: Tensor | None,
    shape: Sequence[int],
    input: Tensor,
    dtype: torch.dtype | None = None,
) -> None:
    """Kernels trust what they are given: a size that does not fit would be a read out of bounds."""
    if tensor is None:
        return
    expected = (list(shape), dtype or input.dtype, input.device)
    got = (list(tensor.shape), tensor.dtype, tensor.device)
    if got != expected:
        raise RuntimeError(
            f"genkernels.{op}: {name}: expected {' '.join(map(str, expected))}, got "
            f"{' '.join(map(str, got))}"
        )


def register(
    library: torch.library.Library, raw_op: str, run_reference: Callable[..., Any]
) -> None:
    """Attaches the launcher of a raw op, if there is one. Other dtypes are the reference's."""
    if raw_op not in _RAW_OPS or not is_installed():
        return

    def launch(*args: Any) -> Any:
        from .. import backend

        tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
        if tensor.dtype not in DTYPES:
            return run_reference(*args)
        backend.count(raw_op, "triton")
        module = importlib.import_module(f".{_RAW_OPS[raw_op]}", __name__)
        return module.KERNELS[raw_op](*args)

    library.impl(raw_op, launch, "CUDA")
    if IS_INTERPRETED:
        with warnings.catch_warnings():  # that it takes the compiled kernel's place
            warnings.simplefilter("ignore")
            library.impl(raw_op, launch, "CPU", allow_override=True)
