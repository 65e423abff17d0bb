"""How each library is run at its best, whatever the op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.peers.worker import Array, Case, Unsupported, environment


def jax_environment(case: Case) -> dict[str, str]:
    """To be called before jax is imported."""
    return environment(
        JAX_PLATFORMS="cpu",
        NPROC=case.threads,  # the size of the CPU client's pool of threads
        XLA_FLAGS=f"--xla_cpu_multi_thread_eigen={str(case.threads > 1).lower()}",
    )


def openvino_request(
    model: Any, case: Case, arguments: Sequence[Any]
) -> tuple[Any, dict[str, str]]:
    """A request that infers `arguments`, openvino's tensors or arrays, and the settings."""
    import openvino

    core = openvino.Core()
    if case.dtype == "bfloat16" and "BF16" not in core.get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    ):
        raise Unsupported("openvino computes in bfloat16 only on a CPU that has its instructions")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(case.threads),
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[case.dtype],
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    for index, array in enumerate(arguments):
        request.set_input_tensor(index, openvino.Tensor(array, shared_memory=True))
    return request, settings


def onnxruntime_step(
    node: Any,
    domain: tuple[str, int],
    arguments: Mapping[str, Array],
    shapes: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, Array],
    case: Case,
) -> tuple[Callable[[], object], Callable[[str], Array], dict[str, str]]:
    """A call of one node, what reads its outputs by name, and the settings.

    `shapes` are those of the outputs; `weights` are constants, which the session packs once.
    """
    import onnx
    import onnxruntime

    def declare(shapes: Mapping[str, tuple[int, ...]]) -> list[Any]:
        return [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
            for name, shape in shapes.items()
        ]

    graph = onnx.helper.make_graph(
        [node],
        "op",
        declare({name: array.shape for name, array in arguments.items()}),
        declare(shapes),
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    # Of the versions that this onnx writes, one that any recent runtime reads.
    opsets = dict([("", 14), domain])
    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid(*opset) for opset in opsets.items()],
        ir_version=8,
        producer_name="genkernels",
    )
    onnx.checker.check_model(model)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    # Threads that sleep within a run, as between the steps of a sequence, wait for the scheduler
    # when anything else runs, so they spin, but only while a run lasts: in another contestant's
    # turn they sleep.
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
    return (
        lambda: session.run_with_iobinding(binding),
        lambda name: outputs[name].numpy(),
        {"intra_op_num_threads": str(case.threads), **entries},
    )
