"""A small TensorFlow/Keras text generator, ported to PyTorch and genkernels name for name.

    python examples/seed_rnn.py
    python examples/seed_rnn.py --data notes.txt --steps 500 --rnn-units 512

`RNN`, `initialize_hidden_state`, `train_rnn` and `predict` do what their namesakes do in Keras:
an Embedding, a GRU and a Dense layer trained with Adam on sparse categorical cross-entropy from
logits. Two mistakes of the original are corrected:

* Its inner training step got `hidden` as an argument and threw the new state away, so that every
  sequence of an epoch started from the same zeros. Here `train_step` returns the state, and
  `train_rnn` hands it to the step that reads the next piece of the same text.
* Its loss added up the losses of the time steps and was divided by nothing, so that the gradient
  grew with the length of the sequence, and the loss it printed meant nothing beside another
  length's. Here the loss is the mean over batch and time: nats per token.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkernels.nn import GRU


class RNN(nn.Module):
    """Embedding, GRU, Linear: the logits of the next token after each token."""

    def __init__(self, vocab_size: int, embedding_dim: int, rnn_units: int, batch_size: int):
        super().__init__()
        self.rnn_units = rnn_units
        self.batch_size = batch_size
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.gru = GRU(embedding_dim, rnn_units, batch_first=True)
        self.dense = nn.Linear(rnn_units, vocab_size)

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """x int64 [B, T], hidden [1, B, units] -> logits [B, T, vocabulary], state [1, B, units]"""
        output, state = self.gru(self.embedding(x), hidden)
        return self.dense(output), state

    def initialize_hidden_state(self) -> Tensor:
        return torch.zeros(1, self.batch_size, self.rnn_units)


def train_step(
    model: RNN, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, hidden: Tensor
) -> tuple[float, Tensor]:
    optimizer.zero_grad()
    logits, hidden = model(x, hidden)
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    loss.backward()
    optimizer.step()
    return loss.item(), hidden.detach()


def train_rnn(
    model: RNN, text: Tensor, sequence_length: int, steps: int, learning_rate: float = 2e-3
) -> list[float]:
    """Train on text, int64 [N], read as `model.batch_size` streams; returns the losses."""
    length = (len(text) - 1) // model.batch_size
    if length < sequence_length:
        raise SystemExit(
            f"text too short: {len(text)} characters; expected more than "
            f"{model.batch_size * sequence_length} (batch size x sequence length)"
        )
    used = model.batch_size * length
    inputs, targets = text[:used].view(-1, length), text[1 : used + 1].view(-1, length)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    pieces = length // sequence_length
    losses = []
    for step in range(steps):
        if step % pieces == 0:
            hidden = model.initialize_hidden_state()
        now = slice(step % pieces * sequence_length, (step % pieces + 1) * sequence_length)
        loss, hidden = train_step(model, optimizer, inputs[:, now], targets[:, now], hidden)
        losses.append(loss)
        if (step + 1) % max(steps // 10, 1) == 0:
            print(f"step {step + 1:5}  loss {loss:.4f}", flush=True)
    return losses


@torch.no_grad()
def predict(model: RNN, prompt: Tensor, length: int, temperature: float = 1.0) -> Tensor:
    """Continue prompt, int64 [P], by sampling one token after another; returns [P + length]."""
    hidden = torch.zeros(1, 1, model.rnn_units)
    tokens = [prompt]
    for _ in range(length):
        logits, hidden = model(tokens[-1][None], hidden)
        tokens.append(torch.multinomial(torch.softmax(logits[0, -1] / temperature, 0), 1))
    return torch.cat(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="UTF-8 text file (default: Python's own help)")
    parser.add_argument("--embedding-dim", type=int, default=64)
    parser.add_argument("--rnn-units", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=100)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--length", type=int, default=300, help="characters to generate")
    args = parser.parse_args()

    try:
        text = args.data.read_text("utf-8-sig") if args.data else "\n".join(topics.values())
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{args.data}: {error}")
    characters = sorted(set(text))
    index = {character: i for i, character in enumerate(characters)}
    unknown = sorted(set(args.prompt) - set(characters))
    if unknown or not args.prompt:
        parser.error(f"--prompt: expected characters of the text, got {''.join(unknown)!r}")

    torch.manual_seed(args.seed)
    model = RNN(len(characters), args.embedding_dim, args.rnn_units, args.batch_size)
    tokens = torch.tensor([index[character] for character in text])
    train_rnn(model, tokens, args.sequence_length, args.steps)
    prompt = torch.tensor([index[character] for character in args.prompt])
    print("".join(characters[i] for i in predict(model, prompt, args.length, 0.8).tolist()))


if __name__ == "__main__":
    main()
