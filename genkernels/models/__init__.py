"""Generative models on the fused ops, and the baselines that they are measured against."""

from .gpt import GPT, GPTConfig
from .markov import MarkovModel
from .rnn import RNNConfig, RNNLanguageModel
from .sampling import CausalModel, sample_token

__all__ = [
    "GPT",
    "CausalModel",
    "GPTConfig",
    "MarkovModel",
    "RNNConfig",
    "RNNLanguageModel",
    "sample_token",
]
