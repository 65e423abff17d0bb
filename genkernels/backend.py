"""Which kernel runs an op, and why.

Backends: ``"cpp"`` (the compiled CPU kernels), ``"triton"`` (GPU kernels) and ``"reference"``
(plain PyTorch). Left to itself an op takes the first that can run its arguments, in that order, and
warns once if that is the reference. ``use_backend`` or the environment variable
``GENKERNELS_BACKEND`` asks for one; an op that it cannot run then raises. ``GENKERNELS_STRICT=1``
makes every fall back to the reference raise.

An op whose reference is PyTorch's own op, as fast as the kernel for some arguments, hands those
over: that is no fall back, and neither warns nor raises.
"""

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import triton

BACKENDS = ("cpp", "triton", "reference")
CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_FLOAT16_OPS = (  # whose compiled kernel takes that, too
    "dropout",
    "scaled_dot_product_attention",
    "varlen_attn",
)
_CUDA_OPS = ("gru", "gru_cell", "bidirectional_gru")  # of the extension's own CUDA kernels
_CPU = torch.device("cpu")
# Triton's interpreter then stands in the place of the compiled kernels.
_is_interpreted = triton.IS_INTERPRETED

_python_calls: Counter[tuple[str, str]] = Counter()
_warned: set[tuple[str, str]] = set()
_handovers: dict[str, Callable[..., str | None]] = {}


def _load_extension() -> tuple[Any, str]:
    try:
        from . import _C
    except ImportError as error:
        return None, f"the compiled extension genkernels._C could not be loaded ({error})"
    return _C, ""


def _one_of(variable: str, allowed: tuple[str, ...] | list[str]) -> str | None:
    value = os.environ.get(variable)
    if value and value not in allowed:
        raise ImportError(f"{variable}={value}: expected one of {', '.join(allowed)}")
    return value or None


_extension, _extension_error = _load_extension()
# What its CUDA kernels are compiled for, as 900 for sm_90; nothing where it was built without.
CUDA_ARCHITECTURES: tuple[int, ...] = tuple(getattr(_extension, "cuda_architectures", ()))
# PyTorch's own float32 and float64 products run close to the CPU's limit where they are MKL's, and
# MKL takes its fastest code on Intel's CPUs alone.
MKL_IS_AT_ITS_BEST = (
    _extension is not None and _extension.is_intel() and torch.backends.mkl.is_available()
)
_requested: str | None = _one_of("GENKERNELS_BACKEND", BACKENDS)
_strict = os.environ.get("GENKERNELS_STRICT", "0") not in ("", "0")


