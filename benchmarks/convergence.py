"""Training on real text with genkernels and in plain PyTorch, from one seed: `make convergence`.

The seed preset's model and settings on the text that `genkernels train` reads by default. Both see
the same batches and, dropout included, draw the same random numbers; what differs is rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import genkernels
from benchmarks import command
from benchmarks.bars import machine
from benchmarks.workers import Failure
from genkernels.data import load_text, sequence_batches, split_text, train_tokenizer
from genkernels.models import RNNLanguageModel
from genkernels.training import RNN_PRESETS, evaluate, train

GRU = {"genkernels": genkernels.nn.GRU, "torch": torch.nn.GRU}
ALLOWED = 0.005  # relative difference of the held-out losses at the end
EVALUATIONS = 20


def curves(steps: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """For each of the two, the steps and the losses, in nats per token, on the training batches and
    on the text held out."""
    preset = RNN_PRESETS["seed"]
    text = split_text(load_text(None))
    tokenizer = train_tokenizer(text.training, preset.model.vocab_size)
    sizes = dataclasses.replace(preset.model, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(preset.training, steps=steps, minutes=None)
    tokens, held_out = map(tokenizer.encode, text)
    batches = sequence_batches(tokens, config.batch_size, config.sequence_length)
    every = max(1, steps // EVALUATIONS)
    found: dict[str, dict[str, list[float]]] = {}
    for name, gru in GRU.items():
        torch.manual_seed(seed)
        model = RNNLanguageModel(sizes, gru=gru)
        found[name] = curve = {"step": [], "training": [], "held_out": []}
        for step in train(model, batches, config):
            if step.number % every and step.number != steps:
                continue
            loss = evaluate(model, held_out, tokenizer.byte_lengths, batch_size=16).cross_entropy
            for key, value in (("step", step.number), ("training", step.loss), ("held_out", loss)):
                curve[key].append(value)
            print(
                f"[{name}, step {step.number} of {steps}] training {step.loss:.4f}, "
                f"held out {loss:.4f}",
                file=sys.stderr,
                flush=True,
            )
    return found


def draw_chart(path: Path, found: dict[str, dict[str, list[float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5))
    styles: dict[str, Any] = {
        "genkernels": {"color": "C0", "linewidth": 2.5},
        "torch": {"color": "C1", "linestyle": "--", "marker": "o", "markersize": 4},
    }
    for name, curve in found.items():
        axis.plot(curve["step"], curve["held_out"], label=f"{name}, held out", **styles[name])
        axis.plot(
            curve["step"], curve["training"], label=f"{name}, training", alpha=0.4, **styles[name]
        )
    axis.set_xlabel("step")
    axis.set_ylabel("cross-entropy, nats per token")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    command.replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    pyplot.close(figure)


def run(options: argparse.Namespace) -> int:
    try:
        found = curves(options.steps, options.seed)
    except FloatingPointError as error:
        raise Failure(str(error)) from None
    last = {name: curve["held_out"][-1] for name, curve in found.items()}
    difference = abs(last["genkernels"] - last["torch"]) / last["torch"]
    print(
        f"held-out loss after {options.steps} steps: genkernels {last['genkernels']:.4f}, plain "
        f"PyTorch {last['torch']:.4f} nats per token: {difference:.2%} apart"
    )
    if options.save:
        folder = Path(options.save)
        report = {**machine(), "seed": options.seed, "curves": found}
        command.write_json(folder / "convergence.json", report)
        draw_chart(folder / "convergence.png", found)
    return 0 if difference <= ALLOWED else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence",
        description="Train the seed preset's model on real text with genkernels and in plain "
        "PyTorch from the same seed, and compare the losses on the text held out. Takes about two "
        "seconds a step.",
        epilog="Exit code: 0 when the last held-out losses are within 0.5% of each other, else 1; "
        "2 when it could not be found out. Example: python -m benchmarks.convergence --steps 100",
    )
    parser.add_argument(
        "--steps", type=int, default=500, metavar="N", help="of each (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    command.add_save(parser, "write convergence.json and convergence.png")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"argument --steps: expected at least 1, got {options.steps}")
    if not 0 <= options.seed < 2**63:
        parser.error(f"argument --seed: expected 0 to 2^63 - 1, got {options.seed}")
    command.check(parser, options)
    return command.run("convergence", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
