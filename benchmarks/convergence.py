"""Training on real text with genkernels and in plain PyTorch, from one seed: `make convergence`.

A preset's model and settings on the text that `genkernels train` reads by default. Both see the
same batches; the RNN, dropout included, draws the same random numbers, and the GPT has no dropout:
what differs is rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import command
from benchmarks.bars import machine
from benchmarks.workers import Failure
from genkernels.data import (
    Batches,
    CropBatches,
    Tokenizer,
    load_text,
    sequence_batches,
    split_text,
    train_tokenizer,
)
from genkernels.models import GPT, RNNLanguageModel
from genkernels.training import (
    GPT_PRESETS,
    RNN_PRESETS,
    Preset,
    TrainingConfig,
    evaluate,
    train,
)

ALLOWED = 0.005  # relative difference of the held-out losses at the end
EVALUATIONS = 20


class Program(NamedTuple):
    """What is trained: the same model on genkernels and in plain PyTorch, for how many steps unless
    told otherwise, and the name of what is written."""

    preset: Preset
    models: dict[str, Callable[[Any], nn.Module]]
    steps: int
    file: str


PROGRAMS = {
    "rnn": Program(
        RNN_PRESETS["seed"],
        {
            "genkernels": RNNLanguageModel,
            "torch": functools.partial(RNNLanguageModel, gru=torch.nn.GRU),
        },
        500,
        "convergence",
    ),
    "gpt": Program(
        GPT_PRESETS["nanogpt-cpu"],
        {"genkernels": GPT, "torch": functools.partial(GPT, fused=False)},
        2000,
        "convergence_gpt",
    ),
}


def batches_of(tokens: Tensor, sizes: Any, config: TrainingConfig, seed: int) -> Batches:
    assert config.batch_size != "full"
    if config.sequence_length is None:
        return CropBatches(tokens, config.batch_size, sizes.context_length, seed)
    return sequence_batches(tokens, config.batch_size, config.sequence_length)


def curves(program: Program, steps: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """For each of the two, the steps and the losses, in nats per token, on the training batches and
    on the text held out."""
    preset = program.preset
    text = split_text(load_text(None))
    tokenizer: Tokenizer = train_tokenizer(text.training, preset.model.vocab_size)
    sizes = dataclasses.replace(preset.model, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(preset.training, steps=steps, minutes=None)
    tokens, held_out = map(tokenizer.encode, text)
    batches = batches_of(tokens, sizes, config, seed)
    every = max(1, steps // EVALUATIONS)
    found: dict[str, dict[str, list[float]]] = {}
    for name, make_model in program.models.items():
        torch.manual_seed(seed)
        model = make_model(sizes)
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
    program = PROGRAMS[options.model]
    steps = options.steps or program.steps
    try:
        found = curves(program, steps, options.seed)
    except FloatingPointError as error:
        raise Failure(str(error)) from None
    last = {name: curve["held_out"][-1] for name, curve in found.items()}
    difference = abs(last["genkernels"] - last["torch"]) / last["torch"]
    print(
        f"held-out loss after {steps} steps: genkernels {last['genkernels']:.4f}, plain "
        f"PyTorch {last['torch']:.4f} nats per token: {difference:.2%} apart"
    )
    if options.save:
        folder = Path(options.save)
        report = {**machine(), "seed": options.seed, "curves": found}
        command.write_json(folder / f"{program.file}.json", report)
        draw_chart(folder / f"{program.file}.png", found)
    return 0 if difference <= ALLOWED else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence",
        description="Train a preset's model (of the RNN seed, of the GPT nanogpt-cpu) on real text "
        "with genkernels and in plain PyTorch from the same seed, and compare the losses on the "
        "text held out. A step takes about two seconds for the RNN and a tenth for the GPT.",
        epilog="Exit code: 0 when the last held-out losses are within 0.5% of each other, else 1; "
        "2 when it could not be found out. Example: python -m benchmarks.convergence --steps 100",
    )
    parser.add_argument(
        "--model", choices=PROGRAMS, default="rnn", help="which to train (default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="of each (default: "
        + ", ".join(f"{p.steps} of the {name}" for name, p in PROGRAMS.items())
        + ")",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    command.add_save(parser, "write convergence.json and .png, or convergence_gpt's,")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        parser.error(f"argument --steps: expected at least 1, got {options.steps}")
    if not 0 <= options.seed < 2**63:
        parser.error(f"argument --seed: expected 0 to 2^63 - 1, got {options.seed}")
    command.check(parser, options)
    return command.run("convergence", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
