"""What the Transformers share: their functions, attention, the MLP and the cache of generation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops, reference
from ..nn import Dropout
from ..ops.attention import unbind_heads
from .config import check_dropout, check_heads, check_sizes


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    key_lengths: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """PyTorch's own, which knows no key_lengths, and no is_causal beside attn_mask."""
    if key_lengths is not None:
        places = torch.arange(key.size(-2), device=key.device)
        is_there = (places < key_lengths[:, None])[:, None, None]  # [B, 1, 1, S]
        attn_mask = is_there if attn_mask is None else attn_mask.masked_fill(~is_there, -math.inf)
    if is_causal and attn_mask is not None:
        later = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device)
        attn_mask, is_causal = attn_mask.masked_fill(later.triu(1), -math.inf), False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, **options
    )


class _Dropout(nn.Dropout):
    """PyTorch's own, to which a residual is added."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = super().forward(input)
        return output if residual is None else residual + output


class Functions(NamedTuple):
    """What a Transformer computes with: the fused ops, or the same in plain PyTorch."""

    dropout: Callable[[float], nn.Module]
    linear: Callable[..., Tensor]
    unbind_heads: Callable[[Tensor], tuple[Tensor, ...]]
    attention: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]
    linear_log_prob: Callable[..., tuple[Tensor, Tensor]]


FUSED = Functions(
    Dropout,
    ops.linear,
    unbind_heads,
    ops.scaled_dot_product_attention,
    ops.linear_cross_entropy,
    ops.linear_log_prob,
)
PLAIN = Functions(
    _Dropout,
    reference.linear,
    functools.partial(torch.unbind, dim=-3),
    _attention,
    reference.linear_cross_entropy,
    reference.linear_log_prob,
)


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a Transformer: at most 1,000,000, and at most 1,000 layers.

    vocab_size: tokens that can be read and predicted.
    context_length: tokens that can be read at once.
    embedding_dim: width of a token, a multiple of `num_heads`.
    dropout: the probability after the embedding, of attention's weights and before each residual.
    bias: whether the Linears and LayerNorms have one.

    Raises:
        ValueError: a size that is no int or out of range, an embedding_dim that num_heads does not
            divide, a dropout outside [0, 1), or a bias that is no bool.
    """

    vocab_size: int
    context_length: int
    num_layers: int
    num_heads: int
    embedding_dim: int
    dropout: float = 0.0
    bias: bool = True

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "context_length", "num_layers")
        check_heads(self)
        check_dropout(self.dropout)
        if type(self.bias) is not bool:
            raise ValueError(f"bias must be True or False, got {self.bias!r}")


class KeyValueCache:
    """The keys and values of the tokens read so far, of all layers, written in place.

    Each layer's lie as [2, B, heads, capacity, D], a head's one after another, as attention of one
    query reads them. `like` gives dtype and device.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        capacity: int,
        head_dim: int,
        like: Tensor,
    ) -> None:
        shape = (num_layers, 2, batch_size, num_heads, capacity, head_dim)
        self._tensor = like.new_empty(shape)
        self.length = 0

    def extend(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Make room for `count` tokens. Returns two views for each layer: of their places, which
        the layer fills, [2, B, H, count, D], and of all tokens with them, [2, B, H, length, D]."""
        start, self.length = self.length, self.length + count
        new = self._tensor[..., start : self.length, :].unbind()
        known = self._tensor[..., : self.length, :].unbind()
        return list(zip(new, known, strict=True))

    def rows_of(self, rows: Tensor) -> KeyValueCache:
        """Keep what is known of these rows of the batch, int64 [N], alone."""
        self._tensor = self._tensor.index_select(2, rows)
        return self


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to one another.

    Equivalent to: `torch.nn.MultiheadAttention(embedding_dim, num_heads, dropout, bias,
    batch_first=True)(x, x, x)[0]`.

    softmax(Q K^T / sqrt(D) + mask) V for each head, whose results are joined and projected
    (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2). Queries, keys and values
    come from one product, and heads are views of it.
    """

    def __init__(
        self, embedding_dim: int, num_heads: int, dropout: float, bias: bool, functions: Functions
    ) -> None:
        super().__init__()
        E = embedding_dim
        self.functions = functions
        self.num_heads = num_heads
        self.dropout_p = dropout
        self.qkv = nn.Linear(E, 3 * E, bias)
        self.projection = nn.Linear(E, E, bias)

    def forward(
        self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None, **options: Any
    ) -> Tensor:
        """Map x, [B, T, E], to the same shape. `cache` is a layer's pair of `KeyValueCache.extend`;
        `options` are attention's: attn_mask, is_causal, key_lengths, scale."""
        functions = self.functions
        qkv = functions.linear(x, self.qkv.weight, self.qkv.bias)  # [B, T, 3E]
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, H, D]
        query, key, value = (t.transpose(1, 2) for t in functions.unbind_heads(qkv))
        if cache is not None:
            new, known = cache
            new.copy_(qkv[:, :, 1:].permute(2, 0, 3, 1, 4))
            key, value = known.unbind()
        output = functions.attention(
            query, key, value, dropout_p=self.dropout_p if self.training else 0.0, **options
        )  # [B, H, T, D]
        output = output.transpose(1, 2).flatten(2)  # [B, T, E]
        return functions.linear(output, self.projection.weight, self.projection.bias)


class MLP(nn.Module):
    """Two Linears with a GELU between them, four times as wide.

    Equivalent to: `Linear(4E, E)(F.gelu(Linear(E, 4E)(x)))`.
    """

    def __init__(self, embedding_dim: int, bias: bool, functions: Functions) -> None:
        super().__init__()
        E = embedding_dim
        self.functions = functions
        self.expansion = nn.Linear(E, 4 * E, bias)
        self.projection = nn.Linear(4 * E, E, bias)

    def forward(self, x: Tensor) -> Tensor:
        linear = self.functions.linear
        x = linear(x, self.expansion.weight, self.expansion.bias, activation="gelu")  # [B, T, 4E]
        return linear(x, self.projection.weight, self.projection.bias)


def check_length(input: Tensor, context_length: int) -> None:
    """Raise a ValueError for an input that is not [B, T] with T from 1 to `context_length`."""
    if input.dim() != 2 or not 1 <= input.shape[1] <= context_length:
        raise ValueError(
            f"input must be [B, T] with T from 1 to context_length {context_length}, "
            f"got {list(input.shape)}"
        )


@torch.no_grad()
def initialize(model: nn.Module, residual: float = 1.0) -> None:
    """Weights and embeddings from a normal distribution with deviation 0.02, times `residual` for
    projections onto the residual; biases zero. So do GPT-2 and BERT."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() > 1:
            scale = residual if name.endswith("projection.weight") else 1.0
            nn.init.normal_(parameter, std=0.02 * scale)
