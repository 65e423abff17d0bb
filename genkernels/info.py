"""`python -m genkernels.info`: what is installed, what this CPU has and which kernels can run."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

from . import __version__, backend, triton

VARIABLES = {
    "GENKERNELS_BACKEND": "any that can run",
    "GENKERNELS_SIMD": "the fastest usable level",
    "GENKERNELS_STRICT": "fall back to the reference with a warning",
}
# Of the many that a CPU reports, those that a kernel or its limit depends on.
FEATURES = (
    *("sse2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_tile", "amx_bf16"),
    *("asimd", "asimdhp", "bf16", "sve", "sve2", "svebf16"),
)


def _version(package: str, missing: str = "not installed") -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return missing


def _cpu() -> tuple[str, str]:
    """Model and features of the first CPU, as Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), "unknown on this system"
    fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    flags = fields.get("flags", fields.get("Features", "")).split()
    model = fields.get("model name", platform.machine())
    return model, " ".join(feature for feature in FEATURES if feature in flags)


def _build() -> dict[str, str]:
    extension, error = backend._extension, backend._extension_error
    if extension is None:
        return {"extension": error}
    return {
        "extension": extension.__file__,
        "compiler": extension.compiler,
        "torch headers": f"{extension.torch_version}, runs on torch >= 2.10",
        "CUDA kernels": " ".join(f"sm_{a // 10}" for a in backend.CUDA_ARCHITECTURES) or "none",
        "SIMD levels built": " ".join(extension.built_simd_levels()),
        "SIMD levels usable": " ".join(backend.simd_levels()),
        "SIMD level active": str(backend.simd_level()),
    }


def sections() -> dict[str, dict[str, str]]:
    """Everything that `main` prints: title, then name and value."""
    model, features = _cpu()
    backends = {}
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for name, reason in backend.explain("gru", torch.empty(0, device=device)).reasons.items():
            backends[f"{name} ({device})"] = reason
    return {
        "Versions": {
            "genkernels": __version__,
            "torch": torch.__version__,
            "triton": _version("triton", triton.MISSING),
            "python": f"{platform.python_version()} ({sys.executable})",
            "system": platform.platform(),
        },
        "CPU": {
            "model": model,
            "features": features,
            "threads": f"{torch.get_num_threads()} of {os.cpu_count()} (torch.set_num_threads)",
        },
        "Compiled kernels": _build(),
        "Backends, float32": backends,
        "Environment": {
            name: os.environ.get(name) or f"not set: {default}"
            for name, default in VARIABLES.items()
        },
    }


def main() -> None:
    for title, rows in sections().items():
        print(title)
        for name, value in rows.items():
            print(f"  {name:<19} {value}")


if __name__ == "__main__":
    main()
