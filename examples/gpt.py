"""A byte-level GPT, trained as PyTorch users do.

    python examples/gpt.py --steps 300

Nothing here knows of genkernels but the import of scaled_dot_product_attention. With
`from torch.nn.functional import scaled_dot_product_attention` in its place this is the same program
in plain PyTorch: the same weights, the same losses, more seconds.
"""

import argparse
import math
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn import functional as F

from genkernels import scaled_dot_product_attention


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x):  # [B, T, C]
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(*qkv.unbind(), is_causal=True)  # [B, heads, T, D]
        return self.projection(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    def __init__(self, vocab_size, context, layers, heads, width, dropout):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                is_residual = name.endswith(("projection.weight", "mlp.2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if is_residual else 0.02)

    def forward(self, tokens):  # [B, T] -> [B, T, vocabulary]
        x = self.drop(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


def loss_of(model, crops):
    return F.cross_entropy(model(crops[:, :-1]).flatten(0, 1), crops[:, 1:].flatten())


def train(model, data, args):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    crops = data.unfold(0, args.context + 1, 1)
    start = time.perf_counter()
    for step in range(1, args.steps + 1):
        loss = loss_of(model, crops[torch.randint(len(crops), (args.batch_size,))])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % args.log_interval == 0 or step == args.steps:
            seconds = (time.perf_counter() - start) / step
            print(f"step {step} loss {loss.item():.6f} ms/step {1e3 * seconds:.1f}", flush=True)


@torch.no_grad()
def evaluate(model, data, context):
    model.eval()
    windows = data.unfold(0, context + 1, context)
    return sum(loss_of(model, w).item() * len(w) for w in windows.split(32)) / len(windows)


@torch.no_grad()
def sample(model, tokens, count, context):
    model.eval()
    for _ in range(count):
        logits = model(tokens[None, -context:])[0, -1]
        tokens = torch.cat([tokens, torch.multinomial((logits / 0.8).softmax(-1), 1)])
    return bytes(tokens.tolist()).decode(errors="replace")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="UTF-8 text file (default: Python's own help)")
    parser.add_argument("--context", type=int, default=128, help="bytes that a prediction sees")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--log-interval", type=int, default=20)
    parser.add_argument("--length", type=int, default=200, help="bytes of the sample at the end")
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args()

    try:
        text = args.data.read_text("utf-8-sig") if args.data else "\n".join(topics.values())
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{args.data}: {error}")
    data = torch.tensor(list(text.encode()))
    cut = len(data) * 9 // 10  # the last tenth is held out
    if len(data) - cut <= args.context:
        parser.error(f"text too short: {len(data)} bytes; expected over {10 * args.context}")

    torch.manual_seed(args.seed)
    model = GPT(256, args.context, args.layers, args.heads, args.width, args.dropout)
    train(model, data[:cut], args)
    loss = evaluate(model, data[cut:], args.context)
    print(f"held-out loss {loss:.6f} bits/byte {loss / math.log(2):.3f}")
    print(sample(model, data[cut : cut + 16], args.length, args.context))


if __name__ == "__main__":
    main()
