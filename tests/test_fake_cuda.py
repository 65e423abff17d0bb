"""Export and autocast of CUDA tensors where there is no GPU: fake ones, traced in one graph.

Under no_grad: a CPU build of PyTorch ends the process where a fake CUDA tensor requires a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import genkernels
from genkernels import nn, triton

CUDA = torch.device("cuda")
ATTENTION = "scaled_dot_product_attention"
RAW_OPS = {
    "gru": "gru_forward",
    "gru_cell": "gru_cell_forward",
    "bidirectional_gru": "bidirectional_gru_forward",
    ATTENTION: "attention_forward",
    "linear_cross_entropy": "linear_cross_entropy_pass",
}

pytestmark = pytest.mark.filterwarnings("ignore:genkernels", "ignore:PyTorch was compiled without")


class Call(torch.nn.Module):
    """A function as a module, which is what can be exported."""

    def __init__(self, function: Callable[..., Any], **settings: Any) -> None:
        super().__init__()
        self.function, self.settings = function, settings

    def forward(self, *args: Any) -> Any:
        return self.function(*args, **self.settings)


def loss(input: Tensor, weight: Tensor, bias: Tensor, target: Tensor, **settings: Any) -> Tensor:
    return genkernels.linear_cross_entropy(input, weight, target, linear_bias=bias, **settings)


def lengths(query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor) -> Tensor:
    return genkernels.scaled_dot_product_attention(query, key, value, key_lengths=key_lengths)


attention = partial(Call, genkernels.scaled_dot_product_attention)
QKV = [(2, 4, 33, 16)] * 3
GRU = [(4, 6), (18, 5), (18, 6), (18,), (18,)]
RNN = [(4, 6), (6, 5), (6, 6), (6,), (6,)]
INT, BOOL = torch.int64, torch.bool
LOSS = [(512, 256), (1000, 256), (1000,), (INT, 512)]
# The ops that a case runs, what is traced, and the shapes of its arguments.
CASES: dict[str, tuple[tuple[str, ...], Any, list[tuple[Any, ...]]]] = {
    "gru": (("gru",), lambda: Call(genkernels.gru), [(3, 4, 5), *GRU]),
    "gru, reverse": (("gru",), lambda: Call(genkernels.gru, reverse=True), [(3, 4, 5), *GRU]),
    "gru_cell": (("gru_cell",), lambda: Call(genkernels.gru_cell), [(4, 5), *GRU]),
    "rnn": (("rnn",), lambda: Call(genkernels.rnn), [(3, 4, 5), *RNN]),
    "attention": ((ATTENTION,), lambda: attention(), QKV),
    "attention, causal": ((ATTENTION,), lambda: attention(is_causal=True), QKV),
    "attention, lse": ((ATTENTION,), lambda: attention(return_lse=True), QKV),
    "attention, added mask": ((ATTENTION,), lambda: attention(), [*QKV, (2, 1, 33, 33)]),
    "attention, boolean mask": ((ATTENTION,), lambda: attention(), [*QKV, (BOOL, 33, 33)]),
    "attention, window": ((ATTENTION,), lambda: attention(window_size=(5, 2)), QKV),
    "attention, softcap": ((ATTENTION,), lambda: attention(softcap=3.0), QKV),
    "attention, lengths": ((ATTENTION,), lambda: Call(lengths), [*QKV, (INT, 2)]),
    "linear": (
        ("linear",),
        lambda: Call(genkernels.linear, activation="gelu"),
        [(7, 5), (9, 5), (9,)],
    ),
    "loss": (("linear_cross_entropy",), lambda: Call(loss), LOSS),
    "loss, rows": (
        ("linear_cross_entropy",),
        lambda: Call(loss, reduction="none"),
        LOSS,
    ),
    "nn.GRU": (("gru",), lambda: nn.GRU(5, 6, 2), [(3, 4, 5)]),
    "nn.GRU, both": (
        ("bidirectional_gru",),
        lambda: nn.GRU(5, 6, 2, bidirectional=True),
        [(3, 4, 5)],
    ),
    "nn.GRUCell": (("gru_cell",), lambda: nn.GRUCell(5, 6), [(4, 5)]),
    "nn.RNN, both": (("rnn",), lambda: nn.RNN(5, 6, 2, bidirectional=True), [(3, 4, 5)]),
    "nn.Linear": (("linear",), lambda: nn.Linear(5, 6), [(4, 5)]),
    "nn.MultiheadAttention": (
        (ATTENTION,),
        lambda: Call(nn.MultiheadAttention(16, 4, batch_first=True), need_weights=False),
        [(2, 7, 16)] * 3,
    ),
    "nn.TransformerEncoderLayer": (
        (ATTENTION,),
        lambda: nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True),
        [(2, 7, 16)],
    ),
    "nn.TransformerDecoderLayer": (
        (ATTENTION,),
        lambda: nn.TransformerDecoderLayer(16, 4, 32, batch_first=True),
        [(2, 7, 16), (2, 5, 16)],
    ),
}


@pytest.fixture(autouse=True)
def operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets and ~ of a fake CUDA tensor, at which a CPU build of PyTorch looks for a GPU, as the
    functions that they stand for."""

    def index(tensor: Tensor, key: Any) -> Tensor:
        keys = list(key) if isinstance(key, tuple) else [key]
        missing = tensor.dim() - sum(each is not None and each is not ... for each in keys)
        at = next((i for i, each in enumerate(keys) if each is ...), len(keys))
        keys[at : at + 1] = [slice(None)] * missing
        dim = 0
        for each in keys:
            if each is None:
                tensor = tensor.unsqueeze(dim)
            elif isinstance(each, slice):
                bounds = each.start, each.stop, each.step or 1
                tensor = torch.ops.aten.slice.Tensor(tensor, dim, *bounds)
            else:
                tensor = tensor.select(dim, each)
                dim -= 1
            dim += 1
        return tensor

    if not torch.cuda.is_available():
        monkeypatch.setattr(FakeTensor, "__getitem__", index)
        monkeypatch.setattr(FakeTensor, "__invert__", lambda mask: torch.bitwise_not(mask))


