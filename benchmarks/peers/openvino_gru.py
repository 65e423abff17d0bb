"""OpenVINO's GRUSequence: `python -m benchmarks.peers.openvino_gru`, see worker.py."""

from __future__ import annotations

import numpy as np

from benchmarks.peers.gru import GRUCase, merged_bias, zrn
from benchmarks.peers.libraries import openvino_request
from benchmarks.peers.worker import Contestant, Unsupported, serve


def build(case: GRUCase) -> Contestant:
    if case.training:
        raise Unsupported("openvino has no gradients")
    import openvino
    from openvino import opset13 as ops

    values = case.values
    # The operator is batch first. Time first between two transposes is what the plugin runs
    # without any; batch first, openvino 2026.4.1 in bfloat16 gives wrong results or crashes for
    # most shapes.
    arguments = values["input"], np.ascontiguousarray(values["hx"][:, None])
    parameters = [ops.parameter(array.shape, np.float32) for array in arguments]
    x, hx = parameters
    sequence = ops.gru_sequence(
        ops.transpose(x, np.array([1, 0, 2])),
        hx,
        ops.constant(np.full(case.B, case.T, np.int64)),
        ops.constant(zrn(values["weight_ih"])[None]),
        ops.constant(zrn(values["weight_hh"])[None]),
        ops.constant(merged_bias(case).reshape(1, -1)),
        case.H,
        "forward",
        linear_before_reset=True,
    )
    output = ops.transpose(sequence.output(0), np.array([2, 1, 0, 3]))  # [T, 1, B, H]
    model = openvino.Model([output.output(0), sequence.output(1)], parameters, "gru")
    request, settings = openvino_request(model, case, arguments)

    def results() -> dict[str, np.ndarray]:
        return {
            "output": request.get_output_tensor(0).data[:, 0],
            "h_n": request.get_output_tensor(1).data[:, 0],
        }

    return Contestant(lambda: request.infer(share_outputs=True), results, settings)


if __name__ == "__main__":
    serve(GRUCase, build, "openvino")
