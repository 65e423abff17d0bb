"""Adversarial losses, the loop that alternates, and the measures of what was drawn."""

from __future__ import annotations

import math

import pytest
import torch
from model_checks import perturb
from safetensors.torch import load, save
from torch.nn.attention import SDPBackend, sdpa_kernel

import genkernels
from genkernels.data import (
    PROCESSES,
    AutoRegression,
    InputError,
    RowBatches,
    Sinusoid,
    synthetic_series,
)
from genkernels.models import GAN, GANConfig, RecurrentGAN, RecurrentGANConfig
from genkernels.training import (
    ADVERSARIAL_LOSSES,
    GAN_PRESETS,
    RECURRENT_GAN_PRESETS,
    AdversarialConfig,
    AdversarialTraining,
    autocorrelations,
    evaluate_images,
    evaluate_series,
    frechet_distance,
    gradient_penalty,
    image_classifier,
)
from genkernels.training import evaluation_gan as evaluation_module

IMAGES = GANConfig(8, num_classes=2, latent_dim=4, width=8, num_heads=2)
SERIES = RecurrentGANConfig(6, channels=2, num_classes=2, latent_dim=3, hidden_size=8)

pytestmark = pytest.mark.usefixtures("one_thread")


def model_and_data(kind: str, fused: bool = True):
    torch.manual_seed(0)
    if kind == "images":
        model, shape = GAN(IMAGES, fused), (1, 8, 8)
    else:
        model, shape = RecurrentGAN(SERIES, fused), (6, 2)
    perturb(model, 0.2)  # attention has a part then
    return model, torch.randn(20, *shape), torch.arange(20) % 2


REAL, FAKE = torch.tensor([0.3, -2.0, 5.0]), torch.tensor([-0.4, 1.5, 0.1])


def log_sigmoid(score: float) -> float:
    return -math.log1p(math.exp(-score))


@pytest.mark.parametrize(
    ("name", "of_real", "of_fake", "of_generator"),
    [
        (
            "minimax",
            lambda s: -log_sigmoid(s),
            lambda s: -log_sigmoid(-s),
            lambda s: log_sigmoid(-s),
        ),
        (
            "non-saturating",
            lambda s: -log_sigmoid(s),
            lambda s: -log_sigmoid(-s),
            lambda s: -log_sigmoid(s),
        ),
        ("hinge", lambda s: max(0, 1 - s), lambda s: max(0, 1 + s), lambda s: -s),
        ("wgan-gp", lambda s: -s, lambda s: s, lambda s: -s),
    ],
)
def test_losses(name, of_real, of_fake, of_generator):
    loss = ADVERSARIAL_LOSSES[name]
    real, fake = REAL.tolist(), FAKE.tolist()
    expected = sum(map(of_real, real)) / 3 + sum(map(of_fake, fake)) / 3
    assert loss.discriminator(REAL, FAKE).item() == pytest.approx(expected)
    assert loss.generator(FAKE).item() == pytest.approx(sum(map(of_generator, fake)) / 3)
    assert loss.has_penalty == (name == "wgan-gp")


def test_only_the_saturating_loss_saturates():
    """A discriminator that is sure leaves the generator a gradient but for one loss."""
    for name, least in (("minimax", 0.0), ("non-saturating", 0.99), ("hinge", 1.0)):
        score = torch.tensor([-30.0], requires_grad=True)
        ADVERSARIAL_LOSSES[name].generator(score).backward()
        assert least <= -score.grad.item() <= max(least, 1e-9) + 0.01


def test_penalty_of_a_linear_score():
    """The gradient is the weight wherever it is taken."""
    weight = torch.randn(3, 4).requires_grad_()
    real, fake = torch.randn(5, 3, 4), torch.randn(5, 3, 4, requires_grad=True)
    penalty = gradient_penalty(lambda x, classes: (x * weight).sum((1, 2)), real, fake)
    norm = weight.norm()
    assert penalty.item() == pytest.approx((norm.item() - 1) ** 2)
    penalty.backward()
    torch.testing.assert_close(weight.grad, (2 * (norm - 1) * weight / norm).detach())
    assert fake.grad is None


def test_penalty_is_taken_between_the_examples():
    seen = []

    def discriminator(x, classes):
        seen.append(x.detach())
        return x.square().sum(1)

    real, fake = torch.full((1000, 2), 3.0), torch.tensor([1.0, -1.0]).expand(1000, 2)
    torch.manual_seed(0)
    gradient_penalty(discriminator, real, fake)
    shares = (seen[0] - fake) / (real - fake)
    torch.testing.assert_close(shares[:, 0], shares[:, 1])
    assert shares.min() >= 0
    assert shares.max() < 1 + 1e-6
    assert shares.mean().item() == pytest.approx(0.5, abs=0.05)
    assert shares.std().item() == pytest.approx(12**-0.5, abs=0.03)


