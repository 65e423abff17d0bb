"""Every op's definition in plain PyTorch, short enough to read as its specification."""

from .gru import gru, gru_cell
from .linear import linear

__all__ = ["gru", "gru_cell", "linear"]
