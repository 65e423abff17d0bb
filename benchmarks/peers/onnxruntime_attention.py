"""ONNX Runtime's MultiHeadAttention: `python -m benchmarks.peers.onnxruntime_attention`, see
worker.py."""

from __future__ import annotations

from benchmarks.peers.attention import AttentionCase, heads_inside
from benchmarks.peers.libraries import onnxruntime_step
from benchmarks.peers.worker import Contestant, Unsupported, serve


def build(case: AttentionCase) -> Contestant:
    if case.training:
        raise Unsupported("the onnxruntime package has no gradients")
    if case.dtype != "float32":
        raise Unsupported(f"onnxruntime's MultiHeadAttention for CPUs has no {case.dtype}")
    if case.bias:
        raise Unsupported("not written for onnxruntime with a bias")
    import onnx

    names = ("query", "key", "value")
    arguments = {name: heads_inside(case.values[name]) for name in names}  # [B, L, H, D]
    node = onnx.helper.make_node(
        "MultiHeadAttention",
        names,
        ["output"],
        domain="com.microsoft",
        num_heads=case.H,
        unidirectional=int(case.causal),
    )
    step, read, settings = onnxruntime_step(
        node,
        ("com.microsoft", 1),
        {name: array.reshape(case.B, -1, case.H * case.D) for name, array in arguments.items()},
        {"output": (case.B, case.L, case.H * case.D)},
        {},
        case,
    )
    shape = (case.B, case.L, case.H, case.D)
    return Contestant(
        step, lambda: {"output": heads_inside(read("output").reshape(shape))}, settings
    )


if __name__ == "__main__":
    serve(AttentionCase, build, "onnxruntime")
