"""torch.nn.GRU and torch.nn.GRUCell on the fused ops."""

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNCellBase

from ..ops import bidirectional_gru, gru, gru_cell
from .freeze import PackedWeights
from .recurrent import Recurrent


class GRU(PackedWeights, Recurrent):
    """A gated recurrent unit of any number of layers, one or two directions, dense or packed
    sequences.

    Equivalent to: ``torch.nn.GRU(input_size, hidden_size, ...)``, with the same arguments, the same
    parameters and, for the same seed, the same initial values and dropout masks. A state_dict of
    one loads into the other.

    ``isinstance(module, torch.nn.GRU)`` is False: torch.compile stops at anything that says it is
    one. Look for ``torch.nn.RNNBase`` with ``mode == "GRU"``.

    Args:
        input_size, hidden_size: features of the input (I) and of the state (H).
        num_layers: layers stacked on one another. Default 1.
        bias: whether there are ``bias_ih`` and ``bias_hh``. Default True.
        batch_first: input and output are [B, T, ...] instead of [T, B, ...]; states are not.
            Default False.
        dropout: probability of zeroing an element of the output of each layer but the last, in
            training. Default 0.
        bidirectional: a second direction runs from the end; output is [.., 2H]. Default False.
        recompute: save only the output for the backward pass, which then takes about 1.4 times as
            long; otherwise five times as much. Not one of ``torch.nn.GRU``'s. Default False.

    Shapes of ``forward(input, hx=None)``:
        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a ``PackedSequence``.
        hx: [num_layers * directions, B, H] (unbatched without B); zeros if None.
        returns ``(output, h_n)``: output as input with I replaced by H * directions, h_n as hx.

    Raises:
        ValueError: input has other than 2 or 3 dimensions, or another dtype than the weights.
        RuntimeError: a shape that does not fit; the message names the argument and both shapes.
    """

    _name = "GRU"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
    ) -> None:
        super().__init__(
            "GRU",
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
        self.recompute = recompute

    def _run_one(
        self, name: str, input: Tensor, hx: Tensor, batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weights = self._weights_of(name)
        return gru(
            input,
            hx,
            *weights,
            batch_sizes=batch_sizes,
            recompute=self.recompute,
            packed=self._packed_of(name, weights),
        )

    def _run_both(
        self, name: str, input: Tensor, hx: Tensor, batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weights, weights_reverse = self._weights_of(name), self._weights_of(f"{name}_reverse")
        return bidirectional_gru(
            input,
            hx,
            weights,
            weights_reverse,
            batch_sizes=batch_sizes,
            recompute=self.recompute,
            packed=self._packed_of(name, weights),
            packed_reverse=self._packed_of(f"{name}_reverse", weights_reverse),
        )

    def _cell_weights(self) -> dict[str, tuple[Tensor, ...]]:
        directions = ("", "_reverse") if self.bidirectional else ("",)
        names = [f"_l{layer}{suffix}" for layer in range(self.num_layers) for suffix in directions]
        return {name: self._weights_of(name) for name in names}


class GRUCell(PackedWeights, RNNCellBase):
    """One step of a gated recurrent unit.

    Equivalent to: ``torch.nn.GRUCell(input_size, hidden_size, ...)``, with the same arguments and
    parameters; a state_dict of one loads into the other.

    Args:
        input_size, hidden_size: features of the input (I) and of the state (H).
        bias: whether there are ``bias_ih`` and ``bias_hh``. Default True.

    Shapes of ``forward(input, hx=None)``: input [B, I] or [I], hx [B, H] or [H] (zeros if None),
    result as hx.

    Raises:
        ValueError: input or hx has other than 1 or 2 dimensions.
        RuntimeError: a shape that does not fit; the message names the argument and both shapes.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        for name, tensor, size in (("input", input, self.input_size), ("hx", hx, self.hidden_size)):
            if tensor is None:
                continue
            if tensor.dim() not in (1, 2):
                raise ValueError(
                    f"GRUCell: expected {name} to have 1 or 2 dimensions, got shape "
                    f"{list(tensor.shape)}"
                )
            if tensor.size(-1) != size:
                expected = [*tensor.shape[:-1], size]
                raise RuntimeError(
                    f"GRUCell: expected {name} of shape {expected}, got {list(tensor.shape)}"
                )
        is_batched = input.dim() == 2
        if hx is not None and hx.shape[:-1] != input.shape[:-1]:
            expected = [*input.shape[:-1], self.hidden_size]
            raise RuntimeError(
                f"GRUCell: expected hx of shape {expected} beside input of shape "
                f"{list(input.shape)}, got {list(hx.shape)}"
            )
        if not is_batched:
            input = input.unsqueeze(0)
        if hx is None:
            hx = input.new_zeros(input.size(0), self.hidden_size)
        elif not is_batched:
            hx = hx.unsqueeze(0)
        weights = self._weights()
        h = gru_cell(input, hx, *weights, packed=self._packed_of("", weights))
        return h if is_batched else h.squeeze(0)

    def _weights(self) -> tuple[Tensor, ...]:
        weights = (self.weight_ih, self.weight_hh)
        return (*weights, self.bias_ih, self.bias_hh) if self.bias else weights

    def _cell_weights(self) -> dict[str, tuple[Tensor, ...]]:
        return {"": self._weights()}
