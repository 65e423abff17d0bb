"""The program of benchmarks.models in Keras on TensorFlow: `python -m
benchmarks.peers.keras_model`.

It reports no parts and no ops: a step is one graph. See serve_program.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import numpy as np

from benchmarks.peers.gru import zrn
from benchmarks.peers.worker import environment
from benchmarks.workers import serve_program


class KerasProgram:
    def __init__(self, options: dict[str, Any]) -> None:
        if options["dtype"] != "float32":
            raise ValueError(f"not written for keras in {options['dtype']}")
        environment(
            KERAS_BACKEND="tensorflow",
            CUDA_VISIBLE_DEVICES="",
            TF_CPP_MIN_LOG_LEVEL=2,
            TF_ENABLE_ONEDNN_OPTS=1,
            TF_NUM_INTRAOP_THREADS=options["threads"],
            TF_NUM_INTEROP_THREADS=1,
        )
        import keras
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(options["threads"])
        tf.config.threading.set_inter_op_parallelism_threads(1)
        with np.load(options["npz"]) as archive:
            arrays = {name: archive[name] for name in archive}
        V, E = arrays["embedding.weight"].shape
        H = arrays["gru.weight_hh_l0"].shape[1]
        embedding = keras.layers.Embedding(V, E)
        gru = keras.layers.GRU(H, return_sequences=True, reset_after=True)
        dense = keras.layers.Dense(V)
        model = keras.Sequential([embedding, gru, dense])
        model.build(arrays["input"].shape)
        embedding.set_weights([arrays["embedding.weight"]])
        biases = [zrn(arrays[f"gru.bias_{name}_l0"]) for name in ("ih", "hh")]
        gru.set_weights(
            [
                zrn(arrays["gru.weight_ih_l0"]).T,
                zrn(arrays["gru.weight_hh_l0"]).T,
                np.stack(biases),
            ]
        )
        dense.set_weights([arrays["linear.weight"].T, arrays["linear.bias"]])
        optimizer = keras.optimizers.Adam(learning_rate=options["lr"], epsilon=options["eps"])
        loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        optimizer.build(model.trainable_variables)
        input, target = tf.constant(arrays["input"]), tf.constant(arrays["target"])

        @tf.function
        def train(input, target):
            with tf.GradientTape() as tape:
                loss = loss_of(target, model(input, training=True))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            return loss

        self.step = lambda: float(train(input, target).numpy())
        names = ("keras", "tensorflow-cpu")
        self.version = ", ".join(f"{name} {metadata.version(name)}" for name in names)

    def report(self) -> dict[str, Any]:
        return {"parts": {}, "ops": []}


if __name__ == "__main__":
    serve_program(KerasProgram)
