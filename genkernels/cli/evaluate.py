"""`genkernels evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..data import DEFAULT_CORPUS, InputError, errors_in
from ..training import Task, check_sheet, load_checkpoint, task_of, write_sheet
from ..training.checkpoint import Checkpoint
from . import options
from .report import evaluation_lines
from .train import data_of

_HUMAN = "By people, instead of figures"


def evaluate(
    context: typer.Context,
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    data: options.Measured = None,
    which: options.WhichWeights = "best",
    whole: Annotated[
        bool,
        typer.Option(
            "--whole/--held-out",
            help="Measure on the whole text, or on the tail that training on it would hold out.",
        ),
    ] = False,
    human: Annotated[
        Path | None,
        typer.Option(
            help="Page to write (.html), on which people choose between two of a pair without "
            "knowing which is which.",
            rich_help_panel=_HUMAN,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Folder of another checkpoint, to be compared with.",
            show_default="what is held out of the data",
            rich_help_panel=_HUMAN,
        ),
    ] = None,
    pairs: Annotated[
        int, typer.Option(min=1, max=1_000, help="How many to choose of.", rich_help_panel=_HUMAN)
    ] = 20,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=options.MAX_SEED,
            help="Of the examples, what the model makes, and the order on the page.",
            rich_help_panel=_HUMAN,
        ),
    ] = 0,
) -> None:
    """Measure how well a trained model predicts what it was not trained on.

    rnn, gpt, hmm and bayesian-network: bits per byte, cross-entropy, perplexity and token accuracy
    of a text; of sound the bits and the accuracy of its samples; of a table bits per row. bert: the
    cross-entropy and accuracy of masked tokens, or of labels; t5 and seq2seq: those of the tokens
    of answers, and how many answers are exact. gan and recurrent-gan: how far what they draw is
    from what was held out. On a held-out split also what a simpler model reaches that has learned
    from the rest.

    With --human, people are to judge: a page shows what the model makes beside what was held out,
    or beside what another model makes, of one text, source or class; of sound, a second. Whoever
    opens it in a browser votes and saves a file; `genkernels score` counts those, by the key beside
    the page, which is not for those who vote. Of all models but bert.

    Examples:

        genkernels evaluate runs/rnn --data notes.txt --whole
        genkernels evaluate runs/gpt --which last
        genkernels evaluate runs/gpt --human sheet.html --pairs 40
        genkernels evaluate runs/gpt --human sheet.html --against runs/rnn
    """
    if human is None:
        for name in options.given(context, {"against": against, "pairs": pairs, "seed": seed}):
            raise InputError(f"{options.spelled(name)}: is of a page; expected it with --human")
    else:
        with errors_in("--human"):
            check_sheet(human)
    loaded = load_checkpoint(checkpoint, which)
    is_own = data is None
    data = data_of(loaded.training) if data is None else data
    task_class = task_of(loaded).of(data)
    if not isinstance(loaded.model, task_class.model_class):
        raise _unlike(data, checkpoint)
    if is_own and not whole:
        digest = loaded.training.get("digest")  # older checkpoints have none
        if digest not in (None, task_class.digest_of(data, loaded)):
            raise InputError(
                f"{data or DEFAULT_CORPUS}: has changed since {checkpoint} learned from it, "
                "perhaps what would be held out; expected it as it was, --whole or --data"
            )
    if human is None:
        result, baseline = task_class.measure(loaded, data, whole)
        for line in evaluation_lines(result, baseline):
            print(line)
        return
    task = _judged(checkpoint, loaded)
    if task_class is not task:
        raise _unlike(data, checkpoint)
    rival = None
    if against is not None:
        rival = load_checkpoint(against, which)
        if (makes := _judged(against, rival).judged) != task.judged:
            raise InputError(f"--against: {against} makes {makes}; expected {task.judged}")
    examples = task.examples_of(loaded, data, whole, pairs, seed)
    other: Sequence[str | bytes] = [example.real for example in examples]
    names = str(checkpoint), f"{data or DEFAULT_CORPUS}{'' if whole else ', held out'}"
    if against is not None and rival is not None:
        with errors_in(against):
            other = _judged(against, rival).made(rival, examples, seed)
        names = str(checkpoint), str(against)
    made = task.made(loaded, examples, seed)
    headings = [example.given for example in examples]
    key = write_sheet(human, made, other, task.medium, seed, headings, names)
    print(f"sheet           {human}: {pairs} pairs of {task.judged}, {' and '.join(names)}")
    print(f"key             {key}, not for those who vote")
    print(f"their votes     genkernels score votes.json --key {key}")


def _unlike(data: Path | None, checkpoint: Path) -> InputError:
    return InputError(f"{data}: is not like what {checkpoint} learned from; expected such a file")


def _judged(checkpoint: Path, loaded: Checkpoint) -> type[Task]:
    """Return the task that a model was trained on, if people can judge what it makes."""
    task = task_of(loaded).of(data_of(loaded.training))
    if task.judged is None:
        raise InputError(
            f"{checkpoint}: a {loaded.model.name} makes nothing that people could judge; "
            "expected another model"
        )
    return task
