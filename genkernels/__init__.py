"""Fused kernels for training generative models with PyTorch."""

import torch  # noqa: F401  the extension finds libtorch_cpu because torch has loaded it

from . import nn, ops
from .backend import empty_cache, explain, stats, use_backend
from .nn.freeze import freeze, unfreeze
from .ops import (
    bidirectional_gru,
    dropout,
    gru,
    gru_cell,
    linear,
    linear_cross_entropy,
    linear_log_prob,
    rnn,
    scaled_dot_product_attention,
    varlen_attn,
)

__all__ = [
    "__version__",
    "bidirectional_gru",
    "dropout",
    "empty_cache",
    "explain",
    "freeze",
    "gru",
    "gru_cell",
    "linear",
    "linear_cross_entropy",
    "linear_log_prob",
    "nn",
    "ops",
    "rnn",
    "scaled_dot_product_attention",
    "stats",
    "unfreeze",
    "use_backend",
    "varlen_attn",
]
__version__ = "0.1.0"