@pytest.mark.parametrize("kind", ["images", "series"])
def test_penalty_is_that_of_plain_pytorch(kind):
    """With its gradients, from torch.autograd on the twin; the fused kernels have run."""
    results = []
    for fused in (True, False):
        model, examples, classes = model_and_data(kind, fused)
        model, examples = model.double(), examples.double()
        model.eval()  # no power iteration between the two
        real, fake = examples.split(10)
        genkernels.stats(reset=True)
        torch.manual_seed(3)
        if fused:
            penalty = gradient_penalty(model.discriminator, real, fake, classes[:10])
        else:
            u = torch.rand(10, *[1] * (real.dim() - 1), dtype=torch.float64)
            x = (u * real + (1 - u) * fake).requires_grad_()
            with sdpa_kernel(SDPBackend.MATH):
                score = model.discriminator(x, classes[:10])
            (gradient,) = torch.autograd.grad(score.sum(), x, create_graph=True)
            penalty = ((gradient.square().sum(tuple(range(1, x.dim()))).sqrt() - 1) ** 2).mean()
        if fused:
            between = genkernels.stats(reset=True)
        penalty.backward()
        if fused:
            after = genkernels.stats(reset=True)
        gradients = {n: p.grad for n, p in model.discriminator.named_parameters()}
        results.append({"penalty": penalty} | {n: g for n, g in gradients.items() if g is not None})
    actual, expected = results
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], msg=lambda m, n=name: f"{n}: {m}")
    assert sum(tensor.abs().sum() for tensor in actual.values()) > 0.1
    if kind == "images":
        assert after["attention_double_backward", "cpp"] == 1
        calls = [*between, *after]
        assert {backend for op, backend in calls if "attention" in op} == {"cpp"}
    else:
        # The gradient is the kernels'; of its own gradient the GRU has a closed form in PyTorch.
        assert between == {("gru_forward", "cpp"): 1, ("gru_backward", "cpp"): 1}
        assert after["gru_backward", "reference"] == 1


@pytest.mark.parametrize("kind", ["images", "series"])
@pytest.mark.parametrize("loss", list(ADVERSARIAL_LOSSES))
def test_continues_to_the_last_bit(kind, loss):
    config = AdversarialConfig(loss=loss, steps=5, discriminator_steps=2)

    def run(stop: int | None) -> dict[str, torch.Tensor]:
        model, examples, classes = model_and_data(kind)
        batches = RowBatches(examples, classes, batch_size=4)
        training = AdversarialTraining(model, batches, config)
        for step in training:
            if step.number == stop:
                break
        else:
            return model.state_dict()
        saved = load(save(model.state_dict())), load(save(training.state_dict()))
        model, *_ = model_and_data(kind)
        perturb(model, 0.1)
        model.load_state_dict(saved[0])
        training = AdversarialTraining(model, batches, config)
        training.load_state_dict(saved[1])
        assert [step.number for step in training] == list(range(stop + 1, 6))
        return model.state_dict()

    whole, continued = run(None), run(2)
    assert whole.keys() == continued.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, continued[name]), name


def test_a_step_is_k_of_the_discriminator_and_one_of_the_generator():
    model, examples, classes = model_and_data("series")
    drawn, is_trained = [], []
    model.discriminator.register_forward_pre_hook(
        lambda module, _: is_trained.append(module.output.weight.requires_grad)
    )

    class Recorder(RowBatches):
        def batch(self, step):
            drawn.append(step)
            return super().batch(step)

    batches = Recorder(examples, classes, batch_size=4)
    config = AdversarialConfig(
        loss="wgan-gp", steps=4, discriminator_steps=3, learning_rate=1e-3, schedule="cosine",
        discriminator_learning_rate=4e-3,
    )  # fmt: skip
    training = AdversarialTraining(model, batches, config)
    steps = list(training)
    assert drawn == list(range(12))
    assert is_trained == ([True, True] * 3 + [False]) * 4, "not with the generator"
    assert [step.number for step in steps] == [1, 2, 3, 4]
    assert [step.progress for step in steps] == [0.25, 0.5, 0.75, 1]
    assert all(step.tokens == 12 and step.seconds > 0 for step in steps)
    counts = [
        {int(state["step"]) for state in optimizer.state.values()}
        for optimizer in training.optimizers
    ]
    assert counts == [{12}, {4}]
    assert len(training.discriminator_optimizer.state) == len([*model.discriminator.parameters()])
    factor = 0.5 * (1 + math.cos(0.75 * math.pi))
    assert steps[-1].learning_rate == pytest.approx(1e-3 * factor)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in training.optimizers]
    assert rates == pytest.approx([4e-3 * factor, 1e-3 * factor])
    assert all(p.requires_grad for p in model.discriminator.parameters())
    assert int(model.average.n_averaged) == 4


