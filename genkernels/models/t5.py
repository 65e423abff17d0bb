"""An encoder-decoder Transformer from text to text: T5."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..data import TextToTextTokens
from .config import check_dropout, check_heads, check_sizes
from .encoder_decoder import EncoderDecoder
from .transformer import FUSED, PLAIN, Functions, KeyValueCache, SelfAttention


@dataclass(frozen=True)
class T5Config:
    """Sizes of a `T5`: at most 1,000,000, and at most 1,000 layers.

    vocab_size: the tokenizer's; the ids of `TextToTextTokens` come above it.
    num_layers: of the encoder, and of the decoder.
    embedding_dim: width of a token, a multiple of `num_heads`.
    feedforward_dim: width inside the feed-forward layers.
    num_buckets: kinds of relative positions, an even number from 4.
    max_distance: from where on all positions are of one kind; more than half of `num_buckets`.
    dropout: the probability after the embeddings, of attention's weights, before each residual and
        at the end of both stacks.

    Raises:
        ValueError: a size that is no int or out of range, an embedding_dim that num_heads does not
            divide, or a dropout outside [0, 1).
    """

    vocab_size: int
    num_layers: int
    num_heads: int
    embedding_dim: int
    feedforward_dim: int
    num_buckets: int = 32
    max_distance: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(
            self, "vocab_size", "num_layers", "feedforward_dim", "num_buckets", "max_distance"
        )
        check_heads(self)
        check_dropout(self.dropout)
        if self.num_buckets % 2 or self.num_buckets < 4:
            raise ValueError(f"num_buckets must be an even number >= 4, got {self.num_buckets}")
        if self.max_distance <= self.num_buckets // 2:
            raise ValueError(
                f"max_distance must be more than half of num_buckets {self.num_buckets}, "
                f"got {self.max_distance}"
            )


def position_buckets(
    relative: Tensor, num_buckets: int, max_distance: int, bidirectional: bool
) -> Tensor:
    """Which bucket a key's position less the query's, int64, falls into (Raffel et al. 2020,
    section 2.1).

    Half of the buckets are for one distance each, the others for ever longer ranges of them, up to
    `max_distance` by its logarithm; the last also for all beyond. Where keys may come after the
    query, they have half of the buckets; elsewhere they share the first.
    """
    buckets = torch.zeros_like(relative)
    if bidirectional:
        num_buckets //= 2
        buckets = torch.where(relative > 0, num_buckets, 0)
        distance = relative.abs()
    else:
        distance = -relative.clamp_max(0)
    exact = num_buckets // 2
    share = (distance.clamp_min(exact) / exact).double().log() / math.log(max_distance / exact)
    # What a rounded logarithm takes from a whole number is given back.
    far = exact + (share * (num_buckets - exact) + 1e-9).long()
    far = far.clamp_max(num_buckets - 1)
    return buckets + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """What a key's position relative to the query adds to the scores of each head."""

    def __init__(self, config: T5Config, bidirectional: bool) -> None:
        super().__init__()
        self.config = config
        self.bidirectional = bidirectional
        self.embedding = nn.Embedding(config.num_buckets, config.num_heads)

    def forward(self, queries: int, keys: int, start: int = 0) -> Tensor:
        """The bias of queries at `start` and after it, [1, H, queries, keys]."""
        C = self.config
        # One value for each distance, of which the bias of a query is a window: looking up L x S
        # values, and adding up as many gradients, would cost more than attention.
        relative = torch.arange(
            1 - queries - start, keys - start, device=self.embedding.weight.device
        )
        buckets = position_buckets(relative, C.num_buckets, C.max_distance, self.bidirectional)
        values = self.embedding(buckets).T  # [H, queries + keys - 1]
        return values.unfold(1, keys, 1).flip(1)[None]  # the last query's window comes first


