"""ONNX Runtime's GRU operator: `python -m benchmarks.peers.onnxruntime_gru`, see worker.py."""

from __future__ import annotations

import numpy as np

from benchmarks.peers.gru import GRUCase, zrn
from benchmarks.peers.libraries import onnxruntime_step
from benchmarks.peers.worker import Contestant, Unsupported, serve


def build(case: GRUCase) -> Contestant:
    if case.training:
        raise Unsupported("the onnxruntime package has no gradients")
    if case.dtype != "float32":
        raise Unsupported(f"onnxruntime's GRU for CPUs has no {case.dtype}")
    import onnx

    values = case.values
    weights = {  # of one direction; the biases are Wb then Rb
        "W": zrn(values["weight_ih"])[None],
        "R": zrn(values["weight_hh"])[None],
        "bias": np.concatenate([zrn(values["bias_ih"]), zrn(values["bias_hh"])])[None],
    }
    arguments = {"X": values["input"], "initial_h": values["hx"][None]}
    shapes = {"Y": (case.T, 1, case.B, case.H), "Y_h": (1, case.B, case.H)}

    node = onnx.helper.make_node(
        "GRU",
        ["X", "W", "R", "bias", "", "initial_h"],
        ["Y", "Y_h"],
        hidden_size=case.H,
        linear_before_reset=1,
    )
    step, read, settings = onnxruntime_step(node, ("", 14), arguments, shapes, weights, case)
    return Contestant(
        step,
        results=lambda: {"output": read("Y")[:, 0], "h_n": read("Y_h")[0]},
        settings=settings,
    )


if __name__ == "__main__":
    serve(GRUCase, build, "onnxruntime")
