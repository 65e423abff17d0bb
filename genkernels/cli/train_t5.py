"""`genkernels train t5`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..training import T5_PRESETS
from . import options
from .train import train_model


def train_t5(
    context: typer.Context,
    data: options.PairData = None,
    preset: Annotated[str, typer.Option(help=options.presets_help(T5_PRESETS))] = "words",
    output: options.Output = Path("runs/t5"),
    seed: options.Seed = 0,
    vocab_size: options.VocabSize = None,
    num_layers: options.NumLayers = None,
    num_heads: options.NumHeads = None,
    embedding_dim: options.EmbeddingDim = None,
    feedforward_dim: options.FeedforwardDim = None,
    dropout: options.Dropout = None,
    steps: options.Steps = None,
    minutes: options.Minutes = None,
    optimizer: options.Optimizer = None,
    learning_rate: options.LearningRate = None,
    weight_decay: options.WeightDecay = None,
    schedule: options.Schedule = None,
    warmup: options.Warmup = None,
    min_learning_rate: options.MinLearningRate = None,
    max_grad_norm: options.MaxGradNorm = None,
    batch_size: options.BatchSize = None,
    sequence_length: options.SourceLength = None,
    resume: options.Resume = False,
    stop_after: options.StopAfter = None,
    compare: options.Compare = True,
    sample: options.Sample = True,
    tensorboard: options.TensorBoard = None,
    dry_run: options.DryRun = False,
) -> None:
    """Train a T5 to restore spans cut out of a text, or to answer sources with targets.

    From a file that ends in .tsv, with a source, a tab and a target in each line, it learns to
    answer, from any other one to restore spans. A tenth is held out and only measured on, of a .tsv
    file lines from all over it. Checkpoints and --resume are as with `genkernels train gpt`.

    Examples:

        genkernels train t5 --data notes.txt --minutes 2
        genkernels train t5 --data pairs.tsv --output runs/pairs
        genkernels train t5 --data dates --preset bytes --output runs/dates
        genkernels train t5 --resume --output runs/pairs
    """
    train_model("t5", **locals())
