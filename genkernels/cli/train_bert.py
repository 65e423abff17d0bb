"""`genkernels train bert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..training import BERT_PRESETS
from . import options
from .train import train_model


def train_bert(
    context: typer.Context,
    data: options.LabelData = None,
    preset: Annotated[str, typer.Option(help=options.presets_help(BERT_PRESETS))] = "words",
    output: options.Output = Path("runs/bert"),
    seed: options.Seed = 0,
    vocab_size: options.VocabSize = None,
    context_length: options.ContextLength = None,
    num_layers: options.NumLayers = None,
    num_heads: options.NumHeads = None,
    embedding_dim: options.EmbeddingDim = None,
    dropout: options.Dropout = None,
    bias: options.Bias = None,
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
    resume: options.Resume = False,
    stop_after: options.StopAfter = None,
    compare: options.Compare = True,
    sample: options.Sample = True,
    tensorboard: options.TensorBoard = None,
    dry_run: options.DryRun = False,
) -> None:
    """Train a BERT to fill in the masked tokens of a text, or to classify sentences.

    From a file that ends in .tsv, with a label, a tab and a text in each line, it learns the labels
    of texts, from any other one masked tokens. A tenth is held out and only measured on, of a .tsv
    file lines from all over it. Checkpoints and --resume are as with `genkernels train gpt`.

    Examples:

        genkernels train bert --data notes.txt --minutes 2
        genkernels train bert --data labels.tsv --output runs/labels
        genkernels train bert --resume --output runs/labels
    """
    train_model("bert", **locals())
