"""The program of benchmarks.models in PyTorch, in a process of its own: `python -m
benchmarks.model_worker genkernels` or `torch`; see serve_program."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import genkernels
from benchmarks.workers import serve_program
from genkernels.models.rnn import RNNConfig, RNNLanguageModel

CONFIG = RNNConfig(vocab_size=10_000, embedding_dim=256, hidden_size=512)
SHAPE = (64, 100)  # B, T
OPTIMIZER = {"lr": 1e-3, "eps": 1e-10}
GRU = {"genkernels": genkernels.nn.GRU, "torch": torch.nn.GRU}


def initial_arrays() -> dict[str, np.ndarray]:
    """The weights that training starts from, as state_dict names them, and a batch of tokens."""
    torch.manual_seed(0)
    model = RNNLanguageModel(CONFIG, gru=torch.nn.GRU)
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(CONFIG.vocab_size, (SHAPE[0], SHAPE[1] + 1), generator=generator)
    return {**arrays, "input": tokens[:, :-1].numpy(), "target": tokens[:, 1:].numpy()}


class TorchProgram:
    """`library` is "genkernels" or "torch"; "bfloat16" is autocast of float32 weights."""

    def __init__(self, library: str, dtype: str, arrays: Mapping[str, np.ndarray]) -> None:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
        self.input, self.target = tensors.pop("input"), tensors.pop("target")
        self.model = RNNLanguageModel(CONFIG, gru=GRU[library])
        self.model.load_state_dict(tensors)
        if dtype == "float64":
            self.model.double()
        self.version = f"torch {torch.__version__}"
        if library == "genkernels":
            self.version = f"genkernels {genkernels.__version__}, {self.version}"
        self.is_autocast = dtype == "bfloat16"
        self.optimizer = torch.optim.Adam(self.model.parameters(), **OPTIMIZER, fused=True)
        self.seconds: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}

    def step(self) -> float:
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.is_autocast):
            loss, _ = self.model.loss(self.input, self.target)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        parts = (forward - begin, backward - forward, end - backward)
        for kept, seconds in zip(self.seconds.values(), parts, strict=True):
            kept.append(seconds)
        return loss.item()

    def report(self) -> dict[str, Any]:
        """Seconds of the parts of a step; and of each op, longest first, without what it calls."""
        parts = {name: statistics.median(kept[1:]) for name, kept in self.seconds.items()}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self.step()
        events = profile.key_averages()
        ops = [(event.key, event.self_cpu_time_total / 1e6) for event in events]
        return {"parts": parts, "ops": sorted(ops, key=lambda pair: -pair[1])}


def build(options: dict[str, Any]) -> TorchProgram:
    torch.set_num_threads(options["threads"])
    with np.load(options["npz"]) as archive:
        arrays = {name: archive[name] for name in archive}
    return TorchProgram(sys.argv[1], options["dtype"], arrays)


if __name__ == "__main__":
    serve_program(build)
