"""A decoder-only Transformer language model: GPT-2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .sampling import CausalModel
from .transformer import (
    FUSED,
    MLP,
    PLAIN,
    Functions,
    KeyValueCache,
    SelfAttention,
    TransformerConfig,
    check_length,
    initialize,
)


@dataclass(frozen=True)
class GPTConfig(TransformerConfig):
    """Sizes of a `GPT`; those of `TransformerConfig`."""


class Block(nn.Module):
    """x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x)), both with dropout."""

    def __init__(self, config: GPTConfig, functions: Functions) -> None:
        super().__init__()
        E, bias = config.embedding_dim, config.bias
        self.norm1 = nn.LayerNorm(E, bias=bias)
        self.attention = SelfAttention(E, config.num_heads, config.dropout, bias, functions)
        self.norm2 = nn.LayerNorm(E, bias=bias)
        self.mlp = MLP(E, bias, functions)
        self.dropout = functions.dropout(config.dropout)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None) -> Tensor:
        # One token sees all that the cache knows; several are the first ones (`GPT.predict`).
        is_causal = x.shape[1] > 1
        x = self.dropout(self.attention(self.norm1(x), cache, is_causal=is_causal), residual=x)
        return self.dropout(self.mlp(self.norm2(x)), residual=x)


class GPTState(NamedTuple):
    """What `GPT.predict` has read: its last tokens, int64 [B, N], and their keys and values."""

    tokens: Tensor
    cache: KeyValueCache


class GPT(CausalModel):
    """Predicts each next token from the tokens before it.

    Equivalent to: GPT-2 (Radford et al. 2019, "Language models are unsupervised multitask
    learners", section 2.3; Radford et al. 2018 for what is as in GPT): the sum of a token's and its
    position's embedding; blocks of causal attention and an MLP, each behind a LayerNorm and beside
    a residual; a LayerNorm; and logits by the transposed token embedding.

    `fused` chooses what computes: the ops of genkernels, or for False the very same model in plain
    PyTorch. Both have one `state_dict` and, for a seed, the same initial values.

    Raises:
        ValueError: in every method, more tokens than `context_length` at once.
    """

    name = "gpt"

    def __init__(self, config: GPTConfig, fused: bool = True) -> None:
        super().__init__()
        self.config = config
        self.functions = FUSED if fused else PLAIN
        self.token_embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.position_embedding = nn.Embedding(config.context_length, config.embedding_dim)
        self.dropout = self.functions.dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, self.functions) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.embedding_dim, bias=config.bias)
        # Each block adds two to the residual, whose variance they would raise with the depth.
        initialize(self, residual=1 / math.sqrt(2 * config.num_layers))

    def forward(self, input: Tensor) -> Tensor:
        """Map tokens, int64 [B, T], to logits [B, T, V]."""
        return self.functions.linear(self._run(input), self.token_embedding.weight)

    def loss(self, input: Tensor, target: Tensor, state: None = None) -> tuple[Tensor, None]:
        """The mean cross-entropy, in nats, of target, int64 [B, T], the tokens that follow those of
        input, but for those that are -100. The logits are not kept."""
        loss = self.functions.linear_cross_entropy(
            self._run(input).flatten(0, 1), self.token_embedding.weight, target.flatten()
        )
        return loss, None

    def log_prob(
        self, input: Tensor, target: Tensor, state: None = None
    ) -> tuple[Tensor, Tensor, None]:
        """ln P(target), 0 where target is -100, and the most likely tokens, both [B * T]."""
        log_prob, prediction = self.functions.linear_log_prob(
            self._run(input).flatten(0, 1), self.token_embedding.weight, target.flatten()
        )
        return log_prob, prediction, None

    @torch.no_grad()
    def predict(self, tokens: Tensor, state: GPTState | None = None) -> tuple[Tensor, GPTState]:
        """As `CausalModel` has it, without gradients.

        The last `context_length` tokens count. Beyond those each token moves the position of all,
        which are then read again; so they are where several tokens come at once.
        """
        C = self.config
        if state is None:
            cache = KeyValueCache(
                C.num_layers,
                len(tokens),
                C.num_heads,
                C.context_length,
                C.embedding_dim // C.num_heads,
                self.token_embedding.weight,
            )
            known = tokens
        else:
            cache, known = state.cache, torch.cat([state.tokens, tokens], dim=1)
        if known.shape[1] > C.context_length or tokens.shape[1] > 1:
            tokens = known = known[:, -C.context_length :]
            cache.length = 0
        output = self._run(tokens, cache)[:, -1]  # [B, E]
        logits = self.functions.linear(output, self.token_embedding.weight)
        return logits, GPTState(known, cache)

    def _run(self, input: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        start = cache.length if cache else 0
        check_length(input, self.config.context_length)
        positions = self.position_embedding.weight[start : start + input.shape[1]]
        x = self.dropout(self.token_embedding(input) + positions)  # [B, T, E]
        caches = cache.extend(input.shape[1]) if cache else [None] * len(self.blocks)
        for block, layer_cache in zip(self.blocks, caches, strict=True):
            x = block(x, layer_cache)
        return self.norm(x)
