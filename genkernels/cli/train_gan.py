"""`genkernels train gan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..training import GAN_PRESETS
from . import options
from .train import train_model


def train_gan(
    context: typer.Context,
    data: options.ImageData = None,
    preset: Annotated[str, typer.Option(help=options.presets_help(GAN_PRESETS))] = "digits",
    output: options.Output = Path("runs/gan"),
    seed: options.Seed = 0,
    image_size: options.ImageSize = None,
    channels: options.Channels = None,
    latent_dim: options.LatentDim = None,
    width: options.Width = None,
    num_heads: options.NumHeads = None,
    spectral_norm: options.SpectralNorm = None,
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
    """Train a generator of images against a discriminator.

    The images are of a folder, which may have a folder for each class, or a data set that needs no
    download: digits or mnist. A fifth is held out. What is measured is the Fréchet distance of the
    drawn images to those, in the features of a classifier that is trained first (of classes, or
    where there are none of how images were turned), beside that of the training images themselves.
    Every row of the table leaves a picture in the output folder, of the same noise each time.
    Checkpoints and --resume are as with `genkernels train gpt`.

    Examples:

        genkernels train gan --minutes 5
        genkernels train gan --preset mnist --output runs/mnist
        genkernels train gan --data photos --image-size 32 --channels 3 --output runs/photos
    """
    train_model("gan", **locals())
