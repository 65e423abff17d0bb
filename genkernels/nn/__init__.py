"""Drop-in modules: the names, arguments, parameters and state_dict of torch.nn's."""

from .attention import MultiheadAttention
from .dropout import Dropout
from .gru import GRU, GRUCell
from .linear import Linear
from .linear_cross_entropy import LinearCrossEntropyLoss
from .rnn import RNN
from .transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "GRU",
    "RNN",
    "Dropout",
    "GRUCell",
    "Linear",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
