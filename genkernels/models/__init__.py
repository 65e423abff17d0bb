"""Generative models on the fused ops, and the baselines that they are measured against."""

from typing import Any

from .attention_maps import attention_maps
from .bert import BERT, BERTConfig, Fillings
from .evaluating import evaluating
from .gpt import GPT, GPTConfig
from .markov import MarkovModel
from .rnn import RNNConfig, RNNLanguageModel
from .sampling import CausalModel, sample_token
from .t5 import T5, T5Config

# Those that `genkernels train` trains, by the name that a checkpoint has for them.
MODELS: dict[str, tuple[type[Any], type[Any]]] = {
    BERT.name: (BERTConfig, BERT),
    GPT.name: (GPTConfig, GPT),
    RNNLanguageModel.name: (RNNConfig, RNNLanguageModel),
    T5.name: (T5Config, T5),
}

__all__ = [
    "BERT",
    "GPT",
    "MODELS",
    "T5",
    "BERTConfig",
    "CausalModel",
    "Fillings",
    "GPTConfig",
    "MarkovModel",
    "RNNConfig",
    "RNNLanguageModel",
    "T5Config",
    "attention_maps",
    "evaluating",
    "sample_token",
]
