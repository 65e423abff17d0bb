"""Generative models on the fused ops, and the baselines that they are measured against."""

from typing import Any

from .adversarial import AdversarialModel
from .attention_maps import attention_maps
from .bayesian_network import BayesianNetwork, BayesianNetworkConfig, chow_liu_tree
from .bert import BERT, BERTConfig, Fillings
from .encoder_decoder import EncoderDecoder
from .evaluating import evaluating
from .gan import GAN, GANConfig
from .gpt import GPT, GPTConfig
from .hmm import HMM, HMMConfig, HMMCounts
from .markov import MarkovConfig, MarkovModel
from .recurrent_gan import RecurrentGAN, RecurrentGANConfig
from .rnn import RNNConfig, RNNLanguageModel
from .sampling import CausalModel, sample_token
from .seq2seq import Seq2Seq, Seq2SeqConfig
from .t5 import T5, T5Config

# Those that checkpoints hold, by the name that one has for them.
MODELS: dict[str, tuple[type[Any], type[Any]]] = {
    BERT.name: (BERTConfig, BERT),
    BayesianNetwork.name: (BayesianNetworkConfig, BayesianNetwork),
    GAN.name: (GANConfig, GAN),
    GPT.name: (GPTConfig, GPT),
    HMM.name: (HMMConfig, HMM),
    MarkovModel.name: (MarkovConfig, MarkovModel),
    RecurrentGAN.name: (RecurrentGANConfig, RecurrentGAN),
    RNNLanguageModel.name: (RNNConfig, RNNLanguageModel),
    Seq2Seq.name: (Seq2SeqConfig, Seq2Seq),
    T5.name: (T5Config, T5),
}

__all__ = [
    "BERT",
    "GAN",
    "GPT",
    "HMM",
    "MODELS",
    "T5",
    "AdversarialModel",
    "BERTConfig",
    "BayesianNetwork",
    "BayesianNetworkConfig",
    "CausalModel",
    "EncoderDecoder",
    "Fillings",
    "GANConfig",
    "GPTConfig",
    "HMMConfig",
    "HMMCounts",
    "MarkovConfig",
    "MarkovModel",
    "RNNConfig",
    "RNNLanguageModel",
    "RecurrentGAN",
    "RecurrentGANConfig",
    "Seq2Seq",
    "Seq2SeqConfig",
    "T5Config",
    "attention_maps",
    "chow_liu_tree",
    "evaluating",
    "sample_token",
]
