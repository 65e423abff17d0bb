"""torch.nn.RNN on the fused op."""

import torch
from torch import Tensor

from ..ops import rnn
from .recurrent import Recurrent


class RNN(Recurrent):
    """A recurrent unit with tanh, of any number of layers, one or two directions, dense or packed
    sequences.

    Equivalent to: ``torch.nn.RNN(input_size, hidden_size, ...)``, with the same arguments, the same
    parameters and, for the same seed, the same initial values and dropout masks. A state_dict of
    one loads into the other.

    ``isinstance(module, torch.nn.RNN)`` is False: torch.compile stops at anything that says it is
    one. Look for ``torch.nn.RNNBase`` with ``mode == "RNN_TANH"``.

    Args:
        input_size, hidden_size: features of the input (I) and of the state (H).
        num_layers: layers stacked on one another. Default 1.
        nonlinearity: ``"tanh"``, the default. There is no kernel for ``"relu"``: ``torch.nn.RNN``
            has it.
        bias: whether there are ``bias_ih`` and ``bias_hh``. Default True.
        batch_first: input and output are [B, T, ...] instead of [T, B, ...]; states are not.
            Default False.
        dropout: probability of zeroing an element of the output of each layer but the last, in
            training. Default 0.
        bidirectional: a second direction runs from the end; output is [.., 2H]. Default False.

    Shapes of ``forward(input, hx=None)``:
        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a ``PackedSequence``.
        hx: [num_layers * directions, B, H] (unbatched without B); zeros if None.
        returns ``(output, h_n)``: output as input with I replaced by H * directions, h_n as hx.

    Raises:
        NotImplementedError: ``nonlinearity="relu"``.
        ValueError: another nonlinearity; input has other than 2 or 3 dimensions, or another dtype
            than the weights.
        RuntimeError: a shape that does not fit; the message names the argument and both shapes.
    """

    _name = "RNN"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if nonlinearity == "relu":
            raise NotImplementedError(
                "RNN: nonlinearity: 'relu' has no kernel; use torch.nn.RNN, or 'tanh'"
            )
        if nonlinearity != "tanh":
            raise ValueError(f"RNN: nonlinearity: expected 'tanh', got {nonlinearity!r}")
        super().__init__(
            "RNN_TANH",
            input_size,
            hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
        )
        self.nonlinearity = nonlinearity

    def _run_one(
        self, name: str, input: Tensor, hx: Tensor, batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return rnn(input, hx, *self._weights_of(name), batch_sizes=batch_sizes)

    def _run_both(
        self, name: str, input: Tensor, hx: Tensor, batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        output, h = self._run_one(name, input, hx[0], batch_sizes)
        weights = self._weights_of(f"{name}_reverse")
        reverse, h_reverse = rnn(input, hx[1], *weights, batch_sizes=batch_sizes, reverse=True)
        return torch.cat([output, reverse], -1), torch.stack([h, h_reverse])
