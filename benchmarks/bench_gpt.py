"""A training step of a GPT on the fused ops beside the same model in plain PyTorch: `pytest
benchmarks -k gpt`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from genkernels.models.gpt import GPT, GPTConfig

from .bench_gru import DTYPES


class Recipe(NamedTuple):
    """A model, and how many sequences a step has."""

    name: str
    config: GPTConfig
    batch_size: int


# Of nanoGPT's README, "I only have a macbook (or other cheap computer)"; and its first GPU recipe
# with a third of the batch. Both read characters, of which Shakespeare has 65.
NANO = Recipe("GPT 4 layers, width 128, T=64, B=12", GPTConfig(65, 64, 4, 4, 128), 12)
MIDDLE = Recipe("GPT 6 layers, width 384, T=256, B=8", GPTConfig(65, 256, 6, 6, 384), 8)
MIDDLE_DROPOUT = Recipe(
    "GPT 6 layers, width 384, T=256, B=8, dropout 0.2",
    GPTConfig(65, 256, 6, 6, 384, dropout=0.2),
    8,
)
RECIPES = (NANO, MIDDLE, MIDDLE_DROPOUT)


def compiled(config: GPTConfig) -> nn.Module:
    model = GPT(config, fused=False)
    model.loss = torch.compile(model.loss)  # type: ignore[method-assign]
    return model


CONTESTANTS: dict[str, Callable[[GPTConfig], nn.Module]] = {
    "genkernels": GPT,
    "torch": functools.partial(GPT, fused=False),
    "torch.compile": compiled,
}


def make_step(
    make_model: Callable[[GPTConfig], Any], recipe: Recipe, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """One step of AdamW, from the same weights and tokens whatever the model; returns the loss.
    bfloat16 is autocast of float32 weights."""
    torch.manual_seed(0)
    model = make_model(recipe.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    shape = (recipe.batch_size, recipe.config.context_length + 1)
    tokens = torch.randint(
        recipe.config.vocab_size, shape, generator=torch.Generator().manual_seed(1)
    )
    input, target = tokens[:, :-1], tokens[:, 1:]
    is_autocast = dtype == torch.bfloat16

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype) if is_autocast else contextlib.nullcontext():
            loss, _ = model.loss(input, target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def flops(recipe: Recipe) -> float:
    """Multiply-adds of the products of a step, each two; those of attention below the diagonal."""
    C, tokens = recipe.config, recipe.batch_size * recipe.config.context_length
    weights = C.num_layers * 12 * C.embedding_dim**2 + C.vocab_size * C.embedding_dim
    # Two products forward and five backward, of half of the scores.
    attention = C.num_layers * 7 * tokens * C.context_length * C.embedding_dim
    return 6.0 * weights * tokens + attention


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name.replace(" ", "-"))
def test_gpt(benchmark: Any, recipe: Recipe, dtype: torch.dtype, contestant: str) -> None:
    step = make_step(CONTESTANTS[contestant], recipe, dtype)
    losses = [step().item() for _ in range(2)]
    plain = make_step(CONTESTANTS["torch"], recipe, dtype)
    # Other random numbers where there is dropout; bfloat16 has 8 bits.
    allowed = 0.02 if recipe.config.dropout else 1e-4 if dtype == torch.float32 else 1e-2
    assert losses == pytest.approx([plain().item() for _ in range(2)], rel=allowed)
    benchmark.group = f"{recipe.name}, {str(dtype).removeprefix('torch.')}"
    benchmark(step)
    if benchmark.stats is not None:
        rate = flops(recipe) / benchmark.stats.stats.median / 1e9
        benchmark.extra_info.update(contestant=contestant, gflops_of_a_step=rate)
