"""Packed weights for inference, kept from call to call."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .. import backend
from ..ops.gru import gru_pack
from ..ops.library import is_autocast_enabled

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """Packs the weights of every GRU and GRUCell of genkernels in `module`, once for all calls.

    Otherwise each call packs them, which is noticeable in short sequences and small batches. A
    frozen module computes with the weights that it had: it raises where they have been changed in
    place or replaced since, and where gradients are recorded. What is written through ``.data`` or
    to tensors of ``torch.inference_mode`` is not noticed, and nothing is inside ``torch.compile``.
    Under autocast and torch.func it packs at each call, as others do. The weights themselves, the
    state_dict and copies of the module stay as they are, so that memory for the packed ones comes
    on top; a copy is not frozen.

    Args:
        module: a module in the compiled CPU kernel's reach: on the CPU, in float32, bfloat16 or
            float64.

    Returns:
        The same module.

    Raises:
        ValueError: there is no GRU or GRUCell of genkernels in it.
        RuntimeError: the compiled kernel cannot run one of them.
    """
    found = [m for m in module.modules() if isinstance(m, PackedWeights)]
    if not found:
        raise ValueError(
            f"freeze: expected a module with a genkernels.nn.GRU or GRUCell in it, got "
            f"{type(module).__name__}"
        )
    for each in found:
        each._freeze()
    return module


def unfreeze(module: Module) -> Module:
    """Drops the packed weights of :func:`freeze`; the module packs its weights at each call.

    Returns:
        The same module.
    """
    for each in module.modules():
        if isinstance(each, PackedWeights):
            each._packed = None
    return module


class _Packed(NamedTuple):
    tensor: Tensor
    origin: tuple[Any, ...]
    weights: tuple[Tensor, ...]  # held, so that no others come to lie where they were


class PackedWeights(nn.Module):
    """A module of which `freeze` packs the weights."""

    _packed: dict[str, _Packed] | None = None

    def _cell_weights(self) -> dict[str, tuple[Tensor, ...]]:
        """weight_ih, weight_hh and, if there are any, bias_ih and bias_hh of each cell by name."""
        raise NotImplementedError

    def _freeze(self) -> None:
        self._packed = {
            name: _Packed(gru_pack(*weights), _origin(weights), tuple(w.detach() for w in weights))
            for name, weights in self._cell_weights().items()
        }

    def _packed_of(self, name: str, weights: tuple[Tensor, ...]) -> Tensor | None:
        """What the op takes as `packed` for these weights; None if each call packs them."""
        if self._packed is None or is_autocast_enabled(weights[0].device.type):
            return None
        tensor, origin, _ = self._packed[name]
        # The compiler has no addresses.
        if not torch.compiler.is_compiling() and origin != _origin(weights):
            raise RuntimeError(
                f"{type(self).__name__}: its weights{name} changed after freeze(); freeze() it "
                "again, or unfreeze() it"
            )
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        # nn.RNNBase has its own; object has none before Python 3.11.
        inherited = getattr(super(), "__getstate__", None)
        state = inherited() if inherited is not None else self.__dict__
        return {key: value for key, value in state.items() if key != "_packed"}


def _origin(weights: tuple[Tensor, ...]) -> tuple[Any, ...]:
    versions = (None if w.is_inference() else w._version for w in weights)
    return backend.simd_level(), *versions, *(w.data_ptr() for w in weights)
