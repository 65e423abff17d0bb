"""Every op's whole wiring: schema, checks, fake, autograd, autocast and the choice of a backend."""

from .attention import scaled_dot_product_attention
from .dropout import dropout
from .gru import bidirectional_gru, gru, gru_cell
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy, linear_log_prob
from .rnn import rnn
from .varlen_attn import varlen_attn

__all__ = [
    "bidirectional_gru",
    "dropout",
    "gru",
    "gru_cell",
    "linear",
    "linear_cross_entropy",
    "linear_log_prob",
    "rnn",
    "scaled_dot_product_attention",
    "varlen_attn",
]