def test_without_classes():
    torch.manual_seed(0)
    model = RecurrentGAN(RecurrentGANConfig(6))
    batches = RowBatches(torch.randn(9, 6, 1), batch_size=4)
    assert len(list(AdversarialTraining(model, batches, AdversarialConfig(steps=2)))) == 2


def test_says_when_the_loss_is_no_number():
    model, examples, classes = model_and_data("series")
    torch.nn.init.constant_(model.discriminator.output.bias, math.inf)
    batches = RowBatches(examples, classes, batch_size=4)
    with pytest.raises(FloatingPointError, match=r"step 1; .* below 0.0002"):
        list(AdversarialTraining(model, batches, AdversarialConfig(loss="minimax", steps=2)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("loss", "wasserstein"), ("discriminator_steps", 0), ("batch_size", "full"), ("steps", None)],
)
def test_config_refuses(field, value):
    with pytest.raises(ValueError, match=field):
        AdversarialConfig(**({"steps": 1} | {field: value}))


def test_presets_are_of_the_models():
    for preset in GAN_PRESETS.values():
        assert isinstance(preset.model, GANConfig)
        assert isinstance(preset.training, AdversarialConfig)
    for preset in RECURRENT_GAN_PRESETS.values():
        assert isinstance(preset.model, RecurrentGANConfig)
        assert preset.model.num_classes == len(PROCESSES)


def test_rows_belong_together():
    data = torch.arange(50)
    batches = RowBatches(data, -data, batch_size=20, seed=3)
    first, again, other = batches.batch(0), batches.batch(0), batches.batch(1)
    assert torch.equal(first[0], -first[1])
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert torch.cat([batches.batch(step)[0] for step in range(30)]).unique().tolist() == [*data]
    with pytest.raises(InputError, match="no examples"):
        RowBatches(data[:0], batch_size=2)
    with pytest.raises(ValueError, match=r"\[50, 49\]"):
        RowBatches(data, data[1:], batch_size=2)


