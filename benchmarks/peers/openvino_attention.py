"""OpenVINO's ScaledDotProductAttention: `python -m benchmarks.peers.openvino_attention`, see
worker.py."""

from __future__ import annotations

import numpy as np

from benchmarks.peers.attention import AttentionCase
from benchmarks.peers.libraries import openvino_request
from benchmarks.peers.worker import Contestant, Unsupported, serve


def build(case: AttentionCase) -> Contestant:
    if case.training:
        raise Unsupported("openvino has no gradients")
    if case.bias:
        raise Unsupported("not written for openvino with a bias")
    import openvino
    from openvino import opset13 as ops

    arguments = [case.values[name] for name in ("query", "key", "value")]
    parameters = [ops.parameter(array.shape, np.float32) for array in arguments]
    output = ops.scaled_dot_product_attention(*parameters, causal=case.causal)
    model = openvino.Model([output.output(0)], parameters, "attention")
    request, settings = openvino_request(model, case, arguments)
    return Contestant(
        lambda: request.infer(share_outputs=True),
        lambda: {"output": request.get_output_tensor(0).data},
        settings,
    )


if __name__ == "__main__":
    serve(AttentionCase, build, "openvino")
