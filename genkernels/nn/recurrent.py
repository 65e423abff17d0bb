"""What the modules of every recurrent cell share."""

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from ..ops.library import is_autocast_enabled


class Recurrent(RNNBase):
    """Layers of recurrent cells, one or two directions, dense or packed sequences."""

    _name: str  # in messages

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
                f"{self._name}: expected input to have 2 or 3 dimensions, got shape "
                f"{list(input.shape)}"
            )
        batch_dim = 0 if self.batch_first else 1
        is_batched = input.dim() == 3
        if hx is not None and hx.dim() != input.dim():
            raise RuntimeError(
                f"{self._name}: expected hx to have {input.dim()} dimensions, as input of shape "
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
            raise RuntimeError(
                f"{self._name}: expected hx of shape {list(shape)}, got {list(hx.shape)}"
            )
        return hx

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise what torch's module raises for an input that does not fit, batched as it is run."""
        dims = 3 if batch_sizes is None else 2
        if input.dim() != dims:
            raise RuntimeError(
                f"{self._name}: expected input to have {dims} dimensions, got shape "
                f"{list(input.shape)}"
            )
        if input.size(-1) != self.input_size:
            expected = [*input.shape[:-1], self.input_size]
            raise RuntimeError(
                f"{self._name}: expected input of shape {expected}, input_size last, got "
                f"{list(input.shape)}"
            )
        dtype = self.weight_ih_l0.dtype
        if input.dtype != dtype and not is_autocast_enabled(input.device.type):
            raise ValueError(
                f"{self._name}: input is {input.dtype}, the weights are {dtype}; convert one: "
                f"input.to({dtype}) or module.to({input.dtype})"
            )

    def _run(self, input: Tensor, hx: Tensor, batch_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        states: list[Tensor] = []
        for layer in range(self.num_layers):
            name = f"_l{layer}"
            if self.bidirectional:
                both = hx[2 * layer : 2 * layer + 2]
                input, h = self._run_both(name, input, both, batch_sizes)
                states.extend(h.unbind())
            else:
                input, h = self._run_one(name, input, hx[layer], batch_sizes)
                states.append(h)
            if self.dropout and self.training and layer < self.num_layers - 1:
                input = dropout(input, self.dropout)
        return input, torch.stack(states)

    def _run_one(
        self, name: str, input: Tensor, hx: Tensor, batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The output of the layer whose parameters end in `name`, and its last state [B, H]."""
        raise NotImplementedError

    def _run_both(
        self, name: str, input: Tensor, hx: Tensor, batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same of two directions, whose states are [2, B, H]."""
        raise NotImplementedError

    def _weights_of(self, name: str) -> tuple[Tensor, ...]:
        names = ["weight_ih", "weight_hh"] + (["bias_ih", "bias_hh"] if self.bias else [])
        return tuple(getattr(self, each + name) for each in names)
