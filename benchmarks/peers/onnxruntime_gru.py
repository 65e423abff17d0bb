"""ONNX Runtime's GRU operator: `python -m benchmarks.peers.onnxruntime_gru`, see worker.py."""

from __future__ import annotations

import numpy as np

from benchmarks.peers.worker import Case, Contestant, Unsupported, serve, zrn


def build(case: Case) -> Contestant:
    if case.training:
        raise Unsupported("the onnxruntime package has no gradients")
    if case.dtype != "float32":
        raise Unsupported(f"onnxruntime's GRU for CPUs has no {case.dtype}")
    import onnx
    import onnxruntime

    values, helper = case.values, onnx.helper
    weights = {  # of one direction; the biases are Wb then Rb
        "W": zrn(values["weight_ih"])[None],
        "R": zrn(values["weight_hh"])[None],
        "bias": np.concatenate([zrn(values["bias_ih"]), zrn(values["bias_hh"])])[None],
    }
    arguments = {"X": values["input"], "initial_h": values["hx"][None]}
    shapes = {"Y": (case.T, 1, case.B, case.H), "Y_h": (1, case.B, case.H)}

    def declare(shapes: dict[str, tuple[int, ...]]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
            for name, shape in shapes.items()
        ]

    node = helper.make_node(
        "GRU",
        ["X", "W", "R", "bias", "", "initial_h"],
        ["Y", "Y_h"],
        hidden_size=case.H,
        linear_before_reset=1,
    )
    graph = helper.make_graph(
        [node],
        "gru",
        declare({name: array.shape for name, array in arguments.items()}),
        declare(shapes),
        # Initializers are constants: the session packs them once.
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    # Of the versions that this onnx writes, one that any recent runtime reads.
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8, producer_name="genkernels"
    )
    onnx.checker.check_model(model)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    # Threads that sleep between the steps of a sequence wait for the scheduler when anything else
    # runs, so they spin, but only while a run lasts: in another contestant's turn they sleep.
    entries = {"session.intra_op.allow_spinning": "1", "session.force_spinning_stop": "1"}
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    for name, array in arguments.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    outputs = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
        for name, shape in shapes.items()
    }
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, value)
    return Contestant(
        step=lambda: session.run_with_iobinding(binding),
        results=lambda: {
            "output": outputs["Y"].numpy()[:, 0],
            "h_n": outputs["Y_h"].numpy()[0],
        },
        settings={"intra_op_num_threads": str(case.threads), **entries},
    )


if __name__ == "__main__":
    serve(build, "onnxruntime")
