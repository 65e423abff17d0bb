"""`genkernels train rnn`."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ..data import (
    DEFAULT_CORPUS,
    ByteTokenizer,
    InputError,
    clean_text,
    errors_in,
    load_text,
    sequence_batches,
    split_text,
    train_tokenizer,
)
from ..models import MarkovModel, RNNLanguageModel
from ..models.config import MAX_LAYERS, MAX_SIZE
from ..training import (
    LOSS_CURVE,
    RNN_PRESETS,
    Comparison,
    OptimizerName,
    ScheduleName,
    TrainingConfig,
    compare_step_time,
    evaluate,
    plot_loss,
    replace_folder,
    save_checkpoint,
)
from .fit import fit
from .generate import DEFAULT_CHECKPOINT
from .report import evaluation_lines, kernel_calls

_MODEL = "Model (defaults: the preset's)"
_TRAINING = "Training (defaults: the preset's)"
_PROMPT_CHARACTERS = 32
_SAMPLE_TOKENS = 300


def _batch_size(value: str) -> int | str:
    if value == "full":
        return value
    if value.isdecimal() and int(value) > 0:
        return int(value)
    raise typer.BadParameter(f"{value!r} is neither a positive integer nor full.")


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _values(preset: str) -> str:
    """Return the name of a preset and its values, as options are written."""
    model, training = RNN_PRESETS[preset]
    values = dataclasses.asdict(model) | dataclasses.asdict(training)
    shown = (f"{k.replace('_', '-')} {v}" for k, v in values.items() if v is not None)
    return f"{preset}: {', '.join(shown)}."


def train_rnn(
    data: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text file.", show_default=DEFAULT_CORPUS),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(help=" ".join(["Named settings.", *map(_values, RNN_PRESETS)])),
    ] = "bytes",
    output: Annotated[
        Path, typer.Option(help="Folder for the checkpoint; a checkpoint there is replaced.")
    ] = DEFAULT_CHECKPOINT,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**63 - 1, help="Of the first weights, dropout and the sample."),
    ] = 0,
    compare: Annotated[
        bool, typer.Option(help="Time a step against the same model on torch.nn.GRU.")
    ] = True,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            min=256,
            max=MAX_SIZE,
            help="256: bytes as they are; above: BPE learned from the training split.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    embedding_dim: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_SIZE, help="Width of a token.", rich_help_panel=_MODEL),
    ] = None,
    hidden_size: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_SIZE, help="GRU units.", rich_help_panel=_MODEL),
    ] = None,
    num_layers: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_LAYERS, help="GRU layers.", rich_help_panel=_MODEL),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.99,
            help="Share of the features zeroed in training.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="End after so many.", rich_help_panel=_TRAINING)
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.01, callback=_finite, help="End after so long.", rich_help_panel=_TRAINING
        ),
    ] = None,
    optimizer: Annotated[
        OptimizerName | None,
        typer.Option(help="That of torch.optim.", rich_help_panel=_TRAINING),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=_finite,
            help="At its highest, after the warm-up.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=_finite,
            help="Pull of every weight towards zero, as the optimizer defines it.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    schedule: Annotated[
        ScheduleName | None,
        typer.Option(help="Of the learning rate, after a warm-up.", rich_help_panel=_TRAINING),
    ] = None,
    max_grad_norm: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=_finite,
            help="Clip gradients to it; 0 does not.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    batch_size: Annotated[
        Any,
        typer.Option(
            parser=_batch_size,
            metavar="INTEGER|full",
            help="Streams read side by side; full: the whole text in every step.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that a gradient reaches.", rich_help_panel=_TRAINING),
    ] = None,
) -> None:
    """Train a GRU language model on a text file.

    The last tenth of the text is held out and only measured on. Writes the weights, the settings
    and the loss curve into the output folder when done; Ctrl-C ends early and keeps what is
    learned.

    Examples:

        genkernels train rnn --data notes.txt --minutes 2
        genkernels train rnn --preset seed --output runs/seed
        genkernels train rnn --optimizer sgd --batch-size full --learning-rate 1
    """
    if preset not in RNN_PRESETS:
        raise InputError(f"--preset: unknown {preset!r}; expected one of {', '.join(RNN_PRESETS)}")
    sizes = _override(
        RNN_PRESETS[preset].model,
        vocab_size=vocab_size,
        embedding_dim=embedding_dim,
        hidden_size=hidden_size,
        num_layers=num_layers,
        dropout=dropout,
    )
    config = _override(
        RNN_PRESETS[preset].training,
        optimizer=optimizer,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        schedule=schedule,
        max_grad_norm=max_grad_norm,
        batch_size=batch_size,
        sequence_length=sequence_length,
    )
    if steps is not None or minutes is not None:  # either replaces the preset's limit
        config = dataclasses.replace(config, steps=steps, minutes=minutes)

    source = data or DEFAULT_CORPUS
    whole = load_text(data)
    with errors_in(source):
        text = split_text(whole)
        tokenizer = train_tokenizer(text.training, sizes.vocab_size)
        sizes = dataclasses.replace(sizes, vocab_size=tokenizer.vocab_size)
        held_out = tokenizer.encode(text.held_out)
        if len(held_out) < 2:
            raise InputError(
                f"text too short: {len(held_out)} token to hold out; expected at least 2"
            )
        batches = sequence_batches(
            tokenizer.encode(text.training), config.batch_size, config.sequence_length
        )
    with replace_folder(output) as folder:
        torch.manual_seed(seed)
        model = RNNLanguageModel(sizes)
        training_bytes, held_out_bytes = map(ByteTokenizer().encode, text)
        input = batches[0][0]
        print(
            f"data            {source}: {len(training_bytes):,} bytes to train on, "
            f"{len(held_out_bytes):,} held out\n"
            f"model           {sum(p.numel() for p in model.parameters()):,} parameters: "
            f"{tokenizer.vocab_size:,} tokens ({tokenizer.name}), embedding {sizes.embedding_dim}, "
            f"hidden {sizes.hidden_size} x {sizes.num_layers}\n"
            f"training        {config.optimizer}, batches of {input.shape[0]} x {input.shape[1]} "
            f"tokens, seed {seed}, threads {torch.get_num_threads()}"
        )
        comparison = _compare(model, batches[0], config) if compare else None
        history = fit(model, batches, held_out, tokenizer.byte_lengths, config)
        result = evaluate(model, held_out, tokenizer.byte_lengths)
        markov = MarkovModel(order=3).fit(training_bytes).bits_per_byte(held_out_bytes)
        training: dict[str, Any] = {
            "data": str(source),
            "seed": seed,
            "settings": dataclasses.asdict(config),
            "steps": len(history.training),
            "tokens_per_second": history.tokens_per_second,
            "calls": {" ".join(key): count for key, count in history.calls.items()},
            "speed_up": comparison and comparison.speed_up,
            "held_out": result._asdict(),
            "markov_bits_per_byte": markov,
        }
        save_checkpoint(folder, model, tokenizer, training)
        plot_loss(folder / LOSS_CURVE, history.training, history.held_out, markov)

    try:
        print("\n".join(["", *evaluation_lines(result, markov)]))
        print(f"tokens/s        {history.tokens_per_second:,.0f}")
        print(f"kernels         {kernel_calls(history.calls)}")
        if comparison:
            print(f"speed-up        {comparison.speed_up:.2f}x over torch.nn.GRU")
        print(f"loss curve      {output / LOSS_CURVE}")
        print(f"checkpoint      {output}")
        sample = model.generate(
            tokenizer.encode(text.held_out[:_PROMPT_CHARACTERS])[None],
            _SAMPLE_TOKENS,
            temperature=0.8,
            generator=torch.Generator().manual_seed(seed),
        )
        print(f"sample          (the first {_PROMPT_CHARACTERS} characters are given)")
        print(textwrap.indent(clean_text(tokenizer.decode(sample[0])), "  | ", lambda line: True))
    except KeyboardInterrupt:  # the checkpoint stands, so that the word on it must not be lost
        history.interrupted = True
    if history.interrupted:
        raise typer.Abort(f"interrupted after step {len(history.training)}; {output} has it")


def _override(config: Any, **given: Any) -> Any:
    """Return `config` with those options that were given on the command line."""
    return dataclasses.replace(config, **{k: v for k, v in given.items() if v is not None})


def _compare(
    model: RNNLanguageModel, batch: tuple[Tensor, Tensor], config: TrainingConfig
) -> Comparison:
    """Time a training step of `model` and of its twin on torch.nn.GRU, and print both."""
    twin = RNNLanguageModel(model.config, gru=torch.nn.GRU)
    twin.load_state_dict(model.state_dict())
    comparison = compare_step_time(model, twin, *batch, config)
    print(
        f"step time       {1e3 * comparison.model:.1f} ms, on torch.nn.GRU "
        f"{1e3 * comparison.baseline:.1f} ms (medians, steps in turn)"
    )
    return comparison
