"""A word-level language model, trained as PyTorch users do.

    python examples/word_language_model.py --steps 300

Nothing here knows of genkernels but the import of GRU. With `from torch.nn import GRU` in its place
this is the same program in plain PyTorch: the same weights, the same losses, more seconds.
"""

import argparse
import math
import re
import time
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import nn

from genkernels.nn import GRU


class WordLanguageModel(nn.Module):
    def __init__(self, vocab_size, embedding_dim, hidden_size, num_layers, dropout):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(vocab_size, embedding_dim)
        self.gru = GRU(embedding_dim, hidden_size, num_layers, dropout=dropout)
        self.decoder = nn.Linear(hidden_size, vocab_size)

    def forward(self, tokens, hidden=None):  # [T, B] -> [T, B, vocabulary]
        output, hidden = self.gru(self.drop(self.encoder(tokens)), hidden)
        return self.decoder(self.drop(output)), hidden


def batchify(tokens, batch_size):
    """Cut tokens [N] into columns that are read side by side; [N // batch_size, batch_size]"""
    length = len(tokens) // batch_size
    return tokens[: length * batch_size].view(batch_size, length).t().contiguous()


def batches(data, bptt):
    for start in range(0, len(data) - 1, bptt):
        end = min(start + bptt, len(data) - 1)
        yield data[start:end], data[start + 1 : end + 1]


@torch.no_grad()
def evaluate(model, data, bptt):
    model.eval()
    criterion = nn.CrossEntropyLoss(reduction="sum")
    total, hidden = 0.0, None
    for inputs, targets in batches(data, bptt):
        logits, hidden = model(inputs, hidden)
        total += criterion(logits.flatten(0, 1), targets.flatten()).item()
    return total / (len(data) - 1) / data.shape[1]


def train(model, data, args):
    model.train()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    step = 0
    start = time.perf_counter()
    while step < args.steps:
        hidden = None
        for inputs, targets in batches(data, args.bptt):
            optimizer.zero_grad()
            logits, hidden = model(inputs, hidden)
            hidden = hidden.detach()
            loss = criterion(logits.flatten(0, 1), targets.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            step += 1
            if step % args.log_interval == 0 or step == args.steps:
                seconds = (time.perf_counter() - start) / step
                print(f"step {step} loss {loss.item():.6f} ms/step {1e3 * seconds:.1f}", flush=True)
            if step == args.steps:
                break


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="UTF-8 text file (default: Python's own help)")
    parser.add_argument("--vocab-size", type=int, default=5000, help="most frequent words kept")
    parser.add_argument("--embedding-dim", type=int, default=128)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--bptt", type=int, default=35, help="words that a gradient reaches")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--clip", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--log-interval", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1111)
    args = parser.parse_args()

    try:
        text = args.data.read_text("utf-8-sig") if args.data else "\n".join(topics.values())
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{args.data}: {error}")
    words = re.findall(r"\w+|[^\w\s]|\n", text)
    cut = len(words) * 9 // 10  # the last tenth is held out
    if len(words) - cut < 2 * args.batch_size:
        parser.error(f"text too short: {len(words)} words; expected {20 * args.batch_size}")
    kept = Counter(words[:cut]).most_common(args.vocab_size - 1)
    index = {word: i for i, (word, _) in enumerate(kept, start=1)}  # 0 is every other word
    tokens = torch.tensor([index.get(word, 0) for word in words])

    torch.manual_seed(args.seed)
    model = WordLanguageModel(
        len(index) + 1, args.embedding_dim, args.hidden_size, args.layers, args.dropout
    )
    train(model, batchify(tokens[:cut], args.batch_size), args)
    loss = evaluate(model, batchify(tokens[cut:], args.batch_size), args.bptt)
    print(f"held-out loss {loss:.6f} perplexity {math.exp(loss):.2f}")


if __name__ == "__main__":
    main()
