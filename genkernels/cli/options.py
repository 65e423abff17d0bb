"""The options that several commands have."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data import DATES, DEFAULT_CORPUS, MELODY, InputError, check_kind, clean_text, errors_in
from ..models.config import MAX_LAYERS, MAX_SIZE
from ..models.rnn import CellName
from ..training import AdversarialLossName, OptimizerName, Preset, ScheduleName, Which

DEFAULT_CHECKPOINT = Path("runs/rnn")
MAX_SEED = 2**63 - 1
_MODEL = "Model (defaults: the preset's)"
_TRAINING = "Training (defaults: the preset's)"
_RUN = "Run"


def _batch_size(value: str) -> int | str:
    if value == "full":
        return value
    if value.isdecimal() and int(value) > 0:
        return int(value)
    raise typer.BadParameter(f"{value!r} is neither a positive integer nor full.")


def finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _has_tensorboard(folder: Path | None) -> Path | None:
    if folder is not None and importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard: needs tensorboard: pip install 'genkernels[tensorboard]'")
    return folder


def cleaned(prompt: str | None) -> str | None:
    """Return a prompt that can be read, where one is given."""
    if prompt is None:
        return None
    try:
        text = clean_text(prompt)
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError("--prompt: not UTF-8; expected text") from error
    if not text:
        raise InputError("--prompt: empty; expected at least one character")
    return text


def check_picture(output: Path) -> None:
    """Let a PNG be replaced, but no file of another kind."""
    with errors_in("--output"):
        check_kind(output, rb"\x89PNG", "a PNG")


def given(context: typer.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the values of options that were given on the command line."""
    return {
        name: value
        for name, value in values.items()
        if (source := context.get_parameter_source(name)) and source.name != "DEFAULT"
    }


def spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def presets_help(presets: Mapping[str, Preset]) -> str:
    """Return the names of the presets and their values, as options are written."""
    texts = ["Named settings."]
    for name, preset in presets.items():
        values = dataclasses.asdict(preset.model) | dataclasses.asdict(preset.training)
        shown = (f"{k.replace('_', '-')} {v}" for k, v in values.items() if v is not None)
        texts.append(f"{name}: {', '.join(shown)}.")
    return " ".join(texts)


Checkpoint = Annotated[Path, typer.Argument(help="Folder that `genkernels train` wrote.")]
WhichWeights = Annotated[
    Which,
    typer.Option("--which", help="Weights of the lowest held-out loss, or of the last step."),
]
Prompt = Annotated[
    str | None, typer.Option(help="Text that is read.", show_default="a new line for rnn and gpt")
]
Data = Annotated[Path | None, typer.Option(help="UTF-8 text file.", show_default=DEFAULT_CORPUS)]
SoundData = Annotated[
    Path | None,
    typer.Option(
        help=f"UTF-8 text file; or sound: a WAV or FLAC file, a folder of them, or {MELODY}.",
        show_default=f"{DEFAULT_CORPUS}, or {MELODY} with --preset audio",
    ),
]
TableData = Annotated[
    Path | None,
    typer.Option(
        help="UTF-8 text file; or, ending in .csv, a table whose first line names the columns.",
        show_default=DEFAULT_CORPUS,
    ),
]
ImageData = Annotated[
    Path | None,
    typer.Option(
        help="Folder of PNG or JPEG files, or with a folder of them for each class; or digits, or "
        "mnist.",
        show_default="the data set of the preset's name",
    ),
]
LabelData = Annotated[
    Path | None,
    typer.Option(
        help="UTF-8 text file; or, ending in .tsv, a label, a tab and a text in each line.",
        show_default=DEFAULT_CORPUS,
    ),
]
PairData = Annotated[
    Path | None,
    typer.Option(
        help="UTF-8 text file; or, ending in .tsv, a source, a tab and a target in each line; "
        f"or {DATES}, for those that seq2seq learns.",
        show_default=DEFAULT_CORPUS,
    ),
]
Pairs = Annotated[
    Path | None,
    typer.Option(
        help="UTF-8 file with a source, a tab and a target in each line.",
        show_default=f"{DATES}, in words and in ISO 8601",
    ),
]
Measured = Annotated[
    Path | None,
    typer.Option(help="File or folder like that of training.", show_default="that of training"),
]
Output = Annotated[
    Path, typer.Option(help="Folder for the checkpoints; those of a run there are replaced.")
]
Seed = Annotated[
    int,
    typer.Option(
        min=0, max=MAX_SEED, help="Of the first weights, the batches, dropout and the samples."
    ),
]

