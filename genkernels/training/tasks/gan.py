"""Generative adversarial networks: images, or series of numbers."""

from __future__ import annotations

import abc
import csv
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...data import (
    IMAGE_SETS,
    PROCESSES,
    ImageSet,
    InputError,
    RowBatches,
    errors_in,
    load_image_set,
    load_images,
    normalize_images,
    save_grid,
    split_images,
    synthetic_series,
)
from ...models import GAN, GANConfig, RecurrentGAN, RecurrentGANConfig
from ..adversarial import AdversarialConfig, AdversarialTraining
from ..checkpoint import Checkpoint, replace_file
from ..evaluation_gan import (
    ImageClassifier,
    ImageEvaluation,
    SeriesEvaluation,
    evaluate_images,
    evaluate_series,
    frechet_distance,
    image_classifier,
)
from ..plot import plot_series
from ..presets import GAN_PRESETS, RECURRENT_GAN_PRESETS
from .task import (
    Baseline,
    Example,
    Request,
    SampleFile,
    Task,
    check_output,
    digest_of_tensors,
    drawn,
    labels_of,
)

_OF_A_CLASS = 8  # in a sample
_SAMPLES = 64
_HELD_OUT = 0.2  # a distance of few images says little
_DRY_EXAMPLES = 300
_DRY_STEPS = 10  # of the classifier
_SERIES = 9_000
_HELD_OUT_SERIES = 3_000
_SYNTHETIC = "synthetic series"


