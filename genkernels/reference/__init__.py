"""Every op's definition in plain PyTorch, short enough to read as its specification."""

from .attention import attention_backward, attention_double_backward, attention_forward
from .dropout import dropout
from .gru import gru, gru_cell
from .linear import activate, linear, linear_backward, through_activation
from .linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_pass,
    linear_log_prob,
)
from .rnn import rnn
from .varlen_attn import (
    varlen_attn_backward,
    varlen_attn_double_backward,
    varlen_attn_forward,
)

__all__ = [
    "activate",
    "attention_backward",
    "attention_double_backward",
    "attention_forward",
    "dropout",
    "gru",
    "gru_cell",
    "linear",
    "linear_backward",
    "linear_cross_entropy",
    "linear_cross_entropy_pass",
    "linear_log_prob",
    "rnn",
    "through_activation",
    "varlen_attn_backward",
    "varlen_attn_double_backward",
    "varlen_attn_forward",
]