VocabSize = Annotated[
    int | None,
    typer.Option(
        min=256,
        max=MAX_SIZE,
        help="256: bytes as they are; above: BPE learned from the training split.",
        rich_help_panel=_MODEL,
    ),
]
EmbeddingDim = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_SIZE, help="Width of a token.", rich_help_panel=_MODEL),
]
ContextLength = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_SIZE, help="Tokens that are seen at once.", rich_help_panel=_MODEL),
]
NumHeads = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_SIZE, help="Heads of the attention.", rich_help_panel=_MODEL),
]
Bias = Annotated[
    bool | None,
    typer.Option(help="Whether Linears and LayerNorms have one.", rich_help_panel=_MODEL),
]
FeedforwardDim = Annotated[
    int | None,
    typer.Option(
        min=1, max=MAX_SIZE, help="Width inside feed-forward layers.", rich_help_panel=_MODEL
    ),
]
HiddenSize = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_SIZE, help="Recurrent units.", rich_help_panel=_MODEL),
]
Cell = Annotated[
    CellName | None,
    typer.Option(help="gru, or tanh: Elman's, a third as large.", rich_help_panel=_MODEL),
]
TieWeights = Annotated[
    bool | None,
    typer.Option(
        help="Whether the last layer's weight is the embedding's, of --hidden-size then, too.",
        rich_help_panel=_MODEL,
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_SIZE, help="Height and width.", rich_help_panel=_MODEL),
]
Channels = Annotated[
    int | None,
    typer.Option(min=1, max=3, help="1: grey; 3: RGB.", rich_help_panel=_MODEL),
]
LatentDim = Annotated[
    int | None,
    typer.Option(
        min=1, max=MAX_SIZE, help="Width of the noise and of a class.", rich_help_panel=_MODEL
    ),
]
Width = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_SIZE,
        help="Channels inside at the full image size; each halving doubles them.",
        rich_help_panel=_MODEL,
    ),
]
SpectralNorm = Annotated[
    bool | None,
    typer.Option(
        help="Whether the discriminator's weights are divided by their largest singular value.",
        rich_help_panel=_MODEL,
    ),
]
SeriesLength = Annotated[
    int | None,
    typer.Option(min=2, max=MAX_SIZE, help="Numbers in a series.", rich_help_panel=_MODEL),
]
NumStates = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_SIZE, help="Hidden states.", rich_help_panel=_MODEL),
]
Order = Annotated[
    int | None,
    typer.Option(min=0, max=6, help="Bytes that the next one depends on.", rich_help_panel=_MODEL),
]
TableStructure = Annotated[
    str | None,
    typer.Option(
        help="Which columns depend on which, as in a->b,b->c; empty: none on another.",
        show_default="the Chow-Liu tree",
        rich_help_panel=_MODEL,
    ),
]
Bidirectional = Annotated[
    bool | None,
    typer.Option(
        help="Whether the encoder reads a source from its end, too.", rich_help_panel=_MODEL
    ),
]
NumLayers = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_LAYERS, help="Layers, one on another.", rich_help_panel=_MODEL),
]
Dropout = Annotated[
    float | None,
    typer.Option(
        min=0, max=0.99, help="Share of the features zeroed in training.", rich_help_panel=_MODEL
    ),
]