class AdversarialTask(Task):
    """Examples like those of the data, of a class where there are classes."""

    config_class = AdversarialConfig
    options = frozenset({"num_samples", "seed", "label", "output"})
    medium = "image"
    file: ClassVar[str]  # that is written if no other is named
    suffixes: ClassVar[tuple[str, ...]]  # that it may have

    examples: Tensor
    classes: Tensor | None  # of the examples, where there are classes
    _seed: int

    def describe_training(self, config: AdversarialConfig) -> str:
        return (
            f"{config.optimizer}, {config.loss} loss, batches of {config.batch_size} {self.items}, "
            f"{config.discriminator_steps} of the discriminator to one of the generator"
        )

    def training(self, model: Any, config: AdversarialConfig) -> AdversarialTraining:
        assert config.batch_size != "full"
        rows = [self.examples] if self.classes is None else [self.examples, self.classes]
        batches = RowBatches(*rows, batch_size=config.batch_size, seed=self._seed)
        return AdversarialTraining(model, batches, config)

    def sample(self, model: Any, max_new_tokens: int, seed: int) -> SampleFile:
        """Of the same noise each time, so that one sees what training changes."""
        labels = self.record["labels"]
        count = _OF_A_CLASS * len(labels) or _SAMPLES
        made, classes = _drawn(model, count, None, torch.Generator())
        return SampleFile(".png", lambda path: self.write(path, made, classes, labels))

    @classmethod
    def generate(cls, checkpoint: Checkpoint, request: Request) -> Iterator[str]:
        model, _, training = checkpoint
        labels, label = labels_of(model, training), request.label
        if label is not None and not labels:
            raise InputError(f"--label: {label!r}, but there are no classes; expected none")
        if label is not None and label not in labels:
            raise InputError(f"--label: {label!r}; expected one of {', '.join(labels)}")
        output = request.output or Path(cls.file)
        check_output(output, *cls.suffixes)
        wanted = None if label is None else labels.index(label)
        made, classes = _drawn(model, request.num_samples or _SAMPLES, wanted, request.generator)
        with replace_file(output) as path:
            cls.write(path, made, classes, labels, output.suffix)
        yield f"{cls.items:<15} {output}: {len(made):,}\n"

    @classmethod
    def examples_of(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool, count: int, seed: int
    ) -> list[Example]:
        labels = labels_of(checkpoint.model, checkpoint.training)
        measured, classes = cls.measured(checkpoint, data, whole)
        chosen = drawn(count, len(measured), seed)
        names = [""] * count if classes is None else [labels[c] for c in classes[chosen].tolist()]
        pictures = cls._pictures(measured[chosen], names)
        return list(map(Example, names, pictures))

    @classmethod
    def made(cls, checkpoint: Checkpoint, examples: Sequence[Example], seed: int) -> list[bytes]:
        model, _, training = checkpoint
        labels, names = labels_of(model, training), [given for given, _ in examples]
        for name in names:
            if name not in (labels or [""]):
                known = f"of {', '.join(labels)}" if labels else "without classes"
                raise InputError(f"a model {known} draws no {name!r}; expected one")
        classes = torch.tensor([labels.index(name) for name in names]) if labels else None
        generator = torch.Generator().manual_seed(seed)
        return cls._pictures(model.generate(len(names), classes, generator), names)

    @classmethod
    def _pictures(cls, made: Tensor, labels: Sequence[str]) -> list[bytes]:
        """Return a PNG of each."""
        pictures = []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "picture.png"
            for one, label in zip(made.split(1), labels, strict=True):
                cls.write(path, one, torch.tensor([0]), [label])
                pictures.append(path.read_bytes())
        return pictures

    @classmethod
    @abc.abstractmethod
    def measured(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return what a model is measured on, [N, ..], and the classes, int64 [N], if there are."""

    @classmethod
    @abc.abstractmethod
    def write(
        cls,
        path: Path,
        made: Tensor,
        classes: Tensor | None,
        labels: list[str],
        suffix: str = ".png",
    ) -> None:
        """Write what was drawn, [N, ..], of classes int64 [N] if there are such, as a file of that
        kind."""


def _drawn(
    model: Any, count: int, wanted: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Draw of one class, or of all in turn; of a model without classes anything."""
    if model.config.num_classes is None:
        return model.generate(count, generator=generator), None
    classes = torch.arange(count) % model.config.num_classes
    if wanted is not None:
        classes = torch.full_like(classes, wanted)
    return model.generate(count, classes, generator), classes


class GANTask(AdversarialTask):
    """Images like those of a folder or a data set."""

    model_class = GAN
    presets = GAN_PRESETS
    tiny: ClassVar = {"latent_dim": 8, "width": 4, "num_heads": 2, "batch_size": 16}
    kernel = "attention"
    items = judged = "images"
    unit = "FID-like"
    sample_heading = f"{_OF_A_CLASS} images of each class, a column each"
    file = "images.png"
    suffixes = (".png",)

    def __init__(
        self,
        data: Path | None,
        sizes: GANConfig,
        config: AdversarialConfig,
        seed: int = 0,
        tokenizer: None = None,
        is_dry: bool = False,
    ) -> None:
        self._seed = seed
        self.source = str(_source(data, sizes))
        images = _load(data, sizes)
        self.digest = _digest_of(images)
        if is_dry:
            chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
            images = images[chosen[:_DRY_EXAMPLES]]
        with errors_in(self.source):
            self._parts = split_images(images, _HELD_OUT)
        self.record = {"labels": list(images.classes)}
        self.sizes = dataclasses.replace(sizes, num_classes=len(images.classes) or None)
        if not images.classes:
            self.sample_heading = f"{_SAMPLES} images"
        self.examples, self.classes = _normalized(self._parts[0])
        self._measured = _normalized(self._parts[1])
        steps = {"steps": _DRY_STEPS} if is_dry else {}
        self._classifier = image_classifier(self.examples, self.classes, **steps)
        self.baseline = _floor(self._classifier, self.examples, self._measured[0])

    def describe(self) -> str:
        training, held_out = map(len, self._parts)
        return f"{training:,} images to train on, {held_out:,} held out"

    def evaluate(self, model: Any, quickly: bool = False) -> ImageEvaluation:
        return evaluate_images(model, self._classifier, *self._measured)

    @classmethod
    def measure(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool
    ) -> tuple[ImageEvaluation, Baseline | None]:
        known, measured = cls._split(checkpoint, data, whole)
        classifier = image_classifier(*known)
        result = evaluate_images(checkpoint.model, classifier, *measured)
        return result, None if whole else _floor(classifier, known[0], measured[0])

    @classmethod
    def measured(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool
    ) -> tuple[Tensor, Tensor | None]:
        return cls._split(checkpoint, data, whole)[1]

    @classmethod
    def _split(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Return what is known of the data, and what the model is measured on."""
        model, _, training = checkpoint
        images, labels = _load(data, model.config), labels_of(model, training)
        if list(images.classes) != labels:
            found, expected = (", ".join(names) or "none" for names in (images.classes, labels))
            raise InputError(f"{data}: has the classes {found}; expected {expected}")
        with errors_in(_source(data, model.config)):
            parts = (images, images) if whole else split_images(images, _HELD_OUT)
        return list(map(_normalized, parts))

    @classmethod
    def digest_of(cls, data: Path | None, checkpoint: Checkpoint) -> str:
        return _digest_of(_load(data, checkpoint.model.config))

    @classmethod
    def write(
        cls,
        path: Path,
        made: Tensor,
        classes: Tensor | None,
        labels: list[str],
        suffix: str = ".png",
    ) -> None:
        has_columns = classes is not None and len(classes.unique()) > 1
        save_grid(path, made, columns=len(labels) if has_columns else None)


@torch.no_grad()
def _floor(classifier: ImageClassifier, known: Tensor, measured: Tensor) -> Baseline:
    """The distance of the images that were learned from."""
    distance = frechet_distance(*map(classifier.features, (measured, known)))
    return Baseline("training images", distance, [f"{distance:.4f}"])


def _source(data: Path | None, sizes: GANConfig) -> Path:
    """The data set that is meant: of no name, the one of that size."""
    of_sizes = {8: "digits", 28: "mnist"}
    if data is None and sizes.image_size not in of_sizes:
        raise InputError(
            "--data: missing; expected a folder of images, or of a folder for each class, "
            f"since no data set has images of {sizes.image_size} x {sizes.image_size}"
        )
    return data or Path(of_sizes[sizes.image_size])


def _load(data: Path | None, sizes: GANConfig) -> ImageSet:
    source = _source(data, sizes)
    if str(source) in IMAGE_SETS and not source.is_dir():
        images = load_image_set(str(source))
    else:
        images = load_images(source, sizes.image_size, sizes.channels)
    channels, size, _ = images.images.shape[1:]
    if (size, channels) != (sizes.image_size, sizes.channels):
        raise InputError(
            f"{source}: {channels} x {size} x {size} an image; expected --image-size {size} and "
            f"--channels {channels}, as with --preset {source}"
        )
    return ImageSet(images.images) if len(images.classes) == 1 else images  # nothing to tell apart


def _digest_of(images: ImageSet) -> str:
    labels = [] if images.labels is None else [images.labels]
    return digest_of_tensors(images.images, *labels)


def _normalized(images: ImageSet) -> tuple[Tensor, Tensor | None]:
    return normalize_images(images.images), images.labels


class RecurrentGANTask(AdversarialTask):
    """Series like those of some processes."""

    model_class = RecurrentGAN
    presets = RECURRENT_GAN_PRESETS
    tiny: ClassVar = {"length": 8, "latent_dim": 4, "hidden_size": 8, "batch_size": 16}
    kernel = "gru"
    items = judged = "series"
    unit = "KS"
    sample_heading = f"{_OF_A_CLASS} series of each process"
    file = "series.png"
    suffixes = (".png", ".csv")

    def __init__(
        self,
        data: Path | None,
        sizes: RecurrentGANConfig,
        config: AdversarialConfig,
        seed: int = 0,
        tokenizer: None = None,
        is_dry: bool = False,
    ) -> None:
        self._seed = seed
        self.source = _SYNTHETIC
        _check_synthetic(data)
        count = _DRY_EXAMPLES if is_dry else _SERIES
        self.examples, self.classes = synthetic_series(count, sizes.length)
        self.digest = digest_of_tensors(self.examples, self.classes)
        self._measured = _held_out(_DRY_EXAMPLES if is_dry else _HELD_OUT_SERIES, sizes)
        self.record = {"labels": list(PROCESSES)}
        self.sizes = dataclasses.replace(sizes, channels=1, num_classes=len(PROCESSES))

    def describe(self) -> str:
        return (
            f"{len(self.examples):,} series of {len(PROCESSES)} processes to train on, "
            f"{len(self._measured[0]):,} held out"
        )

    def evaluate(self, model: Any, quickly: bool = False) -> SeriesEvaluation:
        return evaluate_series(model, *self._measured)

    @classmethod
    def measure(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool
    ) -> tuple[SeriesEvaluation, Baseline | None]:
        return evaluate_series(checkpoint.model, *cls.measured(checkpoint, data, whole)), None

    @classmethod
    def measured(
        cls, checkpoint: Checkpoint, data: Path | None, whole: bool
    ) -> tuple[Tensor, Tensor]:
        _check_synthetic(data)
        sizes = checkpoint.model.config
        if whole:
            return synthetic_series(_SERIES, sizes.length)
        return _held_out(_HELD_OUT_SERIES, sizes)

    @classmethod
    def digest_of(cls, data: Path | None, checkpoint: Checkpoint) -> str:
        return digest_of_tensors(*synthetic_series(_SERIES, checkpoint.model.config.length))

    @classmethod
    def write(
        cls,
        path: Path,
        made: Tensor,
        classes: Tensor | None,
        labels: list[str],
        suffix: str = ".png",
    ) -> None:
        if classes is None:
            classes, labels = torch.zeros(len(made), dtype=torch.int64), ["series"]
        if suffix == ".png":
            parts = {labels[c]: made[classes == c] for c in classes.unique().tolist()}
            plot_series(path, parts)
            return
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["label", *range(made[0].numel())])
            for series, index in zip(made.flatten(1).tolist(), classes.tolist(), strict=True):
                writer.writerow([labels[index], *series])


def _held_out(count: int, sizes: RecurrentGANConfig) -> tuple[Tensor, Tensor]:
    return synthetic_series(count, sizes.length, seed=1)


def _check_synthetic(data: Path | None) -> None:
    if data is not None and str(data) != _SYNTHETIC:
        raise InputError(f"{data}: series are drawn from known processes; expected no --data")
