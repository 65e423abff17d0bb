"""Drop-in modules: the names, arguments, parameters and state_dict of torch.nn's."""

from .gru import GRU, GRUCell
from .linear import Linear
from .linear_cross_entropy import LinearCrossEntropyLoss

__all__ = ["GRU", "GRUCell", "Linear", "LinearCrossEntropyLoss"]
