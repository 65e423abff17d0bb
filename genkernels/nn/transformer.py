"""torch.nn's layers of Transformers on the fused ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import linear
from .attention import MultiheadAttention
from .dropout import Dropout
from .linear import Linear

# Both derive from torch's layers: code that looks for those, to initialise, wrap or checkpoint,
# finds ours, and torch's constructor makes the parameters and draws their values. Its forward pass
# of the encoder's layer is not inherited: in evaluation it reads the parameters and leaves the
# modules out.


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """Self-attention and a feed-forward network, each with dropout, residual and layer norm.

    Equivalent to: ``torch.nn.TransformerEncoderLayer(d_model, nhead, ...)``, with the same
    arguments, the same parameters and, for the same seed, the same initial values. A state_dict of
    one loads into the other, and ``torch.nn.TransformerEncoder`` stacks it.

    It runs :class:`genkernels.nn.MultiheadAttention`, whose docstring says what differs from
    PyTorch's, :func:`genkernels.linear` with the activation in it, and
    :class:`genkernels.nn.Dropout`, which drops others than PyTorch's for the same seed. Nested
    tensors raise, and ``torch.nn.TransformerEncoder`` makes none of padded batches, which it says
    in a warning unless it is given ``enable_nested_tensor=False``: padded rows are computed in
    evaluation as they are in training.

    Args:
        d_model: features of input and output (E).
        nhead: heads (H); E is a multiple of it.
        dim_feedforward: features between the two linear maps. Default 2048.
        dropout: the probability of dropping a weight of attention or an element of what each part
            gives, in training. Default 0.1.
        activation: "relu", "gelu", or a callable. ``F.relu``, ``F.gelu`` and ``F.silu`` are taken
            along by the first linear map, others run after it. Default ``F.relu``.
        layer_norm_eps: what is added to the variance. Default 1e-5.
        batch_first: input and output are [B, L, E] instead of [L, B, E]. Default False.
        norm_first: the layer norms are before attention and feed-forward network, not after the
            residuals. Default False.
        bias: whether linear maps and layer norms have one. Default True.
        device, dtype: of the parameters. Default: PyTorch's.

    Args of ``forward(src, src_mask=None, src_key_padding_mask=None, is_causal=False)``:
        src: [L, B, E], [B, L, E] with batch_first, or [L, E] unbatched; the result has its shape.
        src_mask, src_key_padding_mask, is_causal: attn_mask, key_padding_mask and is_causal of
            :class:`genkernels.nn.MultiheadAttention`.

    Raises:
        RuntimeError: an unknown name of an activation; is_causal without src_mask; a shape or dtype
            that does not fit.
        AssertionError: as :class:`genkernels.nn.MultiheadAttention`.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3; norm_first: Xiong et
    al. 2020, https://arxiv.org/abs/2002.04745, figure 1.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        _fuse(self)
        # Or TransformerEncoder would hand over nested tensors in evaluation.
        self.activation_relu_or_gelu = 0

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        x = src
        masks = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), *masks)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, *masks))
        return self.norm2(x + self._ff_block(x))

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(_feed_forward(self, x))


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """Self-attention, attention to what an encoder gave, and a feed-forward network, each with
    dropout, residual and layer norm.

    Equivalent to: ``torch.nn.TransformerDecoderLayer(d_model, nhead, ...)``, with the same
    arguments, the same parameters and, for the same seed, the same initial values. A state_dict of
    one loads into the other, and ``torch.nn.TransformerDecoder`` stacks it.

    Args: as :class:`TransformerEncoderLayer`.

    Args of ``forward(tgt, memory, tgt_mask=None, memory_mask=None, tgt_key_padding_mask=None,
    memory_key_padding_mask=None, tgt_is_causal=False, memory_is_causal=False)``:
        tgt: [L, B, E], [B, L, E] with batch_first, or [L, E] unbatched; the result has its shape.
        memory: what the encoder gave: as tgt, of S rows instead of L.
        tgt_mask, tgt_key_padding_mask, tgt_is_causal: attn_mask, key_padding_mask and is_causal of
            the self-attention, see :class:`genkernels.nn.MultiheadAttention`.
        memory_mask, memory_key_padding_mask, memory_is_causal: those of the attention to memory.

    Raises and Source: as :class:`TransformerEncoderLayer`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        _fuse(self)

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(_feed_forward(self, x))


def _fuse(layer: torch.nn.Module) -> None:
    """Makes its modules ours, which have the same parameters."""
    ours: dict[type, type] = {
        torch.nn.Dropout: Dropout,
        torch.nn.MultiheadAttention: MultiheadAttention,
        torch.nn.Linear: Linear,
    }
    for name, module in layer.named_children():
        if name != "activation":
            module.__class__ = ours.get(type(module), type(module))


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    """linear2(dropout(activation(linear1(x)))), the activation taken along by linear1's product."""
    first, activation = layer.linear1, None
    # What took its place (LoRA, quantised weights) has its own product, and hooks look at that.
    if type(first) is Linear and first.activation is None and not _has_hooks(first):
        activation = _name_of(layer.activation)
    if activation is None:
        x = layer.activation(first(x))
    else:
        x = linear(x, first.weight, first.bias, activation=activation)
    return layer.linear2(layer.dropout(x))


def _has_hooks(module: torch.nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def _name_of(activation: Any) -> str | None:
    names = ((F.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu"))
    return next((name for function, name in names if function is activation), None)
