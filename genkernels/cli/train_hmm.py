"""`genkernels train hmm`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..training import HMM_PRESETS
from . import options
from .train import train_model


def train_hmm(
    context: typer.Context,
    data: options.Data = None,
    preset: Annotated[str, typer.Option(help=options.presets_help(HMM_PRESETS))] = "bytes",
    output: options.Output = Path("runs/hmm"),
    seed: options.Seed = 0,
    num_states: options.NumStates = None,
    steps: options.Iterations = None,
    minutes: options.Minutes = None,
    sequence_length: options.PieceLength = None,
    pseudo_count: options.PseudoCount = None,
    resume: options.Resume = False,
    stop_after: options.StopAfter = None,
    sample: options.Sample = True,
    tensorboard: options.TensorBoard = None,
    dry_run: options.DryRun = False,
) -> None:
    """Train a hidden Markov model on the bytes of a text file, by EM.

    Each byte is emitted by a state, and each state depends on the one before it. A step is one of
    Baum-Welch over all of the text but the last tenth, which is held out and only measured on.
    Checkpoints and --resume are as with `genkernels train gpt`.

    Examples:

        genkernels train hmm --data notes.txt --num-states 32
        genkernels train hmm --steps 50 --output runs/states
        genkernels train hmm --resume --output runs/states --steps 100
    """
    train_model("hmm", **locals())
