"""oneDNN's lbr_gru primitive: `python -m benchmarks.peers.onednn_gru`, see worker.py.

onednn_gru.cpp is compiled at first use against the headers and the library that the packages
onednn-devel-cpu-gomp and onednn-cpu-gomp put into the interpreter's environment.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from pathlib import Path

import numpy as np

from benchmarks import native
from benchmarks.peers.gru import GRUCase, merged_bias, zrn
from benchmarks.peers.worker import Contestant, Unsupported, environment, serve

POINTER = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")


def build(case: GRUCase) -> Contestant:
    if case.training and case.dtype != "float32":
        raise Unsupported(f"not written for oneDNN's backward pass in {case.dtype}")
    settings = environment(
        OMP_NUM_THREADS=case.threads,
        # As for every worker on libgomp: bound threads, which spin for a moment and then sleep.
        # Asleep at every barrier they would cost a sequence several times its time.
        OMP_PROC_BIND="true",
        GOMP_SPINCOUNT=100000,
    )
    library = load()
    version = library.gru_library_version()
    settings["oneDNN"] = f"{version // 10000}.{version // 100 % 100}.{version % 100}"
    values, T, B, I, H = case.values, case.T, case.B, case.I, case.H
    handle = library.gru_create(
        *(T, B, I, H),
        case.training,
        case.dtype == "bfloat16",
        values["input"],
        values["hx"],
        np.ascontiguousarray(zrn(values["weight_ih"]).T),
        np.ascontiguousarray(zrn(values["weight_hh"]).T),
        merged_bias(case),
        values["cotangent"],
        values["cotangent_h"],
    )
    if not handle:
        message = f"oneDNN: {library.gru_failure().decode()}"
        raise (Unsupported if library.gru_unimplemented() else RuntimeError)(message)

    def step() -> None:
        if not library.gru_step(handle):
            raise RuntimeError(library.gru_failure().decode())

    def read(name: str, *shape: int) -> np.ndarray:
        array = np.empty(shape, np.float32)
        if not library.gru_read(handle, name.encode(), array):
            raise RuntimeError(library.gru_failure().decode())
        return array

    def results() -> dict[str, np.ndarray]:
        named = {"output": read("output", T, B, H), "h_n": read("h_n", B, H)}
        if case.training:
            z, r, n_ih, n_hh = read("grad of bias", 4, H)
            named |= {
                "grad of input": read("grad of input", T, B, I),
                "grad of hx": read("grad of hx", B, H),
                "grad of weight_ih": zrn(read("grad of weight_ih", I, 3 * H).T),
                "grad of weight_hh": zrn(read("grad of weight_hh", H, 3 * H).T),
                "grad of bias_ih": np.concatenate([r, z, n_ih]),
                "grad of bias_hh": np.concatenate([r, z, n_hh]),
            }
        return named

    contestant = Contestant(step, results, settings)
    weakref.finalize(contestant, library.gru_destroy, handle)
    return contestant


def load() -> ctypes.CDLL:
    prefix = Path(sys.prefix)
    library = native.load(
        Path(__file__).with_suffix(".cpp"),
        f"-I{prefix / 'include'}",
        f"-L{prefix / 'lib'}",
        f"-Wl,-rpath,{prefix / 'lib'}",
        "-ldnnl",
    )
    library.gru_failure.restype = ctypes.c_char_p
    library.gru_unimplemented.restype = ctypes.c_bool
    library.gru_create.restype = ctypes.c_void_p
    library.gru_create.argtypes = [ctypes.c_long] * 4 + [ctypes.c_bool] * 2 + [POINTER] * 7
    library.gru_destroy.restype = None
    library.gru_destroy.argtypes = [ctypes.c_void_p]
    library.gru_step.restype = ctypes.c_bool
    library.gru_step.argtypes = [ctypes.c_void_p]
    library.gru_read.restype = ctypes.c_bool
    library.gru_read.argtypes = [ctypes.c_void_p, ctypes.c_char_p, POINTER]
    return library


if __name__ == "__main__":
    serve(GRUCase, build, "onednn-cpu-gomp")
