"""The other libraries that the GRU is compared with: right where they run, refused where wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.bench_gru import GRADIENTS, OUTPUTS, make_step
from benchmarks.peers import check, peer
from benchmarks.workers import Failure

SHAPE = (5, 3, 7, 9)  # T, B, I, H
CASES = [
    ("forward", torch.float32),
    ("forward", torch.bfloat16),
    ("forward+backward", torch.float32),
]
NO_GRADIENTS = {"onnxruntime", "openvino"}
BFLOAT16 = {"onednn", "openvino"}


@pytest.fixture(scope="module", params=peer.NAMES)
def contestant(request: pytest.FixtureRequest) -> Iterator[peer.Peer]:
    reason = peer.missing(request.param)
    if reason:
        pytest.skip(reason)
    with peer.Peer(request.param, threads=2) as started:
        yield started


@pytest.mark.parametrize(("direction", "dtype"), CASES)
def test_contestant_is_right(contestant: peer.Peer, direction: str, dtype: torch.dtype) -> None:
    supported = not (direction != "forward" and contestant.name in NO_GRADIENTS) and not (
        dtype == torch.bfloat16 and contestant.name not in BFLOAT16
    )
    if not supported:
        with pytest.raises(peer.Unsupported):
            contestant.setup(SHAPE, direction, dtype)
        with pytest.raises(Failure, match="not timed before"):
            contestant.seconds(1)
        return
    try:
        verdict = contestant.setup(SHAPE, direction, dtype)
    except peer.Unsupported as reason:
        if dtype == torch.float32:
            raise
        pytest.skip(f"{contestant.name} on this CPU: {reason}")
    assert len(verdict.errors) == (2 if direction == "forward" else 8)
    assert contestant.settings
    assert contestant.version
    assert contestant.seconds(calls=2) > 0


def test_setup_replaces_the_case_before(contestant: peer.Peer) -> None:
    for shape in (SHAPE, (3, 1, 16, 32), (1, 4, 1, 1)):
        contestant.setup(shape, "forward", torch.float32)
        assert contestant.seconds(calls=1) > 0


def plain_results(direction: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """PyTorch's own results, as a contestant hands them over."""
    names = OUTPUTS if direction == "forward" else (*OUTPUTS, *(f"grad of {n}" for n in GRADIENTS))
    tensors = (
        tensor.detach().float() for tensor in make_step(torch.nn.GRU, SHAPE, direction, dtype)()
    )
    return {
        name: tensor.squeeze(0) if name in check.STATES else tensor
        for name, tensor in zip(names, tensors, strict=True)
    }


@pytest.mark.parametrize(("direction", "dtype"), CASES)
def test_check_accepts_plain_pytorch(direction: str, dtype: torch.dtype) -> None:
    verdict = check.check("torch", plain_results(direction, dtype), SHAPE, direction, dtype)
    assert verdict.parity
    assert all(error < check.WRONG[dtype] for error in verdict.errors.values())


@pytest.mark.parametrize(("direction", "dtype"), CASES)
def test_check_refuses_one_wrong_element(direction: str, dtype: torch.dtype) -> None:
    for name, tensor in plain_results(direction, dtype).items():
        for wrong in (2 * check.WRONG[dtype] * tensor.abs().max().item(), float("nan")):
            results = plain_results(direction, dtype)
            results[name].view(-1)[-1] += wrong
            with pytest.raises(check.Wrong, match=f"contestant, {name}: largest error"):
                check.check("contestant", results, SHAPE, direction, dtype)


def test_check_reports_what_breaks_parity() -> None:
    results = plain_results("forward", torch.float32)
    results["h_n"].view(-1)[0] += 1e-4
    verdict = check.check("contestant", results, SHAPE, "forward", torch.float32)
    assert not verdict.parity
    assert verdict.errors["h_n"] > 1e-5


def test_check_refuses_missing_and_misshapen_results() -> None:
    results = plain_results("forward", torch.float32)
    with pytest.raises(check.Wrong, match="shape"):
        check.check(
            "contestant",
            {**results, "output": results["output"].transpose(0, 1)},
            SHAPE,
            "forward",
            torch.float32,
        )
    del results["h_n"]
    with pytest.raises(check.Wrong, match="expected"):
        check.check("contestant", results, SHAPE, "forward", torch.float32)


def test_a_wrong_contestant_is_not_timed(
    contestant: peer.Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        # Another hidden state than the one that the reference starts from.
        values = peer.draw(SHAPE, torch.float32)
        patch.setattr(peer, "draw", lambda *_: {**values, "hx": values["hx"] + 0.1})
        with pytest.raises(check.Wrong, match=contestant.name):
            contestant.setup(SHAPE, "forward", torch.float32)
    with pytest.raises(Failure, match="not timed before"):
        contestant.seconds(1)


def test_missing_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "_installed", lambda: frozenset({"onnx"}))
    assert peer.missing("openvino") == "openvino is not installed in .venv-peers: make peers"
    assert peer.missing("onnxruntime") == "onnxruntime is not installed in .venv-peers: make peers"
    with pytest.raises(Failure, match="jax is not installed"):
        peer.Peer("jax", threads=1)


def test_a_worker_that_ended_is_a_failure() -> None:
    available = [name for name in peer.NAMES if peer.missing(name) is None]
    if not available:
        pytest.skip("no library is installed in .venv-peers: make peers")
    with peer.Peer(available[0], threads=1) as started:
        started.process.kill()
        started.process.wait()
        with pytest.raises(Failure, match="ended early"):
            started.setup(SHAPE, "forward", torch.float32)