@dataclass(frozen=True)
class Explanation:
    """Which backend an op would take for given arguments, and what stands against the others."""

    op: str
    backend: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'no backend can run this'}"]
        lines += [f"  {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def _has_kernel(op: str, dtype: torch.dtype) -> bool:
    return dtype in CPP_DTYPES or (dtype == torch.float16 and op in _FLOAT16_OPS)


def _obstacle(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run an op on this device in this dtype; None if it can."""
    if backend == "cpp":
        if device.type == "cuda" and op in _CUDA_OPS:
            return _cuda_obstacle(device, dtype)
        if device.type != "cpu":
            return f"it runs on CPU tensors, and these are on {device.type}"
        if _extension is None:
            return _extension_error
        if not _has_kernel(op, dtype):
            return f"it has no kernel for {dtype}"
    if backend == "triton":
        return triton.obstacle(op, device, dtype)
    return None


def _cuda_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if _extension is None:
        return _extension_error
    if not CUDA_ARCHITECTURES:
        return "the extension was built without CUDA kernels"
    if triton.is_installed():
        return "its CUDA kernels are for where Triton is missing"
    if dtype not in (*triton.DTYPES, torch.float64):
        return f"it has no CUDA kernel for {dtype}"
    if torch.cuda.is_available():  # fake tensors are on no GPU
        properties = torch.cuda.get_device_properties(device)
        architecture = 100 * properties.major + 10 * properties.minor
        if architecture < min(CUDA_ARCHITECTURES):
            first = f"sm_{min(CUDA_ARCHITECTURES) // 10}"
            return f"its CUDA kernels are for {first} and later, not sm_{architecture // 10}"
    return None


def _order(device: torch.device) -> tuple[str, ...]:
    """Backends, the first that can run first."""
    return BACKENDS if device.type == "cpu" and not _is_interpreted else ("triton", *BACKENDS)


def hands_over(op: str) -> Callable[[Callable[..., str | None]], Callable[..., str | None]]:
    """Registers the function that says of an op's arguments why they are left to PyTorch's own op;
    None where the kernel runs. Devices and dtypes without a kernel need not be looked at."""

    def register(reason: Callable[..., str | None]) -> Callable[..., str | None]:
        _handovers[op] = reason
        return reason

    return register


def prefers_compiled(device: torch.device) -> bool:
    """Whether tensors there go to the compiled kernels, which alone hand over what they are no
    faster at."""
    return device.type == "cpu" and not _is_interpreted and _requested != "triton"


def _is_handed_over(op: str, backend: str, device: torch.device, handover: str | None) -> bool:
    """Whether the backend has a kernel there, and leaves these arguments to PyTorch's own op."""
    is_there = backend != "reference" and _obstacle(op, backend, device, torch.float32) is None
    return handover is not None and is_there


def _falls_back_freely(op: str) -> bool:
    """Whether the reference is PyTorch's own op. That kernels were never built is said even so."""
    return op in _handovers and _extension is not None


def select(op: str, device: torch.device, dtype: torch.dtype, handover: str | None = None) -> str:
    """The backend that runs `op`. Warns once for each op and reason when that is the reference and
    nobody asked for it. `handover` is what the op's function of `hands_over` returned.

    Raises:
        RuntimeError: the requested backend cannot run it, or it would fall back and
            GENKERNELS_STRICT is set.
    """
    is_plain = _requested is None and handover is None and device == _CPU and not _is_interpreted
    if is_plain and _extension is not None and _has_kernel(op, dtype):
        return "cpp"  # found without asking further, which takes a microsecond
    if _requested is not None:
        obstacle = _obstacle(op, _requested, device, dtype)
        if _is_handed_over(op, _requested, device, handover):
            return "reference"
        if obstacle is not None:
            raise RuntimeError(
                f"genkernels.{op}: backend {_requested!r} was asked for, but {obstacle}"
            )
        return _requested
    if device.type == "meta" or handover is not None:  # meta has shapes only: nothing runs
        return "reference"
    able = [name for name in _order(device) if _obstacle(op, name, device, dtype) is None]
    if able[0] != "reference" or _falls_back_freely(op):
        return able[0]
    preferred = "cpp" if device.type == "cpu" else "triton"
    obstacle = _obstacle(op, preferred, device, dtype)
    assert obstacle is not None
    if _strict:
        raise RuntimeError(
            f"genkernels.{op}: GENKERNELS_STRICT is set, and backend {preferred!r} cannot run: "
            f"{obstacle}"
        )
    if not torch.compiler.is_compiling() and (op, obstacle) not in _warned:
        _warned.add((op, obstacle))
        warnings.warn(f"genkernels.{op} runs the plain PyTorch reference: {obstacle}", stacklevel=3)
    return "reference"


def count(op: str, backend: str) -> None:
    """Notes one call of a kernel that is written in Python; compiled kernels count their own."""
    if not torch.compiler.is_compiling():
        _python_calls[op, backend] += 1


def stats(reset: bool = False) -> dict[tuple[str, str], int]:
    """How often each op ran on each backend in this process.

    Args:
        reset: set all counts back to zero after reading them.

    Returns:
        ``{(op, backend): calls}``, for example ``{("gru_forward", "cpp"): 3}``; forward and
        backward are ops of their own, and the reference counts one call for its whole op. What
        ``torch.compile`` inlines of the reference is not counted.
    """
    calls = {key: number for key, number in _python_calls.items() if number}
    if _extension is not None:
        calls |= {(op, "cpp"): number for op, number in _extension.call_counts().items() if number}
    if reset:
        _python_calls.clear()
        if _extension is not None:
            _extension.reset_call_counts()
    return calls


def empty_cache() -> None:
    """Hands the memory that ops keep for their next calls back to the system.

    Of blocks of 1 MiB and more (scratch, gradients, what is saved for the backward pass) at most
    1 GiB that nobody uses is kept, and the system may take all but 64 MiB of that when memory runs
    short. Blocks of tensors that are alive stay. Linux only; elsewhere nothing is kept.
    """
    if _extension is not None:
        _extension.empty_cache()


def explain(op: str | Any, *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend `op` would take for these arguments, and why the others would not run.

    Args:
        op: a public op (``genkernels.gru``) or its name (``"gru"``).
        args, kwargs: what the op would be called with; nothing is computed.

    Raises:
        ValueError: an unknown op, or no tensor among the arguments.
    """
    from . import ops

    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in ops.__all__:
        raise ValueError(f"op: expected one of {', '.join(ops.__all__)}, got {name!r}")
    tensor = next(
        (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None
    )
    if tensor is None:
        raise ValueError("explain needs the tensors that the op would be called with")
    (cast,) = ops.library.autocast(tensor.device.type, tensor.new_empty(0))
    assert cast is not None
    handover = _handovers[name](*args, **kwargs) if name in _handovers else None
    obstacles = {
        backend: _obstacle(name, backend, tensor.device, cast.dtype) for backend in BACKENDS
    }
    handed_over = {b for b in BACKENDS if _is_handed_over(name, b, tensor.device, handover)}
    obstacles |= dict.fromkeys(handed_over, handover)
    is_strict = _strict and handover is None and not _falls_back_freely(name)
    able = [backend for backend in _order(tensor.device) if obstacles[backend] is None]
    if _requested is not None and _requested not in handed_over:
        able = [backend for backend in able if backend == _requested]
    elif is_strict:
        able = [backend for backend in able if backend != "reference"]
    chosen = able[0] if able else None
    reasons = {}
    for backend, obstacle in obstacles.items():
        if backend == chosen:
            is_compiled = backend == "cpp" and tensor.device.type == "cpu"
            level = f" at SIMD level {simd_level()}" if is_compiled else ""
            reasons[backend] = f"runs{level}"
        elif obstacle is not None:
            reasons[backend] = obstacle
        elif _requested is not None:
            reasons[backend] = f"backend {_requested!r} was asked for"
        elif is_strict and backend == "reference":
            reasons[backend] = "GENKERNELS_STRICT is set"
        else:
            reasons[backend] = f"{chosen} comes before it"
    return Explanation(name, chosen, reasons)


class use_backend(contextlib.AbstractContextManager):
    """Makes every op use one backend, from the call on or for a ``with`` block. Process-wide.

    Args:
        backend: ``"cpp"``, ``"triton"``, ``"reference"``, or None to let each op choose.

    Raises:
        ValueError: an unknown backend.
    """

    def __init__(self, backend: str | None) -> None:
        global _requested
        if backend is not None and backend not in BACKENDS:
            raise ValueError(
                f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}"
            )
        self._previous = _requested
        _requested = backend

    def __exit__(self, *exc: object) -> None:
        global _requested
        _requested = self._previous


def simd_levels() -> list[str]:
    """The SIMD levels of this build that this CPU has, lowest first; none without the extension."""
    return [] if _extension is None else _extension.simd_levels()


def simd_level() -> str | None:
    """The SIMD level that the CPU kernels run at; None without the extension."""
    return None if _extension is None else _extension.simd_level()


@contextlib.contextmanager
def use_simd(level: str) -> Iterator[None]:
    """Runs the CPU kernels of one SIMD level inside a ``with`` block. Process-wide; meant for tests
    and comparisons.

    Raises:
        ValueError: a level that this build or this CPU lacks.
    """
    if level not in simd_levels():
        raise ValueError(f"level: expected one of {', '.join(simd_levels())}, got {level!r}")
    previous = _extension.simd_level()
    _extension.select_simd_level(level)
    try:
        yield
    finally:
        _extension.select_simd_level(previous)


if _extension is not None and (_level := _one_of("GENKERNELS_SIMD", simd_levels())):
    _extension.select_simd_level(_level)
