"""The other libraries that ops are compared with: right where they run, refused where wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_attention import Shape
from benchmarks.peers import check, peer
from benchmarks.peers.op import ATTENTION, GRU, Op
from benchmarks.workers import Failure

SHAPES: dict[str, tuple[Any, ...]] = {
    "gru": ((5, 3, 7, 9), (3, 1, 16, 32), (1, 4, 1, 1)),  # T, B, I, H
    "attention": (
        Shape(2, 3, 17, 17, 8, causal=True),
        Shape(1, 2, 5, 33, 16),
        Shape(1, 1, 1, 1, 8),
    ),
}
CASES = [
    ("forward", torch.float32),
    ("forward", torch.bfloat16),
    ("forward+backward", torch.float32),
    ("forward+backward", torch.bfloat16),
]
NO_GRADIENTS = {"onnxruntime", "openvino"}
BFLOAT16 = {
    ("gru", "onednn", "forward"),
    ("gru", "openvino", "forward"),
    ("attention", "openvino", "forward"),
    ("attention", "jax", "forward"),
    ("attention", "jax", "forward+backward"),
}


@pytest.fixture(
    scope="module",
    params=[(op, name) for op in (GRU, ATTENTION) for name in op.peers],
    ids=lambda pair: f"{pair[0].name}-{pair[1]}",
)
def contestant(request: pytest.FixtureRequest) -> Iterator[peer.Peer]:
    op, name = request.param
    reason = peer.missing(name)
    if reason:
        pytest.skip(reason)
    with peer.Peer(name, threads=2, op=op) as started:
        yield started


@pytest.mark.parametrize(("direction", "dtype"), CASES)
def test_contestant_is_right(contestant: peer.Peer, direction: str, dtype: torch.dtype) -> None:
    op, name = contestant.op, contestant.name
    shape = SHAPES[op.name][0]
    supported = not (direction != "forward" and name in NO_GRADIENTS) and not (
        dtype == torch.bfloat16 and (op.name, name, direction) not in BFLOAT16
    )
    if not supported:
        with pytest.raises(peer.Unsupported):
            contestant.setup(shape, direction, dtype)
        with pytest.raises(Failure, match="not timed before"):
            contestant.seconds(1)
        return
    try:
        verdict = contestant.setup(shape, direction, dtype)
    except peer.Unsupported as reason:
        if dtype == torch.float32:
            raise
        pytest.skip(f"{name} on this CPU: {reason}")
    assert verdict.errors.keys() == op.expected(shape, direction, dtype).keys()
    assert contestant.settings
    assert contestant.version
    assert contestant.seconds(calls=2) > 0


def test_setup_replaces_the_case_before(contestant: peer.Peer) -> None:
    for shape in SHAPES[contestant.op.name]:
        contestant.setup(shape, "forward", torch.float32)
        assert contestant.seconds(calls=1) > 0


@pytest.fixture(params=[GRU, ATTENTION], ids=lambda op: op.name)
def op(request: pytest.FixtureRequest) -> Op:
    return request.param


def plain_results(op: Op, direction: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """PyTorch's own results, as a contestant hands them over."""
    expected = op.expected(SHAPES[op.name][0], direction, dtype)
    # Contiguous, as arrays are: PyTorch's gradients of attention are not.
    return {
        name: plain.detach().float().contiguous().clone() for name, (plain, _) in expected.items()
    }


def check_one(
    op: Op, name: str, results: dict[str, Tensor], direction: str, dtype: torch.dtype
) -> check.Verdict:
    return check.check(name, results, op.expected(SHAPES[op.name][0], direction, dtype), dtype)


@pytest.mark.parametrize(("direction", "dtype"), CASES)
def test_check_accepts_plain_pytorch(op: Op, direction: str, dtype: torch.dtype) -> None:
    verdict = check_one(op, "torch", plain_results(op, direction, dtype), direction, dtype)
    assert verdict.parity
    assert all(error < check.WRONG[dtype] for error in verdict.errors.values())


@pytest.mark.parametrize(("direction", "dtype"), CASES)
def test_check_refuses_one_wrong_element(op: Op, direction: str, dtype: torch.dtype) -> None:
    for name, tensor in plain_results(op, direction, dtype).items():
        for wrong in (2 * check.WRONG[dtype] * tensor.abs().max().item(), float("nan")):
            results = plain_results(op, direction, dtype)
            results[name].view(-1)[-1] += wrong
            with pytest.raises(check.Wrong, match=f"contestant, {name}: largest error"):
                check_one(op, "contestant", results, direction, dtype)


def test_check_reports_what_breaks_parity(op: Op) -> None:
    results = plain_results(op, "forward", torch.float32)
    results["output"].view(-1)[0] += 1e-4
    verdict = check_one(op, "contestant", results, "forward", torch.float32)
    assert not verdict.parity
    assert verdict.errors["output"] > 1e-5


def test_check_refuses_missing_and_misshapen_results(op: Op) -> None:
    results = plain_results(op, "forward", torch.float32)
    wrong = {**results, "output": results["output"].transpose(0, 1)}
    with pytest.raises(check.Wrong, match="shape"):
        check_one(op, "contestant", wrong, "forward", torch.float32)
    del results["output"]
    with pytest.raises(check.Wrong, match="expected"):
        check_one(op, "contestant", results, "forward", torch.float32)


def test_a_wrong_contestant_is_not_timed(
    contestant: peer.Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, op = SHAPES[contestant.op.name][0], contestant.op
    with monkeypatch.context() as patch:
        # Another argument than the one that the reference computes with.
        values = op.draw(shape, torch.float32)
        changed = {"gru": "hx", "attention": "value"}[op.name]
        values[changed] = values[changed] + 0.1
        patch.setattr(contestant, "op", dataclasses.replace(op, draw=lambda *_: values))
        with pytest.raises(check.Wrong, match=contestant.name):
            contestant.setup(shape, "forward", torch.float32)
    with pytest.raises(Failure, match="not timed before"):
        contestant.seconds(1)


def test_missing_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "_installed", lambda: frozenset({"onnx"}))
    assert peer.missing("openvino") == "openvino is not installed in .venv-peers: make peers"
    assert peer.missing("onnxruntime") == "onnxruntime is not installed in .venv-peers: make peers"
    with pytest.raises(Failure, match="jax is not installed"):
        peer.Peer("jax", threads=1)


def test_a_worker_that_ended_is_a_failure() -> None:
    available = [name for name in GRU.peers if peer.missing(name) is None]
    if not available:
        pytest.skip("no library is installed in .venv-peers: make peers")
    with peer.Peer(available[0], threads=1) as started:
        started.process.kill()
        started.process.wait()
        with pytest.raises(Failure, match="ended early"):
            started.setup(SHAPES["gru"][0], "forward", torch.float32)
