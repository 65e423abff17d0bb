"""`genkernels train rnn`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..data import MELODY, InputError, is_audio
from ..training import RNN_PRESETS
from . import options
from .train import train_model


def train_rnn(
    context: typer.Context,
    data: options.SoundData = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help=options.presets_help(RNN_PRESETS), show_default="bytes, or audio of sound"
        ),
    ] = None,
    output: options.Output = Path("runs/rnn"),
    seed: options.Seed = 0,
    vocab_size: options.VocabSize = None,
    embedding_dim: options.EmbeddingDim = None,
    hidden_size: options.HiddenSize = None,
    num_layers: options.NumLayers = None,
    cell: options.Cell = None,
    tie_weights: options.TieWeights = None,
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
    batch_size: options.StreamBatchSize = None,
    sequence_length: options.SequenceLength = None,
    resume: options.Resume = False,
    stop_after: options.StopAfter = None,
    compare: options.Compare = True,
    sample: options.Sample = True,
    tensorboard: options.TensorBoard = None,
    dry_run: options.DryRun = False,
) -> None:
    """Train a recurrent language model on a text file, or on sound.

    The tokens of sound are its samples, 8,000 a second, as mu-law levels. The last tenth is held
    out and only measured on. At every row of the table the output folder gets the weights with the
    lowest held-out loss so far (best) and those of now (last), and of sound a sample to listen to;
    in the end the loss curve too. Ctrl-C ends early and keeps what is learned; with --resume the
    same command goes on, in steps to the last bit as if it had never stopped.

    Examples:

        genkernels train rnn --data notes.txt --minutes 2
        genkernels train rnn --preset seed --output runs/seed
        genkernels train rnn --resume --output runs/seed
        genkernels train rnn --cell tanh --max-grad-norm 0.5
        genkernels train rnn --optimizer sgd --batch-size full --learning-rate 1
        genkernels train rnn --data songs --output runs/audio
    """
    if data is None and preset == "audio":
        data = Path(MELODY)
    if vocab_size is not None and data and is_audio(data):
        raise InputError(
            "--vocab-size: means nothing to sound, which has 256 levels; expected it with a text"
        )
    preset = preset or ("audio" if data and is_audio(data) else "bytes")
    train_model("rnn", **locals())
