"""torch.nn.GRU and torch.nn.GRUCell on the fused ops."""

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils.rnn import PackedSequence

from ..ops import bidirectional_gru, gru, gru_cell
from ..ops.library import is_autocast_enabled
from .freeze import PackedWeights


class GRU(PackedWeights, RNNBase):
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

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            hx = self._initial_state(data, hx, int(batch_sizes[0]), batch_sizes)
            if sorted_indices is not None:
                hx = hx.index_select(1, sorted_indices)
            output, h_n = self._run(data, hx, batch_sizes)
            if unsorted_indices is not None:
                h_n = h_n.index_select(1, unsorted_indices)
            return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), h_n
        if input.dim() not in (2, 3):
            raise ValueError(
                f"GRU: expected input to have 2 or 3 dimensions, got shape {list(input.shape)}"
            )
        batch_dim = 0 if self.batch_first else 1
        is_batched = input.dim() == 3
        if hx is not None and hx.dim() != input.dim():
            raise RuntimeError(
                f"GRU: expected hx to have {input.dim()} dimensions, as input of shape "
                f"{list(input.shape)} has, got shape {list(hx.shape)}"
            )
        if not is_batched:
            input = input.unsqueeze(batch_dim)
            hx = None if hx is None else hx.unsqueeze(1)
        hx = self._initial_state(input, hx, input.size(batch_dim), None)
        output, h_n = self._run(input.transpose(0, 1) if self.batch_first else input, hx, None)
        if self.batch_first:
            output = output.transpose(0, 1)
        return (output, h_n) if is_batched else (output.squeeze(batch_dim), h_n.squeeze(1))

    def _initial_state(
        self, input: Tensor, hx: Tensor | None, batch: int, batch_sizes: Tensor | None
    ) -> Tensor:
        self.check_input(input, batch_sizes)
        directions = 2 if self.bidirectional else 1
        shape = (self.num_layers * directions, batch, self.hidden_size)
        if hx is None:
            return input.new_zeros(shape)
        if hx.shape != shape:
            raise RuntimeError(f"GRU: expected hx of shape {list(shape)}, got {list(hx.shape)}")
        return hx

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise what ``torch.nn.GRU`` raises for an input that does not fit, batched as it is
        run."""
        dims = 3 if batch_sizes is None else 2
        if input.dim() != dims:
            raise RuntimeError(
                f"GRU: expected input to have {dims} dimensions, got shape {list(input.shape)}"
            )
        if input.size(-1) != self.input_size:
            expected = [*input.shape[:-1], self.input_size]
            raise RuntimeError(
                f"GRU: expected input of shape {expected}, input_size last, got {list(input.shape)}"
            )
        dtype = self.weight_ih_l0.dtype
        if input.dtype != dtype and not is_autocast_enabled(input.device.type):
            raise ValueError(
                f"GRU: input is {input.dtype}, the weights are {dtype}; convert one: "
                f"input.to({dtype}) or module.to({input.dtype})"
            )

    def _run(self, input: Tensor, hx: Tensor, batch_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        states: list[Tensor] = []
        for layer in range(self.num_layers):
            name = f"_l{layer}"
            weights = self._weights_of(name)
            packed = self._packed_of(name, weights)
            if self.bidirectional:
                weights_reverse = self._weights_of(f"{name}_reverse")
                input, h = bidirectional_gru(
                    input,
                    hx[2 * layer : 2 * layer + 2],
                    weights,
                    weights_reverse,
                    batch_sizes=batch_sizes,
                    recompute=self.recompute,
                    packed=packed,
                    packed_reverse=self._packed_of(f"{name}_reverse", weights_reverse),
                )
                states.extend(h.unbind())
            else:
                input, h = gru(
                    input,
                    hx[layer],
                    *weights,
                    batch_sizes=batch_sizes,
                    recompute=self.recompute,
                    packed=packed,
                )
                states.append(h)
            if self.dropout and self.training and layer < self.num_layers - 1:
                input = dropout(input, self.dropout)
        return input, torch.stack(states)

    def _weights_of(self, name: str) -> tuple[Tensor, ...]:
        names = ["weight_ih", "weight_hh"] + (["bias_ih", "bias_hh"] if self.bias else [])
        return tuple(getattr(self, each + name) for each in names)

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
