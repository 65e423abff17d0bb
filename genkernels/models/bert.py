"""A bidirectional Transformer that fills in masked tokens and classifies sentences: BERT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data import SpecialTokens
from .config import check_sizes
from .evaluating import evaluating
from .transformer import (
    FUSED,
    MLP,
    PLAIN,
    Functions,
    SelfAttention,
    TransformerConfig,
    check_length,
    initialize,
)


@dataclass(frozen=True)
class BERTConfig(TransformerConfig):
    """Sizes of a `BERT`: those of `TransformerConfig`, and

    num_classes: of the head that classifies sentences; None for a model without one.

    `vocab_size` is the tokenizer's; the ids of `SpecialTokens` come above it. `context_length`
    counts them too, and is at least 3.
    """

    num_classes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context_length < 3:
            raise ValueError(
                f"context_length must be >= 3, [CLS] and [SEP] included, got {self.context_length}"
            )
        if self.num_classes is not None:
            check_sizes(self, "num_classes")


class Block(nn.Module):
    """LayerNorm(x + attention(x)), then LayerNorm(x + MLP(x)), both with dropout."""

    def __init__(self, config: BERTConfig, functions: Functions) -> None:
        super().__init__()
        E, bias = config.embedding_dim, config.bias
        self.attention = SelfAttention(E, config.num_heads, config.dropout, bias, functions)
        self.norm1 = nn.LayerNorm(E, bias=bias)
        self.mlp = MLP(E, bias, functions)
        self.norm2 = nn.LayerNorm(E, bias=bias)
        self.dropout = functions.dropout(config.dropout)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        x = self.norm1(self.dropout(self.attention(x, key_lengths=lengths), residual=x))
        return self.norm2(self.dropout(self.mlp(x), residual=x))


class Fillings(NamedTuple):
    """The likeliest tokens at M masked places, both [M, k], the likeliest first."""

    probability: Tensor
    token: Tensor


class BERT(nn.Module):
    """Predicts tokens from all tokens around them.

    Equivalent to: BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805, sections 3 and A.2),
    without segments: LayerNorm of the sum of a token's and its position's embedding; blocks of
    attention and an MLP, with a LayerNorm after each residual (Vaswani et al. 2017); then
    LayerNorm(gelu(Linear(x))), and logits by the transposed token embedding and a bias. A sentence
    is classified by Linear(tanh(Linear(x))) of its first token, [CLS].

    A text is read as [CLS] tokens [SEP] and then [PAD], whose ids are `SpecialTokens.above(
    vocab_size)`. `lengths`, int64 [B], counts what comes before [PAD]; None: there is none.

    `fused` chooses what computes: the ops of genkernels, or for False the very same model in plain
    PyTorch. Both have one `state_dict` and, for a seed, the same initial values.

    Raises:
        ValueError: in every method, more tokens than `context_length`.
    """

    name = "bert"

    def __init__(self, config: BERTConfig, fused: bool = True) -> None:
        super().__init__()
        self.config = config
        self.functions = FUSED if fused else PLAIN
        E = config.embedding_dim
        self.special_tokens = SpecialTokens.above(config.vocab_size)
        self.token_embedding = nn.Embedding(config.vocab_size + len(self.special_tokens), E)
        self.position_embedding = nn.Embedding(config.context_length, E)
        self.norm = nn.LayerNorm(E, bias=config.bias)
        self.dropout = self.functions.dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, self.functions) for _ in range(config.num_layers))
        self.transform = nn.Linear(E, E, config.bias)
        self.transform_norm = nn.LayerNorm(E, bias=config.bias)
        self.output_bias = nn.Parameter(torch.empty(config.vocab_size)) if config.bias else None
        if config.num_classes is not None:
            self.pooler = nn.Linear(E, E)
            self.classifier = nn.Linear(E, config.num_classes)
        initialize(self)

    def forward(self, input: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Map tokens, int64 [B, T], to logits [B, T, V] of the tokenizer's tokens."""
        x = self._transformed(self._run(input, lengths))
        return self.functions.linear(x, self._output_weight(), self.output_bias)

    def loss(
        self, input: Tensor, target: Tensor, lengths: Tensor | None = None, state: None = None
    ) -> tuple[Tensor, None]:
        """The mean cross-entropy, in nats, of target: int64 [B, T], the masked tokens, and -100
        where none is; or [B], the sentences' classes. Logits of other places are not computed."""
        x = self._run(input, lengths)  # [B, T, E]
        if target.dim() == 1:
            return nn.functional.cross_entropy(self._classify(x), target), None
        chosen = target != -100  # [B, T]
        loss = self.functions.linear_cross_entropy(
            self._transformed(x[chosen]),
            self._output_weight(),
            target[chosen],
            linear_bias=self.output_bias,
        )
        return loss, None

    def log_prob(
        self, input: Tensor, target: Tensor, lengths: Tensor | None = None, state: None = None
    ) -> tuple[Tensor, Tensor, None]:
        """ln P(target), 0 where target is -100, and the most likely tokens, both [B * T]."""
        log_prob, prediction = self.functions.linear_log_prob(
            self._transformed(self._run(input, lengths)).flatten(0, 1),
            self._output_weight(),
            target.flatten(),
            linear_bias=self.output_bias,
        )
        return log_prob, prediction, None

    @torch.no_grad()
    def fill_mask(
        self,
        input: Tensor,
        k: int = 5,
        positions: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Fillings:
        """The k likeliest tokens at each [MASK] of input, int64 [B, T], row by row.

        `positions`, bool [B, T], are masked first. Dropout is off.

        Raises:
            ValueError: k is not from 1 to vocab_size.
        """
        if not 1 <= k <= self.config.vocab_size:
            raise ValueError(f"k must be from 1 to vocab_size {self.config.vocab_size}, got {k}")
        if positions is not None:
            input = input.masked_fill(positions, self.special_tokens.mask)
        with evaluating(self):
            x = self._run(input, lengths)[input == self.special_tokens.mask]  # [M, E]
            logits = self.functions.linear(
                self._transformed(x), self._output_weight(), self.output_bias
            )
        return Fillings(*logits.softmax(-1).topk(k))

    def classify(self, input: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Map sentences, int64 [B, T], each begun by [CLS], to logits [B, num_classes].

        Raises:
            ValueError: the model has no classes.
        """
        return self._classify(self._run(input, lengths))

    def _classify(self, x: Tensor) -> Tensor:
        if self.config.num_classes is None:
            raise ValueError("num_classes is None: this model has no head that classifies")
        linear = self.functions.linear
        pooled = linear(x[:, 0], self.pooler.weight, self.pooler.bias).tanh()  # [B, E]
        return linear(pooled, self.classifier.weight, self.classifier.bias)

    def _run(self, input: Tensor, lengths: Tensor | None) -> Tensor:
        check_length(input, self.config.context_length)
        x = self.token_embedding(input) + self.position_embedding.weight[: input.shape[1]]
        x = self.dropout(self.norm(x))  # [B, T, E]
        for block in self.blocks:
            x = block(x, lengths)
        return x

    def _transformed(self, x: Tensor) -> Tensor:
        weight, bias = self.transform.weight, self.transform.bias
        return self.transform_norm(self.functions.linear(x, weight, bias, activation="gelu"))

    def _output_weight(self) -> Tensor:
        return self.token_embedding.weight[: self.config.vocab_size]  # [V, E]