@pytest.fixture(params=[False, True], ids=["", "autocast"])
def autocast(request: pytest.FixtureRequest) -> Iterator[bool]:
    """What torch.autocast("cuda", torch.bfloat16) sets; without a GPU that sets nothing."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", request.param)
    yield request.param
    torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_one_graph(name: str, autocast: bool) -> None:
    ops, make, shapes = CASES[name]
    mode = FakeTensorMode()

    def fake(*shape: Any) -> Tensor:
        dtype, sizes = (shape[0], shape[1:]) if shape[0] in (INT, BOOL) else (None, shape)
        with mode:
            return torch.empty(sizes, dtype=dtype, device="cuda")

    # Parameters of fake CUDA tensors, as module.to("cuda") would have them.
    module = make().requires_grad_(False)._apply(lambda tensor: fake(*tensor.shape))
    torch._dynamo.reset()
    program = torch.export.export(module, tuple(fake(*s) for s in shapes), strict=True)
    targets = {str(node.target) for node in program.graph.nodes}
    for op in ops:
        if triton.obstacle(op, CUDA, torch.bfloat16 if autocast else torch.float32) is None:
            assert f"genkernels.{RAW_OPS.get(op, op)}.default" in targets
    outputs = [node.meta["val"] for node in program.graph.output_node().args[0] if node]
    assert {output.device.type for output in outputs} == {"cuda"}
    # A recurrent layer's outputs have its input's dtype; layer norms and losses are float32.
    wide = ("gru", "GRU", "rnn", "RNN", "Transformer", "loss")
    is_wide = not autocast or any(word in name for word in wide)
    expected = {torch.float32} if is_wide else {torch.bfloat16}
    if name == "attention, lse":
        expected |= {torch.float32}
    assert {output.dtype for output in outputs} == expected