class CrossAttention(nn.Module):
    """Multi-head attention of the decoder's tokens to the encoder's, with unscaled scores."""

    def __init__(self, config: T5Config, functions: Functions) -> None:
        super().__init__()
        E = config.embedding_dim
        self.functions = functions
        self.num_heads = config.num_heads
        self.dropout_p = config.dropout
        self.query = nn.Linear(E, E, bias=False)
        self.key_value = nn.Linear(E, 2 * E, bias=False)
        self.projection = nn.Linear(E, E, bias=False)

    def keys_values(self, memory: Tensor) -> Tensor:
        """The keys and values of the encoder's output, [B, S, E]; [B, S, 2, H, D]."""
        key_value = self.functions.linear(memory, self.key_value.weight)  # [B, S, 2E]
        return key_value.unflatten(-1, (2, self.num_heads, -1))  # [B, S, 2, H, D]

    def forward(self, x: Tensor, keys_values: Tensor, lengths: Tensor | None) -> Tensor:
        linear = self.functions.linear
        query = linear(x, self.query.weight).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key, value = (t.transpose(1, 2) for t in self.functions.unbind_heads(keys_values))
        dropout_p = self.dropout_p if self.training else 0.0
        output = self.functions.attention(
            query, key, value, key_lengths=lengths, dropout_p=dropout_p, scale=1.0
        )  # [B, H, T, D]
        return linear(output.transpose(1, 2).flatten(2), self.projection.weight)


class FeedForward(nn.Module):
    """(gelu(x A) * x B) C: a GELU with a gate (Shazeer 2020, https://arxiv.org/abs/2002.05202,
    equation 6; T5 v1.1)."""

    def __init__(self, config: T5Config, functions: Functions) -> None:
        super().__init__()
        E, F = config.embedding_dim, config.feedforward_dim
        self.functions = functions
        self.gate = nn.Linear(E, F, bias=False)
        self.expansion = nn.Linear(E, F, bias=False)
        self.projection = nn.Linear(F, E, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        linear = self.functions.linear
        gate = linear(x, self.gate.weight, activation="gelu_tanh")  # [B, T, F]
        return linear(gate * linear(x, self.expansion.weight), self.projection.weight)


def _self_attention(config: T5Config, functions: Functions) -> SelfAttention:
    return SelfAttention(config.embedding_dim, config.num_heads, config.dropout, False, functions)


def _norm(config: T5Config) -> nn.RMSNorm:
    return nn.RMSNorm(config.embedding_dim, eps=1e-6)


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), both with dropout."""

    def __init__(self, config: T5Config, functions: Functions) -> None:
        super().__init__()
        self.norm1 = _norm(config)
        self.attention = _self_attention(config, functions)
        self.norm2 = _norm(config)
        self.feedforward = FeedForward(config, functions)
        self.dropout = functions.dropout(config.dropout)

    def forward(self, x: Tensor, bias: Tensor, lengths: Tensor | None) -> Tensor:
        options: dict[str, Any] = {"attn_mask": bias, "key_lengths": lengths, "scale": 1.0}
        x = self.dropout(self.attention(self.norm1(x), **options), residual=x)
        return self.dropout(self.feedforward(self.norm2(x)), residual=x)


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), x + cross-attention(norm(x)), x + feed-forward(norm(x))."""

    def __init__(self, config: T5Config, functions: Functions) -> None:
        super().__init__()
        self.norm1 = _norm(config)
        self.attention = _self_attention(config, functions)
        self.norm2 = _norm(config)
        self.cross_attention = CrossAttention(config, functions)
        self.norm3 = _norm(config)
        self.feedforward = FeedForward(config, functions)
        self.dropout = functions.dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        bias: Tensor,
        keys_values: Tensor,
        lengths: Tensor | None,
        cache: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        # One token sees all that the cache knows; several are the first ones.
        options: dict[str, Any] = {"attn_mask": bias, "is_causal": x.shape[1] > 1, "scale": 1.0}
        x = self.dropout(self.attention(self.norm1(x), cache, **options), residual=x)
        x = self.dropout(self.cross_attention(self.norm2(x), keys_values, lengths), residual=x)
        return self.dropout(self.feedforward(self.norm3(x)), residual=x)


