"""`genkernels train recurrent-gan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..training import RECURRENT_GAN_PRESETS
from . import options
from .train import train_model


def train_recurrent_gan(
    context: typer.Context,
    preset: Annotated[
        str, typer.Option(help=options.presets_help(RECURRENT_GAN_PRESETS))
    ] = "series",
    output: options.Output = Path("runs/recurrent-gan"),
    seed: options.Seed = 0,
    length: options.SeriesLength = None,
    latent_dim: options.LatentDim = None,
    hidden_size: options.HiddenSize = None,
    num_layers: options.NumLayers = None,
    steps: options.Steps = None,
    minutes: options.Minutes = None,
    loss: options.AdversarialLoss = None,
    penalty: options.Penalty = None,
    discriminator_steps: options.DiscriminatorSteps = None,
    optimizer: options.Optimizer = None,
    learning_rate: options.LearningRate = None,
    discriminator_learning_rate: options.DiscriminatorLearningRate = None,
    weight_decay: options.WeightDecay = None,
    schedule: options.Schedule = None,
    warmup: options.Warmup = None,
    min_learning_rate: options.MinLearningRate = None,
    max_grad_norm: options.MaxGradNorm = None,
    batch_size: options.ExampleBatchSize = None,
    resume: options.Resume = False,
    stop_after: options.StopAfter = None,
    sample: options.Sample = True,
    tensorboard: options.TensorBoard = None,
    dry_run: options.DryRun = False,
) -> None:
    """Train a generator of series of numbers against a discriminator, both of them GRUs.

    The series are drawn from processes whose distribution is known. What is measured is the
    Kolmogorov-Smirnov distance of the values and how far the autocorrelation is off. Every row of
    the table leaves a plot in the output folder, of the same noise each time. Checkpoints and
    --resume are as with `genkernels train gpt`.

    Examples:

        genkernels train recurrent-gan --minutes 5
        genkernels train recurrent-gan --length 48 --hidden-size 128 --output runs/long
        genkernels train recurrent-gan --resume --output runs/long
    """
    train_model("recurrent-gan", **locals())
