"""Generative models on the fused ops, and the baselines that they are measured against."""

from .bert import BERT, BERTConfig, Fillings
from .gpt import GPT, GPTConfig
from .markov import MarkovModel
from .rnn import RNNConfig, RNNLanguageModel
from .sampling import CausalModel, sample_token
from .t5 import T5, T5Config

__all__ = [
    "BERT",
    "GPT",
    "T5",
    "BERTConfig",
    "CausalModel",
    "Fillings",
    "GPTConfig",
    "MarkovModel",
    "RNNConfig",
    "RNNLanguageModel",
    "T5Config",
    "sample_token",
]
