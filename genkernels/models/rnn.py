"""A recurrent language model: Embedding, GRU, Linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..nn import GRU, Linear
from .sampling import sample_token

# Far above what fits into a machine, far below where sizes overflow or building takes forever.
MAX_SIZE = 1_000_000
MAX_LAYERS = 1_000


@dataclass(frozen=True)
class RNNConfig:
    """Sizes of an `RNNLanguageModel`: at most 1,000,000, and at most 1,000 layers.

    `dropout` is the probability after the embedding, between the layers and before the last Linear.

    Raises:
        ValueError: a size that is no int or out of range, or a dropout outside [0, 1).
    """

    vocab_size: int
    embedding_dim: int
    hidden_size: int
    num_layers: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embedding_dim", "hidden_size", "num_layers"):
            value = getattr(self, name)
            most = MAX_LAYERS if name == "num_layers" else MAX_SIZE
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} must be an int from 1 to {most:,}, got {value!r}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")


class RNNLanguageModel(nn.Module):
    """Predicts each next token from the tokens before it.

    Equivalent to: `Linear(GRU(Embedding(input)))`, with dropout between them.

    `gru` is the class of the recurrent layers: `genkernels.nn.GRU`, with `genkernels.nn.Linear`
    after it and `genkernels.linear_cross_entropy` as its loss, or `torch.nn.GRU` for the very same
    model in plain PyTorch. Both have one `state_dict`.
    """

    name = "rnn"

    def __init__(self, config: RNNConfig, gru: type[nn.Module] = GRU) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.gru = gru(
            config.embedding_dim,
            config.hidden_size,
            config.num_layers,
            batch_first=True,
            # Between the layers only: one layer has no place for it, and torch.nn.GRU warns.
            dropout=config.dropout if config.num_layers > 1 else 0.0,
        )
        self.linear = (Linear if gru is GRU else nn.Linear)(config.hidden_size, config.vocab_size)
        self._is_fused = gru is GRU
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map tokens, int64 [B, T], to logits [B, T, V] and the last hidden state [layers, B, H].

        `hx` is the hidden state [layers, B, H] before the first token; zeros by default.
        """
        output, hx = self._run(input, hx)
        return self.linear(output), hx

    def loss(
        self, input: Tensor, target: Tensor, hx: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy, in nats, of target, int64 [B, T], the tokens that follow those of
        input; and the last hidden state. The logits are not kept."""
        output, hx = self._run(input, hx)
        loss = (ops if self._is_fused else reference).linear_cross_entropy(
            output.flatten(0, 1),
            self.linear.weight,
            target.flatten(),
            linear_bias=self.linear.bias,
        )
        return loss, hx

    def log_prob(
        self, input: Tensor, target: Tensor, hx: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ln P(target) and the most likely tokens, both [B * T], and the last hidden state."""
        output, hx = self._run(input, hx)
        log_prob, prediction = (ops if self._is_fused else reference).linear_log_prob(
            output.flatten(0, 1),
            self.linear.weight,
            target.flatten(),
            linear_bias=self.linear.bias,
        )
        return log_prob, prediction, hx

    def _run(self, input: Tensor, hx: Tensor | None) -> tuple[Tensor, Tensor]:
        embedded = self.dropout(self.embedding(input))  # [B, T, E]
        output, hx = self.gru(embedded, hx)  # [B, T, H], [layers, B, H]
        return self.dropout(output), hx

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue each row of `prompt`, int64 [B, P]; returns [B, P + max_new_tokens].

        `temperature`, `top_k` and `generator` are those of `sample_token`. Dropout is off.

        Raises:
            ValueError: a prompt without tokens, or an argument out of range.
        """
        if prompt.dim() != 2 or prompt.shape[1] < 1:
            raise ValueError(f"prompt must be [B, P] with P >= 1, got {list(prompt.shape)}")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be >= 0, got {max_new_tokens}")
        was_training = self.training
        self.eval()
        tokens, hx = [prompt], None
        for _ in range(max_new_tokens):
            logits, hx = self(tokens[-1], hx)
            tokens.append(sample_token(logits[:, -1], temperature, top_k, generator))  # [B, 1]
        self.train(was_training)
        return torch.cat(tokens, dim=1)