class T5(EncoderDecoder):
    """Predicts the tokens of a target from a source and the target's tokens before them.

    Equivalent to: T5 v1.1 (Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 2.1) with
    the shared embedding of the paper: no biases; RMS norms (Zhang and Sennrich 2019,
    https://arxiv.org/abs/1910.07467) before attention, cross-attention and the gated feed-forward
    layers, and at the end of both stacks; scores Q K^T unscaled, with a bias for relative positions
    that the layers of a stack share; logits by the transposed token embedding, of outputs divided
    by sqrt(embedding_dim).

    Texts end with `end` of `TextToTextTokens.above(vocab_size)`. `lengths`, int64 [B], counts the
    tokens of each source; None: all. Nothing limits the length of source or target.

    `fused` chooses what computes: the ops of genkernels, or for False the very same model in plain
    PyTorch. Both have one `state_dict` and, for a seed, the same initial values.

    Raises:
        ValueError: in every method, a source that is not [B, S] with S >= 1.
    """

    name = "t5"

    def __init__(self, config: T5Config, fused: bool = True) -> None:
        super().__init__()
        self.config = config
        self.functions = functions = FUSED if fused else PLAIN
        self.special_tokens = TextToTextTokens.above(config.vocab_size)
        self.token_embedding = nn.Embedding(self.special_tokens.size, config.embedding_dim)
        self.dropout = functions.dropout(config.dropout)
        layers = range(config.num_layers)
        self.encoder_bias = RelativeBias(config, bidirectional=True)
        self.encoder = nn.ModuleList(EncoderBlock(config, functions) for _ in layers)
        self.encoder_norm = _norm(config)
        self.decoder_bias = RelativeBias(config, bidirectional=False)
        self.decoder = nn.ModuleList(DecoderBlock(config, functions) for _ in layers)
        self.decoder_norm = _norm(config)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Each product keeps the variance of its input, and scores have that of scaled ones."""
        E = self.config.embedding_dim
        nn.init.normal_(self.token_embedding.weight)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and name != "token_embedding.weight":
                inputs = parameter.shape[1] if "embedding" not in name else E
                nn.init.normal_(parameter, std=inputs**-0.5)
        head_dim = E // self.config.num_heads
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.qkv.weight[:E] *= head_dim**-0.5
            if isinstance(module, CrossAttention):
                module.query.weight *= head_dim**-0.5

    @property
    def output_weight(self) -> Tensor:
        return self.token_embedding.weight

    def encode(self, source: Tensor, lengths: Tensor | None) -> list[Tensor]:
        """The keys and values of `source` for each layer of the decoder, [B, S, 2, H, D]."""
        x = self.dropout(self.token_embedding(source))  # [B, S, E]
        S = source.shape[1]
        bias = self.encoder_bias(S, S)  # [1, H, S, S]
        for block in self.encoder:
            x = block(x, bias, lengths)
        x = self.dropout(self.encoder_norm(x))
        return [block.cross_attention.keys_values(x) for block in cast(Any, self.decoder)]

    def decode(
        self,
        input: Tensor,
        memory: list[Tensor],
        lengths: Tensor | None,
        state: KeyValueCache | None = None,
    ) -> tuple[Tensor, KeyValueCache | None]:
        T = input.shape[1]
        start = state.length if state else 0
        caches = state.extend(T) if state else [None] * len(self.decoder)
        x = self.dropout(self.token_embedding(input))  # [B, T, E]
        bias = self.decoder_bias(T, start + T, start)  # [1, H, T, start + T]
        for block, keys_values, cache in zip(self.decoder, memory, caches, strict=True):
            x = block(x, bias, keys_values, lengths, cache)
        return self.dropout(self.decoder_norm(x)) * self.config.embedding_dim**-0.5, state

    def first_state(self, batch_size: int, capacity: int) -> KeyValueCache:
        C = self.config
        head_dim = C.embedding_dim // C.num_heads
        return KeyValueCache(
            C.num_layers, batch_size, C.num_heads, capacity, head_dim, self.token_embedding.weight
        )

    def rows_of(self, state: KeyValueCache, rows: Tensor) -> KeyValueCache:
        return state.rows_of(rows)
