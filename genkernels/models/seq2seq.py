"""A recurrent encoder-decoder with attention: from sequence to sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..data import TextToTextTokens
from ..nn import GRU
from .config import check_dropout, check_sizes
from .encoder_decoder import EncoderDecoder
from .transformer import FUSED, PLAIN, Functions


@dataclass(frozen=True)
class Seq2SeqConfig:
    """Sizes of a `Seq2Seq`: at most 1,000,000, and at most 1,000 layers.

    vocab_size: the tokenizer's; `pad` and `end` of `TextToTextTokens` come above it.
    embedding_dim: width of a token.
    hidden_size: of the decoder, and of both directions of the encoder together.
    num_layers: of the encoder, and of the decoder.
    bidirectional: whether the encoder reads a source from its end, too.
    dropout: the probability after the embeddings, between the layers and before the last Linear.

    Raises:
        ValueError: a size that is no int or out of range, a bidirectional that is no bool, an odd
            hidden_size beside it, or a dropout outside [0, 1).
    """

    vocab_size: int
    embedding_dim: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "embedding_dim", "hidden_size", "num_layers")
        check_dropout(self.dropout)
        if type(self.bidirectional) is not bool:
            raise ValueError(f"bidirectional must be True or False, got {self.bidirectional!r}")
        if self.bidirectional and self.hidden_size % 2:
            raise ValueError(f"hidden_size must be even for two directions, got {self.hidden_size}")


class CrossAttention(nn.Module):
    """tanh(W [c; h]) of a state h of the decoder and c, the mean of the encoder's states s weighed
    by softmax(h^T A s) (Luong et al. 2015, https://arxiv.org/abs/1508.04025, equations 5, 7 and 8,
    "general")."""

    def __init__(self, hidden_size: int, functions: Functions) -> None:
        super().__init__()
        H = hidden_size
        self.functions = functions
        self.query = nn.Linear(H, H, bias=False)
        self.projection = nn.Linear(2 * H, H, bias=False)

    def forward(self, hidden: Tensor, memory: Tensor, lengths: Tensor | None) -> Tensor:
        """Map states, [B, T, H], to the same shape; `memory` is the encoder's, [B, S, H]."""
        functions = self.functions
        query = functions.linear(hidden, self.query.weight)  # [B, T, H]
        states = memory.unsqueeze(1)  # [B, 1, S, H]
        context = functions.attention(
            query.unsqueeze(1), states, states, key_lengths=lengths, scale=1.0
        ).squeeze(1)  # [B, T, H]
        output = functions.linear(torch.cat([context, hidden], -1), self.projection.weight)
        return output.tanh()


class Decoder(nn.Module):
    """A GRU whose outputs attend to the encoder's, which its states know nothing of: all tokens of
    a target that is known are one sequence and one attention."""

    def __init__(self, gru: nn.Module, attention: CrossAttention) -> None:
        super().__init__()
        self.gru = gru
        self.cross_attention = attention

    def forward(
        self, x: Tensor, hx: Tensor, memory: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Map x, [B, T, E], and the state before it, [layers, B, H], to outputs, [B, T, H], and the
        state behind it."""
        output, hx = self.gru(x, hx)
        return self.cross_attention(output, memory, lengths), hx


class Seq2Seq(EncoderDecoder):
    """Predicts the tokens of a target from a source and the target's tokens before them.

    Equivalent to: a GRU over the embedded source, of one or two directions; from its last state on
    a GRU over the embedded target, `pad` before it; global attention of the latter's outputs to the
    former's, and a Linear (Luong et al. 2015, https://arxiv.org/abs/1508.04025, equations 5 to 8,
    without the input feeding of section 3.3). The state of two directions is that of one, half as
    wide each.

    Texts end with `end` of `TextToTextTokens.above(vocab_size)`, whose sentinels this model does
    not know. `lengths`, int64 [B], counts the tokens of each source; None: all. Nothing limits the
    length of source or target.

    `fused` chooses what computes: the ops of genkernels, or for False the very same model in plain
    PyTorch. Both have one `state_dict` and, for a seed, the same initial values.

    Raises:
        ValueError: in every method, a source that is not [B, S] with S >= 1, or lengths that are
            not [B] numbers from 1 to S.
    """

    name = "seq2seq"

    def __init__(self, config: Seq2SeqConfig, fused: bool = True) -> None:
        super().__init__()
        self.config = config
        self.functions = functions = FUSED if fused else PLAIN
        self.special_tokens = TextToTextTokens.above(config.vocab_size)
        gru = GRU if fused else nn.GRU
        E, H, layers = config.embedding_dim, config.hidden_size, config.num_layers
        # Between the layers only: one layer has no place for it, and torch.nn.GRU warns.
        between = config.dropout if layers > 1 else 0.0
        vocab_size = self.special_tokens.sentinel
        self.source_embedding = nn.Embedding(vocab_size, E)
        self.target_embedding = nn.Embedding(vocab_size, E)
        self.encoder = gru(
            E,
            H // 2 if config.bidirectional else H,
            layers,
            batch_first=True,
            dropout=between,
            bidirectional=config.bidirectional,
        )
        self.decoder = Decoder(
            gru(E, H, layers, batch_first=True, dropout=between), CrossAttention(H, functions)
        )
        self.linear = nn.Linear(H, vocab_size, bias=False)
        self.dropout = functions.dropout(config.dropout)

    @property
    def output_weight(self) -> Tensor:
        return self.linear.weight

    def encode(self, source: Tensor, lengths: Tensor | None) -> list[Tensor]:
        """The encoder's states, [B, S, H], and what the decoder begins with, [B, layers, H]."""
        B, S = source.shape
        x = self.dropout(self.source_embedding(source))  # [B, S, E]
        if lengths is None:
            states, hx = self.encoder(x)
        else:
            # The second direction begins at the end of each source, not at what it is padded to.
            counts = lengths.cpu()
            if counts.shape != (B,) or not ((counts >= 1) & (counts <= S)).all():
                raise ValueError(
                    f"lengths must be {B} numbers from 1 to {S}, got {counts.tolist()}"
                )
            packed = pack_padded_sequence(x, counts, batch_first=True, enforce_sorted=False)
            packed, hx = self.encoder(packed)
            states, _ = pad_packed_sequence(packed, batch_first=True, total_length=S)
        hx = hx.unflatten(0, (self.config.num_layers, -1))  # [layers, directions, B, ..]
        return [states, hx.permute(2, 0, 1, 3).flatten(2)]

    def decode(
        self,
        input: Tensor,
        memory: list[Tensor],
        lengths: Tensor | None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        states, first = memory
        hx = (first if state is None else state).transpose(0, 1).contiguous()  # [layers, B, H]
        x = self.dropout(self.target_embedding(input))  # [B, T, E]
        output, hx = self.decoder(x, hx, states, lengths)
        return self.dropout(output), hx.transpose(0, 1)
