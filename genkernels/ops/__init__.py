"""Every op's whole wiring: schema, checks, fake, autograd, autocast and the choice of a backend."""

from .gru import gru, gru_cell

__all__ = ["gru", "gru_cell"]
