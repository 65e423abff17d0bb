"""Packed weights that are kept from call to call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import genkernels
from genkernels import backend

MODULES: dict[str, Callable[..., nn.Module]] = {
    "GRU": lambda **options: genkernels.nn.GRU(17, 33, num_layers=2, bidirectional=True, **options),
    "GRUCell": lambda **options: genkernels.nn.GRUCell(17, 33, **options),
}
each_module = pytest.mark.parametrize("name", MODULES)


def inputs(name: str, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (20, batch, 17) if name == "GRU" else (batch, 17)
    return torch.randn(shape, generator=generator).to(dtype)


def outputs(module: nn.Module, input: Tensor) -> list[Tensor]:
    with torch.no_grad():
        result = module(input)
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.usefixtures("simd", "poisoned_memory", "compiled_only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("batch", [1, 5, 40])
@each_module
def test_same_results(name: str, batch: int, bias: bool, dtype: torch.dtype) -> None:
    """Bit for bit, frozen and not."""
    module = MODULES[name](bias=bias, dtype=dtype)
    input = inputs(name, batch, dtype)
    expected = outputs(module, input)
    assert genkernels.freeze(module) is module
    assert all(map(torch.equal, outputs(module, input), expected))
    assert genkernels.unfreeze(module) is module
    assert all(map(torch.equal, outputs(module, input), expected))


@pytest.mark.parametrize("batch", [3, 40])
def test_packed_weights_are_used(batch: int) -> None:
    """Weights written past every check leave a frozen module as it was."""
    module = genkernels.freeze(genkernels.nn.GRU(17, 33))
    input = inputs("GRU", batch)
    expected = outputs(module, input)
    module.weight_hh_l0.data.zero_()
    assert all(map(torch.equal, outputs(module, input), expected))
    genkernels.unfreeze(module)
    assert not torch.equal(outputs(module, input)[0], expected[0])


def in_place(module: nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).mul_(2)


def replaced(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(parameter.detach().clone()))


@pytest.mark.parametrize(
    "change",
    [in_place, replaced, lambda module: module.load_state_dict(module.state_dict())],
    ids=["in_place", "replaced", "load_state_dict"],
)
@each_module
def test_changed_weights_raise(name: str, change: Callable[[nn.Module], Any]) -> None:
    module = genkernels.freeze(MODULES[name]())
    change(module)
    with pytest.raises(RuntimeError, match=r"weights.* changed after freeze\(\)"):
        outputs(module, inputs(name, 40))
    expected = outputs(genkernels.unfreeze(module), inputs(name, 40))
    assert all(map(torch.equal, outputs(genkernels.freeze(module), inputs(name, 40)), expected))


@each_module
def test_gradients_raise(name: str) -> None:
    module = genkernels.freeze(MODULES[name]())
    with pytest.raises(RuntimeError, match="no gradients"):
        module(inputs(name, 40))
    result = genkernels.unfreeze(module)(inputs(name, 40))
    (result if isinstance(result, Tensor) else result[0]).sum().backward()


@each_module
def test_transforms_need_no_gradients(name: str) -> None:
    """torch.func runs over weights that are given anyway."""
    module = MODULES[name]()
    stacked = torch.stack([inputs(name, 40), inputs(name, 40).flip(0)])
    with torch.no_grad():
        expected = torch.func.vmap(module)(stacked)
        actual = torch.func.vmap(genkernels.freeze(module))(stacked)
    for got, value in zip(
        (actual,) if name == "GRUCell" else actual,
        (expected,) if name == "GRUCell" else expected,
        strict=True,
    ):
        assert torch.equal(got, value)


@each_module
def test_inference_tensors(name: str) -> None:
    with torch.inference_mode():
        module = MODULES[name]()
        expected = outputs(module, inputs(name, 40))
        frozen = outputs(genkernels.freeze(module), inputs(name, 40))
    assert all(map(torch.equal, frozen, expected))


@each_module
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_not_frozen(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    module = genkernels.freeze(MODULES[name]())
    other = copied(module)
    assert other._packed is None
    assert module._packed is not None
    expected = outputs(module, inputs(name, 40))
    assert all(map(torch.equal, outputs(other, inputs(name, 40)), expected))


@each_module
def test_state_dict_stays(name: str) -> None:
    module = MODULES[name]()
    before = list(module.state_dict())
    assert list(genkernels.freeze(module).state_dict()) == before


@each_module
def test_autocast(name: str) -> None:
    """In autocast's dtype the packed weights are of no use."""
    module = MODULES[name]()
    with torch.autocast("cpu", torch.bfloat16):
        expected = outputs(module, inputs(name, 40))
        frozen = outputs(genkernels.freeze(module), inputs(name, 40))
    assert all(map(torch.equal, frozen, expected))


@each_module
def test_compile(name: str) -> None:
    module = genkernels.freeze(MODULES[name]())
    expected = outputs(module, inputs(name, 40))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    genkernels.stats(reset=True)
    assert all(map(torch.equal, outputs(compiled, inputs(name, 40)), expected))
    assert {name for _, name in genkernels.stats(reset=True)} == {"cpp"}


def test_inside_a_module() -> None:
    model = nn.Sequential(nn.Linear(3, 17), genkernels.nn.GRU(17, 33))
    genkernels.freeze(model)
    assert model[1]._packed is not None
    genkernels.unfreeze(model)
    assert model[1]._packed is None


def test_nothing_to_freeze() -> None:
    with pytest.raises(ValueError, match=r"genkernels\.nn\.GRU.*got Linear"):
        genkernels.freeze(nn.Linear(3, 4))


def test_no_kernel_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_warned", set())
    with pytest.raises(RuntimeError, match="compiled CPU kernel"), pytest.warns(match="no kernel"):
        genkernels.freeze(genkernels.nn.GRU(3, 4, dtype=torch.float16))
    with genkernels.use_backend("reference"), pytest.raises(RuntimeError, match="compiled"):
        genkernels.freeze(genkernels.nn.GRU(3, 4))


def test_another_simd_level_raises() -> None:
    levels = backend.simd_levels()
    if len(levels) < 2:
        pytest.skip("one SIMD level only: none to change to")
    with backend.use_simd(levels[0]):
        module = genkernels.freeze(genkernels.nn.GRU(17, 33))
    with pytest.raises(RuntimeError, match="changed after freeze"):
        outputs(module, inputs("GRU", 40))


@pytest.mark.parametrize("packed", ["short", "of_other_sizes", "of_float32", "of_zeros"])
def test_raw_op_checks_what_is_packed(packed: str) -> None:
    module = genkernels.nn.GRU(17, 33)
    weights = tuple(module.parameters())
    pack = torch.ops.genkernels.gru_pack
    other = {
        "short": lambda: pack(*weights)[:-1],
        "of_other_sizes": lambda: pack(*genkernels.nn.GRU(33, 17).parameters()),
        "of_float32": lambda: pack(*weights).float(),
        "of_zeros": lambda: torch.zeros_like(pack(*weights)),
    }[packed]()
    args = (torch.randn(20, 4, 17), torch.zeros(4, 33), *weights, None, None, False, False)
    with torch.no_grad(), pytest.raises(RuntimeError, match="packed: expected"):
        torch.ops.genkernels.gru_forward(*args, other)
