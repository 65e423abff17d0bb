"""`genkernels train seq2seq`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..training import SEQ2SEQ_PRESETS
from . import options
from .train import train_model


def train_seq2seq(
    context: typer.Context,
    data: options.Pairs = None,
    preset: Annotated[str, typer.Option(help=options.presets_help(SEQ2SEQ_PRESETS))] = "bytes",
    output: options.Output = Path("runs/seq2seq"),
    seed: options.Seed = 0,
    vocab_size: options.VocabSize = None,
    embedding_dim: options.EmbeddingDim = None,
    hidden_size: options.HiddenSize = None,
    num_layers: options.NumLayers = None,
    bidirectional: options.Bidirectional = None,
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
    """Train a GRU encoder and a GRU decoder with attention to answer sources with targets.

    By default it learns to write dates in words, some 15,000 that are made up, in ISO 8601; t5 does
    too with --data dates. Of a file with a source, a tab and a target in each line, it learns to
    answer. A tenth of the lines, from all over it, is held out and only measured on. Checkpoints
    and --resume are as with `genkernels train gpt`.

    Examples:

        genkernels train seq2seq
        genkernels train seq2seq --data pairs.tsv --preset words --output runs/pairs
        genkernels train seq2seq --resume --output runs/pairs
    """
    train_model("seq2seq", **locals())