def test_frechet_distance():
    """Of normal distributions whose distance is known: covariances that commute, and any."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 4, generator=generator, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # covariance I
    shift, scale = torch.tensor([1.0, -2.0, 0.0, 3.0]), torch.tensor([0.5, 1.0, 2.0, 0.0])
    expected = (shift.square().sum() + (scale - 1).square().sum()).item()
    assert frechet_distance(x, x * scale + shift) == pytest.approx(expected)
    a, b = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    values = torch.linalg.eigvals((a @ a.T) @ (b @ b.T)).real
    expected = ((a @ a.T).trace() + (b @ b.T).trace() - 2 * values.sqrt().sum()).item()
    assert frechet_distance(x @ a.T, x @ b.T) == pytest.approx(expected)
    assert frechet_distance(x.float(), x.float()) == pytest.approx(0, abs=1e-6)


class Drawn:
    """Draws what it was made with."""

    def __init__(self, examples: torch.Tensor, num_classes: int | None) -> None:
        self.examples = examples
        self.config = type("Config", (), {"num_classes": num_classes})

    def generate(self, count, classes, generator):
        assert (classes is None) == (self.config.num_classes is None)
        return self.examples


def shapes(seed: int, count: int = 120) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of a bright row, whose place is the class, in noise."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(count) % 4
    images = 0.2 * torch.randn(count, 1, 8, 8, generator=generator) - 0.5
    images[torch.arange(count), 0, 2 * classes] += 1
    return images, classes


def test_measures_of_images_without_classes(monkeypatch):
    """By a classifier that has learned to tell how they are turned."""
    monkeypatch.setattr(evaluation_module, "_CLASSIFIER_STEPS", 150)
    classifier = image_classifier(shapes(0)[0])
    held_out, labels = shapes(1)
    for count in range(4):
        with torch.no_grad():
            found = classifier(held_out.rot90(count, (2, 3))).argmax(1)
        assert (found == count).double().mean() > 0.9
    drawn = shapes(2)[0]
    good = evaluate_images(Drawn(drawn, None), classifier, held_out)
    assert good[1:] == (None, None, 0, 120)
    assert [name for name, _ in good.rows()] == ["FID-like distance"]
    two = torch.where((labels < 2)[:, None, None, None], drawn, drawn[:1])
    assert evaluate_images(Drawn(two, None), classifier, held_out).figure > 3 * good.figure


def test_measures_of_images(monkeypatch):
    monkeypatch.setattr(evaluation_module, "_CLASSIFIER_STEPS", 80)
    images, classes = shapes(0)
    state = torch.get_rng_state()
    classifier = image_classifier(images, classes)
    assert image_classifier(images, classes) is classifier
    assert torch.equal(state, torch.get_rng_state())
    held_out, labels = shapes(1)
    good = evaluate_images(Drawn(shapes(2)[0], 4), classifier, held_out, labels)
    assert good[1:] == (4, 1.0, 4, 120)
    two = torch.where((labels < 2)[:, None, None, None], shapes(2)[0], shapes(2)[0][:1])
    poor = evaluate_images(Drawn(two, 4), classifier, held_out, labels)
    assert poor.covered == 2
    assert poor.agreement == pytest.approx(0.5)
    assert poor.figure > 3 * good.figure
    free = evaluate_images(Drawn(shapes(2)[0], None), classifier, held_out, labels)
    assert free.agreement is None
    assert free.distance == good.distance
    assert [name for name, _ in poor.rows()] == [
        "FID-like distance",
        "classes covered",
        "class agreement",
    ]
    assert len(free.rows()) == 2


@pytest.mark.parametrize("name", list(PROCESSES))
def test_series_are_of_their_distribution(name):
    index = list(PROCESSES).index(name)
    series, classes = synthetic_series(12_000, 16, seed=1)
    assert series.shape == (12_000, 16, 1)
    values = series[classes == index, :, 0]
    assert len(values) == 4000
    torch.testing.assert_close(values.mean(0), torch.zeros(16), atol=0.06, rtol=0)
    torch.testing.assert_close(values.var(0), torch.ones(16), atol=0.1, rtol=0)
    expected = torch.tensor([PROCESSES[name].autocorrelation(lag) for lag in range(16)])
    assert expected[0] == 1
    correlations = torch.corrcoef(values.T)
    for t in (0, 1, 7):  # whenever they are looked at
        torch.testing.assert_close(correlations[t, t:], expected[: 16 - t], atol=0.06, rtol=0)
    torch.testing.assert_close(
        autocorrelations(values, 10), expected[1:11].double(), atol=0.03, rtol=0
    )
    again, _ = synthetic_series(12_000, 16, seed=1)
    assert torch.equal(series, again)
    assert not torch.equal(series, synthetic_series(12_000, 16, seed=2)[0])


def test_short_series():
    for process in (AutoRegression(0.5, 0.2), Sinusoid(4, 0.5)):
        for length in (1, 2):
            assert process.draw(3, length, torch.Generator()).shape == (3, length)


def test_measures_of_series():
    series, classes = synthetic_series(3000, 16, seed=1)
    other, _ = synthetic_series(3000, 16, seed=2)
    good = evaluate_series(Drawn(other, 3), series, classes)
    assert good.kolmogorov_smirnov < 0.04
    assert good.at_a_time < 0.11
    assert good.autocorrelation < 0.08
    assert good.series == 3000
    moved = other.clone()
    moved[classes == 1] += 0.5  # of N(0, 1) that is a distance of 2 Phi(0.25) - 1
    poor = evaluate_series(Drawn(moved, 3), series, classes)
    assert poor.figure == pytest.approx(math.erf(0.25 / 2**0.5), abs=0.03)
    assert poor.autocorrelation == pytest.approx(good.autocorrelation, abs=0.02)
    rows = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = evaluate_series(Drawn(other[:, rows], 3), series, classes)
    assert shuffled.kolmogorov_smirnov == pytest.approx(good.kolmogorov_smirnov, abs=1e-6)
    assert shuffled.autocorrelation > 0.3
    first = other.clone()
    first[:, 0] = 0
    assert evaluate_series(Drawn(first, 3), series, classes).at_a_time > 0.4
    assert evaluate_series(Drawn(other, None), series).figure < 0.04
    assert next(name for name, _ in good.rows()) == "Kolmogorov-Smirnov"
