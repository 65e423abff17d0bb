"""keras.layers.GRU on TensorFlow: `python -m benchmarks.peers.keras_gru`, see worker.py."""

from __future__ import annotations

import numpy as np

from benchmarks.peers.gru import GRUCase, zrn
from benchmarks.peers.worker import Contestant, Unsupported, environment, serve


def build(case: GRUCase) -> Contestant:
    if case.dtype != "float32":
        raise Unsupported(f"not written for keras in {case.dtype}")
    settings = environment(
        KERAS_BACKEND="tensorflow",
        CUDA_VISIBLE_DEVICES="",
        TF_CPP_MIN_LOG_LEVEL=2,
        TF_ENABLE_ONEDNN_OPTS=1,  # with oneDNN's products and without XLA it is fastest
        TF_NUM_INTRAOP_THREADS=case.threads,
        TF_NUM_INTEROP_THREADS=1,
    )
    import keras
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(case.threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    values = case.values

    def batch_first(array: np.ndarray) -> np.ndarray:
        """Between torch's [T, B, ...] and the layer's [B, T, ...]."""
        return np.ascontiguousarray(array.swapaxes(0, 1))

    layer = keras.layers.GRU(case.H, reset_after=True, return_sequences=True, return_state=True)
    layer.build((case.B, case.T, case.I))
    layer.set_weights(
        [
            zrn(values["weight_ih"]).T,
            zrn(values["weight_hh"]).T,
            np.stack([zrn(values["bias_ih"]), zrn(values["bias_hh"])]),
        ]
    )
    # Arguments, not constants that the graph could be simplified with.
    x, hx = tf.constant(batch_first(values["input"])), tf.constant(values["hx"])
    cotangents = [tf.constant(batch_first(values["cotangent"])), tf.constant(values["cotangent_h"])]

    @tf.function
    def forward(x, hx):
        return layer(x, initial_state=hx)

    @tf.function
    def train(x, hx, cotangents):
        with tf.GradientTape() as tape:
            tape.watch([x, hx])
            outputs = layer(x, initial_state=hx, training=True)
        sources = [x, hx, *layer.trainable_variables]
        return *outputs, *tape.gradient(outputs, sources, output_gradients=cotangents)

    kept: list[np.ndarray] = []

    def step() -> None:
        tensors = train(x, hx, cotangents) if case.training else forward(x, hx)
        kept[:] = [tensor.numpy() for tensor in tensors]  # waits; does not copy

    def results() -> dict[str, np.ndarray]:
        named = {"output": batch_first(kept[0]), "h_n": kept[1]}
        if case.training:
            dx, dh, kernel, recurrent, bias = kept[2:]
            named |= {
                "grad of input": batch_first(dx),
                "grad of hx": dh,
                "grad of weight_ih": zrn(kernel.T),
                "grad of weight_hh": zrn(recurrent.T),
                "grad of bias_ih": zrn(bias[0]),
                "grad of bias_hh": zrn(bias[1]),
            }
        return named

    return Contestant(step, results, settings)


if __name__ == "__main__":
    serve(GRUCase, build, "keras", "tensorflow-cpu")
