"""benchmarks/models.py of the adversarial models, at tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import adversarial, models
from genkernels.models import GAN, GANConfig, RecurrentGAN, RecurrentGANConfig
from genkernels.models import gan as gan_module
from genkernels.models import recurrent_gan as recurrent_gan_module
from genkernels.training import AdversarialConfig

IMAGES = GANConfig(8, num_classes=2, latent_dim=4, width=8, num_heads=2, spectral_norm=False)
SERIES = RecurrentGANConfig(6, channels=2, num_classes=2, latent_dim=3, hidden_size=8)
TRAINING = AdversarialConfig(loss="wgan-gp", batch_size=8, discriminator_steps=2, steps=1)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        "gan": [
            adversarial.Case("images", GAN, IMAGES, TRAINING, 0.0),
            adversarial.Case("images again", GAN, IMAGES, TRAINING, 1e9),
        ],
        "recurrent-gan": [adversarial.Case("series", RecurrentGAN, SERIES, TRAINING, 0.0)],
    }
    monkeypatch.setattr(adversarial, "CASES", cases)
    monkeypatch.setattr(adversarial, "SECONDS", 0.0)


def test_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert models.main(["--model", "gan", "--rounds", "1", "--save", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| images", "| images again"]
    assert [line.split(": ")[-1] for line in lines[4:]] == ["met", "MISSED"]
    (file,) = tmp_path.iterdir()
    assert file.name == "gan.json"
    row = json.loads(file.read_text(encoding="utf-8"))["rows"]["images"]
    seconds = row["seconds"]
    assert row["bar"]["reached"] == seconds["torch"] / seconds["genkernels"] > 0
    assert 0 < row["kernels"] < 1


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input: Tensor) -> Tensor:
        return input.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.roll(1, 2)


class WrongGRU(nn.GRU):
    def forward(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        output, hx = super().forward(*args)
        return WrongGradient.apply(output), hx


def test_what_is_wrong_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = gan_module.PLAIN.attention
    wrong = gan_module.FUSED._replace(attention=lambda *args, **kw: 1.1 * plain(*args, **kw))
    monkeypatch.setattr(gan_module, "FUSED", wrong)
    monkeypatch.setattr(recurrent_gan_module, "GRU", WrongGRU)
    for model, case in (("gan", "images"), ("recurrent-gan", "series")):
        assert models.main(["--model", model, "--rounds", "1"]) == 2
        output, errors = capsys.readouterr()
        assert not output
        assert f"models: {case}, genkernels: the loss of step 1 is" in errors.splitlines()[-1]


def test_random_numbers_are_of_float32() -> None:
    torch.manual_seed(0)
    expected = [torch.randn(20), torch.rand(20)]
    torch.manual_seed(0)
    with adversarial.DrawnInFloat32():
        drawn = [draw(20, dtype=torch.float64) for draw in (torch.randn, torch.rand)]
    for one, other in zip(drawn, expected, strict=True):
        torch.testing.assert_close(one, other.double(), rtol=0, atol=0)


@pytest.mark.parametrize("options", [["--threads", "0"], ["--rounds", "0"], ["--model", "gpt"]])
def test_refuses(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        models.main(options)
    assert end.value.code == 2
    assert options[0] in capsys.readouterr().err
