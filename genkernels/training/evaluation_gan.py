"""How close what a generator draws comes to what it has learned from."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import RowBatches
from ..models import GAN, RecurrentGAN, evaluating

LAGS = 10
_FEATURES = 64
_CLASSIFIER_STEPS = 500
_BATCH_SIZE = 128
_COVERED = 0.1


class ImageEvaluation(NamedTuple):
    """Measures of generated images, by a classifier of the real ones.

    distance: the Fréchet distance of the classifier's features. It is made like the FID of Heusel
        et al. 2017, but with another network, so it is not to be compared with theirs, nor one by
        classes with one by rotations.
    covered: how many classes are drawn, by the classifier: at least a tenth as often as in the
        data; None for images without classes.
    agreement: share of the images that are of the class that was asked for, by the classifier;
        None for a model without classes.
    classes, images: how many there are.
    """

    distance: float
    covered: int | None
    agreement: float | None
    classes: int
    images: int

    @property
    def figure(self) -> float:
        """The one that training goes by; less is better."""
        return self.distance

    def rows(self) -> list[tuple[str, str]]:
        """Return the measures in words, `figure` first."""
        rows = [("FID-like distance", f"{self.distance:.4f} of {self.images:,} images")]
        if self.covered is not None:
            rows.append(("classes covered", f"{self.covered} of {self.classes}"))
        if self.agreement is not None:
            rows.append(("class agreement", f"{self.agreement:.2%}"))
        return rows


class ImageClassifier(nn.Module):
    """Images [N, C, H, W] to logits [N, K]; `features` are what the last Linear is given, [N, 64].

    A convolution, one more for each halving down to at most 7 x 7 pixels, and two Linears.
    """

    def __init__(self, channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        width = 32
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        while image_size > 7:
            layers += [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU()]
            width, image_size = 2 * width, (image_size + 1) // 2
        layers += [nn.Flatten(), nn.Linear(width * image_size**2, _FEATURES), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.output = nn.Linear(_FEATURES, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.features(images))


@functools.lru_cache(maxsize=4)
def image_classifier(
    images: Tensor, classes: Tensor | None = None, seed: int = 0, steps: int | None = None
) -> ImageClassifier:
    """Train a classifier, in seconds; the same tensors are learned once in a process.

    Of images without classes it learns by which of four right angles each was turned, for which it
    has to know what they show (Gidaris et al. 2018, https://arxiv.org/abs/1803.07728, section 2).
    Torch's random numbers are left as they are.

    Args:
        images: square ones, float32 [N, C, H, H] in [-1, 1].
        classes: int64 [N]; None for images without.
        steps: of its training, 500 by default.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, channels, size, _ = images.shape
        if classes is None:
            kinds, batches = 4, RowBatches(images, batch_size=_BATCH_SIZE // 4, seed=seed)
        else:
            kinds = int(classes.max()) + 1
            batches = RowBatches(images, classes, batch_size=_BATCH_SIZE, seed=seed)
        model = ImageClassifier(channels, size, kinds)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        for step in range(_CLASSIFIER_STEPS if steps is None else steps):
            optimizer.zero_grad()
            batch = batches.batch(step)
            input, target = _turned(*batch) if classes is None else batch
            F.cross_entropy(model(input), target).backward()
            optimizer.step()
    return model.eval()


def _turned(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return each of the images, [N, C, H, H], turned by no right angle, one, two and three, and by
    how many, int64 [4 N]."""
    turned = [images.rot90(count, (2, 3)) for count in range(4)]
    return torch.cat(turned), torch.arange(4).repeat_interleave(len(images))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The squared Fréchet distance of two normal distributions, those of the rows of a, [N, F], and
    of b, [M, F].

    |mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)), in float64 (Heusel et al. 2017,
    https://arxiv.org/abs/1706.08500, equation 6). The root's trace is that of
    (C_a^(1/2) C_b C_a^(1/2))^(1/2), which is symmetric.
    """
    a, b = a.double(), b.double()
    covariance_a, covariance_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    products = torch.linalg.eigvalsh(root @ covariance_b @ root)
    overlap = products.clamp(min=0).sqrt().sum()
    spread = covariance_a.trace() + covariance_b.trace() - 2 * overlap
    return ((a.mean(0) - b.mean(0)).square().sum() + spread).item()


@torch.no_grad()
def evaluate_images(
    model: GAN,
    classifier: ImageClassifier,
    images: Tensor,
    classes: Tensor | None = None,
    seed: int = 0,
) -> ImageEvaluation:
    """Measure `model` against real images, float32 [N, C, H, W] in [-1, 1], of classes int64 [N] if
    `classifier` is one of classes.

    As many are drawn, of the same classes; the same ones for the same seed.
    """
    wanted = None if model.config.num_classes is None else classes
    drawn = model.generate(len(images), wanted, torch.Generator().manual_seed(seed))
    with evaluating(classifier):
        features = classifier.features(drawn)
        distance = frechet_distance(classifier.features(images), features)
        found = classifier.output(features).argmax(1)
    if classes is None:
        return ImageEvaluation(distance, None, None, 0, len(images))
    known = classes.bincount(minlength=classifier.output.out_features)
    is_covered = found.bincount(minlength=len(known)) >= _COVERED * known
    agreement = None if wanted is None else (found == wanted).double().mean().item()
    return ImageEvaluation(
        distance, int(is_covered[known > 0].sum()), agreement, int((known > 0).sum()), len(images)
    )


class SeriesEvaluation(NamedTuple):
    """Measures of generated series; each is the worst of all classes and channels.

    kolmogorov_smirnov: the largest difference of two distribution functions, of the values at all
        times.
    at_a_time: the same of the values at one time, the worst of all times.
    autocorrelation: the largest difference of the autocorrelations at lags 1 to 10.
    series: how many there are.
    """

    kolmogorov_smirnov: float
    at_a_time: float
    autocorrelation: float
    series: int

    @property
    def figure(self) -> float:
        """The one that training goes by; less is better."""
        return self.kolmogorov_smirnov

    def rows(self) -> list[tuple[str, str]]:
        """Return the measures in words, `figure` first."""
        return [
            ("Kolmogorov-Smirnov", f"{self.kolmogorov_smirnov:.4f} of {self.series:,} series"),
            ("at any one time", f"{self.at_a_time:.4f}"),
            ("autocorrelation", f"off by {self.autocorrelation:.4f} at most, lags 1 to {LAGS}"),
        ]


def autocorrelations(series: Tensor, lags: int = LAGS) -> Tensor:
    """The correlations of values that are 1, 2, .. `lags` steps apart, [lags], of series [N, T] of
    one mean and variance."""
    centred = series.double() - series.double().mean()
    products = [
        (centred[:, lag:] * centred[:, : series.shape[1] - lag]).mean()
        for lag in range(1, lags + 1)
    ]
    return torch.stack(products) / centred.square().mean()


def evaluate_series(
    model: RecurrentGAN, series: Tensor, classes: Tensor | None = None, seed: int = 0
) -> SeriesEvaluation:
    """Measure `model` against real series, [N, T, C], of classes int64 [N].

    As many are drawn, of the same classes; the same ones for the same seed.
    """
    from scipy.stats import ks_2samp

    def distance(real: Tensor, drawn: Tensor) -> float:
        return float(ks_2samp(real.flatten(), drawn.flatten(), method="asymp").statistic)

    generator = torch.Generator().manual_seed(seed)
    wanted = None if model.config.num_classes is None else classes
    drawn = model.generate(len(series), wanted, generator)
    overall, at_a_time, correlation = 0.0, 0.0, 0.0
    groups = torch.zeros(len(series), dtype=torch.int64) if wanted is None else wanted
    lags = min(LAGS, series.shape[1] - 1)
    for index in groups.unique():
        rows = groups == index
        channels = zip(series[rows].unbind(2), drawn[rows].unbind(2), strict=True)
        for real, fake in channels:  # [N, T]
            overall = max(overall, distance(real, fake))
            at_a_time = max(at_a_time, *map(distance, real.T, fake.T))
            off = autocorrelations(real, lags) - autocorrelations(fake, lags)
            correlation = max(correlation, off.abs().max().item())
    return SeriesEvaluation(overall, at_a_time, correlation, len(series))