Steps = Annotated[
    int | None,
    typer.Option(
        min=1, help="Length of the run, over which the rate falls.", rich_help_panel=_TRAINING
    ),
]
Iterations = Annotated[
    int | None,
    typer.Option(min=1, help="Length of the run, in steps of EM.", rich_help_panel=_TRAINING),
]
PieceLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_SIZE,
        help="Tokens of the pieces that the text is cut into, which are read side by side.",
        rich_help_panel=_TRAINING,
    ),
]
PseudoCount = Annotated[
    float | None,
    typer.Option(
        min=1e-9,
        max=1e9,
        callback=finite,
        help="Added to each expected count, so that nothing is impossible.",
        rich_help_panel=_TRAINING,
    ),
]
Minutes = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        callback=finite,
        help="Length of the run, by the clock.",
        rich_help_panel=_TRAINING,
    ),
]
AdversarialLoss = Annotated[
    AdversarialLossName | None,
    typer.Option(help="What the two are at odds over.", rich_help_panel=_TRAINING),
]
Penalty = Annotated[
    float | None,
    typer.Option(
        min=0,
        callback=finite,
        help="Factor on the gradient penalty of wgan-gp.",
        rich_help_panel=_TRAINING,
    ),
]
DiscriminatorSteps = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_SIZE,
        help="Of the discriminator, before each step of the generator.",
        rich_help_panel=_TRAINING,
    ),
]
DiscriminatorLearningRate = Annotated[
    float | None,
    typer.Option(
        min=0,
        callback=finite,
        help="That of the discriminator, where it is another.",
        rich_help_panel=_TRAINING,
    ),
]
ExampleBatchSize = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_SIZE, help="Examples in a step.", rich_help_panel=_TRAINING),
]
Optimizer = Annotated[
    OptimizerName | None, typer.Option(help="That of torch.optim.", rich_help_panel=_TRAINING)
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        min=0,
        callback=finite,
        help="At its highest, after the warm-up.",
        rich_help_panel=_TRAINING,
    ),
]
WeightDecay = Annotated[
    float | None,
    typer.Option(
        min=0,
        callback=finite,
        help="Pull of every weight towards zero, as the optimizer defines it.",
        rich_help_panel=_TRAINING,
    ),
]
Schedule = Annotated[
    ScheduleName | None,
    typer.Option(help="Of the learning rate, after the warm-up.", rich_help_panel=_TRAINING),
]
Warmup = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Share of the run in which the learning rate rises from zero.",
        rich_help_panel=_TRAINING,
    ),
]
MinLearningRate = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Where the cosine ends, as a share of the learning rate.",
        rich_help_panel=_TRAINING,
    ),
]
MaxGradNorm = Annotated[
    float | None,
    typer.Option(
        min=0,
        callback=finite,
        help="Clip gradients to it; 0 does not.",
        rich_help_panel=_TRAINING,
    ),
]
StreamBatchSize = Annotated[
    Any,
    typer.Option(
        parser=_batch_size,
        metavar="INTEGER|full",
        help="Streams read side by side; full: the whole text in every step.",
        rich_help_panel=_TRAINING,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_SIZE, help="Sequences in a step.", rich_help_panel=_TRAINING),
]
SequenceLength = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens that a gradient reaches.", rich_help_panel=_TRAINING),
]
SourceLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens of a crop of the text, or the most of a source or target.",
        rich_help_panel=_TRAINING,
    ),
]

Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the run in the output folder, with its settings; --steps or --minutes "
        "makes it longer.",
        rich_help_panel=_RUN,
    ),
]
StopAfter = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Stop at this step, short of the run's length, for --resume to go on.",
        rich_help_panel=_RUN,
    ),
]
Compare = Annotated[
    bool,
    typer.Option(help="Time a step against the same model in plain PyTorch.", rich_help_panel=_RUN),
]
Sample = Annotated[
    bool,
    typer.Option(help="Show a sample at every row of the table.", rich_help_panel=_RUN),
]
TensorBoard = Annotated[
    Path | None,
    typer.Option(
        "--tensorboard",
        callback=_has_tensorboard,
        help="Folder for the curves, to be seen with TensorBoard.",
        rich_help_panel=_RUN,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Go all the way in seconds, with a tiny model but for the sizes that are given and "
        "a part of the data, and leave nothing behind.",
        rich_help_panel=_RUN,
    ),
]
