"""A training step of the adversarial models beside the same in plain PyTorch: what `make
bench-models` times of `gan` and `recurrent-gan`.

A step is one of AdversarialTraining: the discriminator's, the generator's, Adam and the moving
average. Both contestants start from the same weights on the same random numbers, and their steps
take turns in one process. Where a loss is not that of plain PyTorch in float64, none is timed.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.bars import Bar
from benchmarks.steps import CHECKED_STEPS, TOLERANCES, medians_of_turns
from benchmarks.workers import Failure
from genkernels.data import RowBatches
from genkernels.models import GAN, RecurrentGAN
from genkernels.models.adversarial import AdversarialModel
from genkernels.training import (
    GAN_PRESETS,
    RECURRENT_GAN_PRESETS,
    AdversarialConfig,
    AdversarialTraining,
    Preset,
    kernel_share,
)

CONTESTANTS = {"genkernels": True, "torch": False}
SECONDS = 2.0  # a round
EXAMPLES = 1000
PROFILED_STEPS = 5
# The first steps of wgan-gp are large, and roundings grow with them: a loss may err twice as much
# as plain PyTorch's, and that by no more than this.
LARGEST_ERROR = 1e-3


class Case(NamedTuple):
    """What is trained, and how many times as fast as plain PyTorch that has to be."""

    name: str
    model: type[AdversarialModel]
    sizes: Any
    config: AdversarialConfig
    ratio: float


def of_preset(
    model: type[AdversarialModel],
    presets: Mapping[str, Preset],
    name: str,
    ratio: float,
    **given: Any,
) -> Case:
    """A preset's case, but for the settings that are given."""
    sizes, config = presets[name]
    config = dataclasses.replace(config, **given)
    if model is GAN:
        sizes = dataclasses.replace(sizes, spectral_norm=config.loss != "wgan-gp")
    label = f"{model.name} {name}, {config.loss}, {config.discriminator_steps} to 1 steps"
    return Case(label, model, sizes, config, ratio)


CASES = {
    GAN.name: [
        of_preset(GAN, GAN_PRESETS, preset, 1.0, loss=loss, discriminator_steps=steps)
        for preset in GAN_PRESETS
        for loss, steps in (("hinge", 1), ("wgan-gp", 2))
    ],
    RecurrentGAN.name: [
        of_preset(
            RecurrentGAN,
            RECURRENT_GAN_PRESETS,
            "series",
            2.0,
            loss="non-saturating",
            discriminator_steps=1,
        ),
        of_preset(RecurrentGAN, RECURRENT_GAN_PRESETS, "series", 1.5, loss="wgan-gp"),
    ],
}


class Measured(NamedTuple):
    """Median seconds of a step, and the share of genkernels' own that its kernels take."""

    seconds: dict[str, float]
    kernels: float
    bar: Bar


def initial_weights(case: Case) -> dict[str, Tensor]:
    """As training begins, but for the gates of attention: they are zero then, and what attention
    computes would not be seen in the losses."""
    torch.manual_seed(0)
    weights = case.model(case.sizes, fused=False).state_dict()
    for name, weight in weights.items():
        if name.endswith(".gate"):
            weight.fill_(0.5)
    return weights


def start(
    case: Case, fused: bool, dtype: torch.dtype = torch.float32, steps: int = sys.maxsize
) -> AdversarialTraining:
    """Training from the first step on; the random numbers are torch's own of seed 0."""
    model = case.model(case.sizes, fused=fused)
    model.load_state_dict(initial_weights(case))
    model.to(dtype)
    generator = torch.Generator().manual_seed(1)
    shape = model.generate(1).shape[1:]
    examples = torch.rand(EXAMPLES, *shape, generator=generator).mul(2).sub(1).to(dtype)
    classes = torch.randint(case.sizes.num_classes, (EXAMPLES,), generator=generator)
    batch_size = case.config.batch_size
    assert batch_size != "full"
    batches = RowBatches(examples, classes, batch_size=batch_size)
    config = dataclasses.replace(case.config, steps=steps, minutes=None)
    torch.manual_seed(0)
    return AdversarialTraining(model, batches, config)


class DrawnInFloat32(TorchFunctionMode):
    """Random numbers of every dtype are those that are drawn for float32."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function not in (torch.rand, torch.randn):
            return function(*args, **kwargs)
        dtype = kwargs.get("dtype", torch.float32)
        return function(*args, **{**kwargs, "dtype": torch.float32}).to(dtype)


def first_losses(steps: Iterator[Any]) -> list[float]:
    return [next(steps).loss for _ in range(CHECKED_STEPS)]


def checked_steps(case: Case) -> dict[str, Iterator[Any]]:
    """The steps of each contestant after the first, whose losses are right."""
    with DrawnInFloat32():
        exact = first_losses(iter(start(case, fused=False, dtype=torch.float64)))
    steps, losses = {}, {}
    for name, fused in CONTESTANTS.items():
        steps[name] = iter(start(case, fused))
        losses[name] = first_losses(steps[name])
    for name, found in losses.items():
        rows = zip(found, losses["torch"], exact, strict=True)
        for number, (loss, plain, right) in enumerate(rows, 1):
            allowed = TOLERANCES["float32"] * abs(right) + 2 * abs(plain - right)
            if not abs(loss - right) <= min(allowed, LARGEST_ERROR * abs(right)):  # NaN, too
                got = f"the loss of step {number} is {loss:.6f}, in float64 {right:.6f}"
                raise Failure(f"{case.name}, {name}: {got}")
    return steps


def measure(case: Case, rounds: int) -> Measured:
    steps = checked_steps(case)
    functions = {name: functools.partial(next, each) for name, each in steps.items()}
    seconds = medians_of_turns(functions, rounds * SECONDS)
    kernels = kernel_share(start(case, fused=True, steps=1 + PROFILED_STEPS))
    ratio = seconds["torch"] / seconds["genkernels"]
    return Measured(seconds, kernels, Bar(f"{case.ratio:g}x torch", case.ratio, ratio))


def measure_all(cases: Sequence[Case], rounds: int) -> dict[str, Measured]:
    measured = {}
    for number, case in enumerate(cases, 1):
        measured[case.name] = row = measure(case, rounds)
        print(
            f"[{number} of {len(cases)}] {case.name}: {row.bar.reached:.2f} times as fast",
            file=sys.stderr,
            flush=True,
        )
    return measured


def table(measured: Mapping[str, Measured]) -> Iterator[str]:
    names = " | ".join(f"{name}, ms a step" for name in CONTESTANTS)
    yield f"| program | {names} | times as fast | in kernels |"
    yield "|---|" + "---|" * (len(CONTESTANTS) + 2)
    for name, row in measured.items():
        times = " | ".join(f"{1e3 * row.seconds[each]:.1f}" for each in CONTESTANTS)
        yield f"| {name} | {times} | {row.bar.reached:.2f} | {row.kernels:.0%} |"


def bar_lines(measured: Mapping[str, Measured]) -> Iterator[str]:
    for name, row in measured.items():
        verdict = "met" if row.bar.is_met else "MISSED"
        yield (
            f"- {name}: {row.bar.reached:.2f} times as fast as torch, "
            f"asked {row.bar.asked:.2f}: {verdict}"
        )


def report(measured: Mapping[str, Measured]) -> dict[str, Any]:
    return {
        name: {**row._asdict(), "bar": dataclasses.asdict(row.bar)}
        for name, row in measured.items()
    }
