"""What the tests of the Transformers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from genkernels.data import Batches
from genkernels.training import TrainingConfig
from genkernels.training.loop import make_optimizer

# torch.nn.TransformerEncoderLayer's names, and those of a block.
_NAMES = {
    "self_attn.in_proj_": "attention.qkv.",
    "self_attn.out_proj.": "attention.projection.",
    "linear1.": "mlp.expansion.",
    "linear2.": "mlp.projection.",
    "norm1.": "norm1.",
    "norm2.": "norm2.",
}


def as_torch_layer(block: nn.Module, width: int, heads: int, norm_first: bool) -> nn.Module:
    """PyTorch's own layer with the weights of a block."""
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=norm_first
    )
    ours = block.state_dict()
    layer.load_state_dict(
        {a + end: ours[b + end] for a, b in _NAMES.items() for end in ("weight", "bias")}
    )
    return layer


def perturb(model: nn.Module, deviation: float) -> None:
    """Away from initial values, which are so small that little of a model is seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(deviation * torch.randn(parameter.shape))


def training_losses(model: Any, batches: Batches, steps: int, learning_rate: float) -> list[float]:
    optimizer = make_optimizer(model, TrainingConfig(learning_rate=learning_rate, steps=steps))
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss, state = model.loss(*batches.batch(step))
        assert state is None
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_model(model: Any, twin: Any, *batch: Tensor, **lengths: Tensor) -> None:
    """Of the same names and initial values; then with other weights, given both ways, the same loss
    and gradients."""
    assert model.state_dict().keys() == twin.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name]), "one seed, one initial value"
    perturb(model, 0.1)
    twin.load_state_dict(model.state_dict())
    model.load_state_dict(twin.state_dict())
    losses = [m.loss(*batch, **lengths)[0] for m in (model, twin)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    gradients = [{name: p.grad for name, p in m.named_parameters()} for m in (model, twin)]
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, gradients[1][name], msg=lambda m, n=name: f"{n}: {m}")
