"""A recurrent language model: Embedding, GRU or RNN, Linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops, reference
from ..nn import GRU, RNN, Linear
from .config import check_dropout, check_sizes
from .sampling import CausalModel

CellName = Literal["gru", "tanh"]
# The recurrent layers of genkernels, and the same of PyTorch.
CELLS: dict[CellName, tuple[type[nn.Module], type[nn.Module]]] = {
    "gru": (GRU, nn.GRU),
    "tanh": (RNN, nn.RNN),
}


@dataclass(frozen=True)
class RNNConfig:
    """Sizes of an `RNNLanguageModel`: at most 1,000,000, and at most 1,000 layers.

    `dropout` is the probability after the embedding, between the layers and before the last Linear.
    `cell` is what the layers are: "gru", or "tanh" for Elman's, a third as large and as slow.
    `tie_weights`: whether the last Linear's weight is the embedding's (Press and Wolf 2017,
    https://arxiv.org/abs/1608.05859), which takes an embedding_dim that is hidden_size.

    Raises:
        ValueError: a size that is no int or out of range, a dropout outside [0, 1), another cell,
            or weights to tie that differ in shape.
    """

    vocab_size: int
    embedding_dim: int
    hidden_size: int
    num_layers: int = 1
    dropout: float = 0.0
    cell: CellName = "gru"
    tie_weights: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "embedding_dim", "hidden_size", "num_layers")
        check_dropout(self.dropout)
        if self.cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {self.cell!r}")
        if type(self.tie_weights) is not bool:
            raise ValueError(f"tie_weights must be True or False, got {self.tie_weights!r}")
        if self.tie_weights and self.embedding_dim != self.hidden_size:
            raise ValueError(
                f"embedding_dim must be hidden_size {self.hidden_size} to tie weights, "
                f"got {self.embedding_dim}"
            )


class RNNLanguageModel(CausalModel):
    """Predicts each next token from the tokens before it.

    Equivalent to: `Linear(GRU(Embedding(input)))`, with dropout between them; RNN for GRU where
    the config's cell is "tanh".

    `gru` is the class of the recurrent layers: by default `genkernels.nn.GRU` (or `RNN`), with
    `genkernels.nn.Linear` after it and `genkernels.linear_cross_entropy` as its loss, or
    `torch.nn.GRU` (or `RNN`) for the very same model in plain PyTorch. Both have one `state_dict`,
    in which the layers are "gru" whatever their cell.
    """

    name = "rnn"

    def __init__(self, config: RNNConfig, gru: type[nn.Module] | None = None) -> None:
        super().__init__()
        fused, _ = CELLS[config.cell]
        gru = gru or fused
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.gru = gru(
            config.embedding_dim,
            config.hidden_size,
            config.num_layers,
            batch_first=True,
            # Between the layers only: one layer has no place for it, and torch.nn's warn.
            dropout=config.dropout if config.num_layers > 1 else 0.0,
        )
        self._is_fused = gru is fused
        linear = Linear if self._is_fused else nn.Linear
        if config.tie_weights:
            # One parameter under one name: a checkpoint holds it once.
            self.bias = nn.Parameter(torch.zeros(config.vocab_size))
            nn.init.normal_(self.embedding.weight, std=config.hidden_size**-0.5)
        else:
            self.linear = linear(config.hidden_size, config.vocab_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map tokens, int64 [B, T], to logits [B, T, V] and the last hidden state [layers, B, H].

        `hx` is the hidden state [layers, B, H] before the first token; zeros by default.
        """
        output, hx = self._run(input, hx)
        return self._logits(output), hx

    def loss(
        self, input: Tensor, target: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy, in nats, of target, int64 [B, T], the tokens that follow those of
        input; and the last hidden state, as `state` is the first. The logits are not kept."""
        output, state = self._run(input, state)
        weight, bias = self._classes
        loss = (ops if self._is_fused else reference).linear_cross_entropy(
            output.flatten(0, 1), weight, target.flatten(), linear_bias=bias
        )
        return loss, state

    def log_prob(
        self, input: Tensor, target: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ln P(target) and the most likely tokens, both [B * T], and the last hidden state."""
        output, state = self._run(input, state)
        weight, bias = self._classes
        log_prob, prediction = (ops if self._is_fused else reference).linear_log_prob(
            output.flatten(0, 1), weight, target.flatten(), linear_bias=bias
        )
        return log_prob, prediction, state

    def _run(self, input: Tensor, hx: Tensor | None) -> tuple[Tensor, Tensor]:
        embedded = self.dropout(self.embedding(input))  # [B, T, E]
        output, hx = self.gru(embedded, hx)  # [B, T, H], [layers, B, H]
        return self.dropout(output), hx

    def predict(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, state = self._run(tokens, state)
        return self._logits(output[:, -1]), state

    def _logits(self, output: Tensor) -> Tensor:
        if not self.config.tie_weights:
            return self.linear(output)
        return (ops if self._is_fused else F).linear(output, self.embedding.weight, self.bias)

    @property
    def _classes(self) -> tuple[Tensor, Tensor]:
        """Weight [V, H] and bias [V] of the logits."""
        if self.config.tie_weights:
            return self.embedding.weight, self.bias
        return self.linear.weight, self.linear.bias
