"""Fused kernels for training generative models with PyTorch."""

import torch  # noqa: F401  the extension finds libtorch_cpu because torch has loaded it

from . import nn, ops
from .backend import explain, stats, use_backend
from .ops import gru, gru_cell, linear

__all__ = [
    "__version__",
    "explain",
    "gru",
    "gru_cell",
    "linear",
    "nn",
    "ops",
    "stats",
    "use_backend",
]
__version__ = "0.1.0"
