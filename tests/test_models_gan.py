"""The generative adversarial networks: sizes, twins in plain PyTorch, and what they draw."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from model_checks import perturb

import genkernels
from genkernels.data import RowBatches
from genkernels.models import GAN, GANConfig, RecurrentGAN, RecurrentGANConfig
from genkernels.training import AdversarialConfig, AdversarialTraining

SMALL = GANConfig(8, num_classes=2, latent_dim=4, width=8, num_heads=2)
SERIES = RecurrentGANConfig(6, channels=2, num_classes=2, latent_dim=3, hidden_size=8)

pytestmark = pytest.mark.usefixtures("one_thread")


def small_gan(config: GANConfig = SMALL, fused: bool = True) -> GAN:
    torch.manual_seed(0)
    return GAN(config, fused)


def small_recurrent(config: RecurrentGANConfig = SERIES, fused: bool = True) -> RecurrentGAN:
    torch.manual_seed(0)
    return RecurrentGAN(config, fused)


MODELS = pytest.mark.parametrize("make", [small_gan, small_recurrent])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *((name, 0, name) for name in ("image_size", "num_classes", "latent_dim", "num_heads")),
        ("width", 2.0, "width"),
        ("width", 6, "multiple of num_heads 4"),
        ("width", 10**6, "width"),
        ("image_size", 7, "image_size"),
        ("image_size", 18, "image_size"),
        ("channels", 2, "channels"),
        ("channels", True, "channels"),
        ("spectral_norm", 1, "spectral_norm"),
    ],
)
def test_config_refuses(field, value, message):
    with pytest.raises(ValueError, match=message):
        GANConfig(**({"image_size": 8} | {field: value}))


@pytest.mark.parametrize(
    "field", ["length", "channels", "num_classes", "latent_dim", "hidden_size", "num_layers"]
)
def test_recurrent_config_refuses(field):
    for value in (0, 2.0, 10**7):
        with pytest.raises(ValueError, match=field):
            RecurrentGANConfig(**({"length": 8} | {field: value}))


@pytest.mark.parametrize(
    ("size", "levels"), [(8, (4, 1)), (14, (7, 1)), (28, (7, 2)), (32, (4, 3)), (40, (5, 3))]
)
@pytest.mark.parametrize(("channels", "num_classes"), [(1, 3), (3, None)])
def test_images(size, levels, channels, num_classes):
    config = GANConfig(size, channels, num_classes, latent_dim=4, width=4)
    assert config.levels == levels
    model = small_gan(config)
    images = model.generate(5, generator=seeded(0))
    assert images.shape == (5, channels, size, size)
    assert images.abs().max() <= 1
    classes = None if num_classes is None else torch.tensor([0, 1, 2, 0, 1])
    assert model.discriminator(images, classes).shape == (5,)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("num_classes", [None, 3])
def test_series(num_layers, num_classes):
    config = RecurrentGANConfig(7, 2, num_classes, 3, 8, num_layers)
    model = small_recurrent(config)
    series = model.generate(5, generator=seeded(0))
    assert series.shape == (5, 7, 2)
    classes = None if num_classes is None else torch.tensor([0, 1, 2, 0, 1])
    assert model.discriminator(series, classes).shape == (5,)


@MODELS
def test_is_the_model_in_plain_pytorch(make):
    model, twin = make().double(), make(fused=False).double()
    assert model.state_dict().keys() == twin.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name]), "one seed, one initial value"
    perturb(model, 0.1)  # attention has a part then
    twin.load_state_dict(model.state_dict())
    noise, classes = model.noise(4), torch.tensor([0, 1, 1, 0])
    genkernels.stats(reset=True)
    results = []
    for m in (model, twin):
        examples = m.generator(noise, classes)
        score = m.discriminator(examples, classes)
        parameters = [p for p in m.parameters() if p.requires_grad]
        results.append([examples, score, *torch.autograd.grad(score.sum(), parameters)])
    torch.testing.assert_close(*results)
    calls = genkernels.stats(reset=True)
    op = "attention" if make is small_gan else "gru"
    assert calls[f"{op}_forward", "cpp"] == calls[f"{op}_backward", "cpp"] == 2


@MODELS
def test_generation_follows_its_generator(make):
    model = make()
    state = torch.get_rng_state()
    first, again, other = (model.generate(300, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.flatten(1).unique(dim=0)) == 300
    assert model.training, "generate must leave the mode as it was"
    torch.manual_seed(0)
    drawn = model.generate(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, model.generate(3))


@MODELS
def test_generation_of_classes(make):
    model = make()
    perturb(model, 0.3)
    noise, classes = model.noise(4, seeded(3)), torch.tensor([1, 0, 1, 1])
    model.eval()
    expected = model.average(noise, classes)
    assert torch.equal(model.generate(4, classes, seeded(3)), expected)
    ones = model.generate(4, 1, seeded(3))
    torch.testing.assert_close(ones[[0, 2, 3]], expected[[0, 2, 3]])
    assert not torch.allclose(ones[1], expected[1])


@MODELS
@pytest.mark.parametrize(
    ("count", "classes", "message"),
    [
        (0, None, "count"),
        (2.0, None, "count"),
        (2, 2, "from 0 to 1"),
        (2, torch.tensor([0, -1]), "from 0 to 1"),
        (2, torch.tensor([0, 1, 1]), "int64"),
        (2, torch.tensor([0.0, 1.0]), "int64"),
    ],
)
def test_generate_refuses(make, count, classes, message):
    with pytest.raises(ValueError, match=message):
        make().generate(count, classes)


def test_classes_need_a_model_that_has_them():
    with pytest.raises(ValueError, match="without classes"):
        small_recurrent(RecurrentGANConfig(4)).generate(1, 0)


@MODELS
def test_average_follows_the_generator(make):
    model = make()
    expected = None
    for count in range(4):
        perturb(model.generator, 0.1)
        model.average.update_parameters(model.generator)
        current = torch.cat([p.flatten() for p in model.generator.parameters()])
        decay = (1 + count) / (10 + count)
        expected = current if expected is None else decay * expected + (1 - decay) * current
    average = torch.cat([p.flatten() for p in model.average.parameters()])
    torch.testing.assert_close(average, expected)
    assert not any(p.requires_grad for p in model.average.parameters())


def test_attention_starts_closed():
    model = small_gan()
    image = torch.randn(2, 8, 5, 4)
    attention = model.generator.attention
    assert torch.equal(attention(image), image)
    with torch.no_grad():
        attention.gate.fill_(0.5)
    tokens = image.flatten(2).mT
    expected = image + 0.5 * attention.attention(tokens).mT.view_as(image)
    torch.testing.assert_close(attention(image), expected)


def test_spectral_norm_of_every_weight():
    model = small_gan()
    for _ in range(100):  # of power iteration
        model.discriminator(torch.randn(1, 1, 8, 8), torch.tensor([0]))
    model.eval()
    weights = [m.weight for m in model.discriminator.modules() if hasattr(m, "parametrizations")]
    assert len(weights) == 6
    for weight in weights:
        largest = torch.linalg.matrix_norm(weight.flatten(1), 2).item()
        assert largest == pytest.approx(1, abs=1e-2)
    plain = small_gan(GANConfig(8, spectral_norm=False))
    assert not any("parametrizations" in name for name in plain.state_dict())


def images_to_learn() -> torch.Tensor:
    return torch.where(torch.rand(2, 1, 8, 8, generator=seeded(0)) < 0.5, -0.8, 0.8)


def series_to_learn() -> torch.Tensor:
    times = torch.arange(6.0)
    waves = [torch.sin(times), torch.cos(times), -torch.sin(2 * times), 0.5 * times.cos()]
    return torch.stack(waves).view(2, 2, 6).mT


@pytest.mark.parametrize(
    ("make", "config", "examples", "settings"),
    [
        (
            small_gan,
            SMALL,
            images_to_learn(),
            {"loss": "hinge", "steps": 400, "learning_rate": 4e-3},
        ),
        (
            small_recurrent,
            dataclasses.replace(SERIES, hidden_size=32),
            series_to_learn(),
            {
                "loss": "wgan-gp",
                "penalty": 1.0,
                "steps": 300,
                "learning_rate": 1e-2,
                "discriminator_steps": 2,
            },
        ),
    ],
)
def test_learns_two_examples_by_heart(make, config, examples, settings):
    model = make(config)
    batches = RowBatches(examples, torch.arange(2), batch_size=8)
    training = AdversarialConfig(schedule="cosine", **settings)

    def error() -> float:
        classes = torch.arange(2).repeat(16)
        drawn = model.generate(32, classes, seeded(0))
        return (drawn - examples[classes]).abs().mean().item()

    before = error()
    for _ in AdversarialTraining(model, batches, training):
        pass
    assert error() < 0.2 * before


@MODELS
@pytest.mark.parametrize("loss", ["hinge", "wgan-gp"])
def test_trains_as_in_plain_pytorch(make, loss):
    """Thirty steps, in float64, where Adam makes no steps of rounding errors; the gradient of the
    penalty's gradient is a kernel's of attention, and of the GRU a closed form in PyTorch."""
    op, second = {
        small_gan: ("attention", ("attention_double_backward", "cpp")),
        small_recurrent: ("gru", ("gru_backward", "reference")),
    }[make]
    kernels = {(f"{op}_forward", "cpp"), (f"{op}_backward", "cpp")}
    generator = seeded(0)
    shape = (1, 8, 8) if make is small_gan else (6, 2)
    data = torch.randn(20, *shape, generator=generator, dtype=torch.float64).tanh()
    batches = RowBatches(data, torch.arange(20) % 2, batch_size=8)
    config = AdversarialConfig(loss=loss, steps=30, learning_rate=1e-3)
    losses, drawn = [], []
    for fused in (True, False):
        model = make(fused=fused).double()
        with torch.no_grad():
            for module in model.modules():
                if hasattr(module, "gate"):
                    module.gate.fill_(0.5)
        torch.manual_seed(1)
        training = AdversarialTraining(model, batches, config)
        genkernels.stats(reset=True)
        losses.append([(step.loss, training.generator_loss) for step in training])
        calls = genkernels.stats(reset=True)
        if fused:
            # Each network twice forward a step, and backward the discriminator twice.
            penalties = 30 * (loss == "wgan-gp")
            assert calls[f"{op}_forward", "cpp"] == 120 + penalties
            assert calls[f"{op}_backward", "cpp"] >= 90 + penalties
            assert calls.get(second, 0) == penalties
            assert {call for call in calls if op in call[0]} <= {*kernels, second}
        else:
            assert not calls
        drawn.append(model.generate(4, generator=seeded(2)))
    actual, expected = (list(itertools.chain(*each)) for each in losses)
    assert len(actual) == 60
    assert actual == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert len(set(actual)) > 50
    torch.testing.assert_close(*drawn, rtol=1e-6, atol=1e-6)
