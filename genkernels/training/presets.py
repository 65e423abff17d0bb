"""Named settings: the sizes of a model together with how to train it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..models import (
    BERTConfig,
    GANConfig,
    GPTConfig,
    HMMConfig,
    MarkovConfig,
    RecurrentGANConfig,
    RNNConfig,
    Seq2SeqConfig,
    T5Config,
)
from .adversarial import AdversarialConfig
from .fitting import CountingConfig, EMConfig, FittingConfig
from .loop import TrainingConfig


class Preset(NamedTuple):
    """Sizes of a model and how to train it.

    `model.vocab_size` 256 means bytes; above, it is what BPE may use at most.
    """

    model: Any
    training: Any


@dataclass(frozen=True)
class Structure:
    """Which columns of a table depend on which, as in "a->b,b->c"; None: the Chow-Liu tree."""

    structure: str | None = None


RNN_PRESETS = {
    "bytes": Preset(
        RNNConfig(vocab_size=256, embedding_dim=128, hidden_size=384, dropout=0.1),
        # Chosen on a validation part of the training split.
        TrainingConfig(learning_rate=3e-3, batch_size=32, sequence_length=64, minutes=4.0),
    ),
    "seed": Preset(
        RNNConfig(vocab_size=10_000, embedding_dim=256, hidden_size=512, dropout=0.2),
        TrainingConfig(
            optimizer="adam", learning_rate=2e-3, batch_size=64, sequence_length=100, minutes=4.0
        ),
    ),
    "deep": Preset(
        RNNConfig(
            vocab_size=10_000,
            embedding_dim=512,
            hidden_size=512,
            num_layers=2,
            dropout=0.2,
            tie_weights=True,
        ),
        TrainingConfig(learning_rate=2e-3, batch_size=64, sequence_length=100, minutes=10.0),
    ),
    # A token is a sample of sound: short steps of a small model, for many of them.
    "audio": Preset(
        RNNConfig(vocab_size=256, embedding_dim=64, hidden_size=192),
        TrainingConfig(learning_rate=3e-3, batch_size=16, sequence_length=256, minutes=4.0),
    ),
}

GPT_PRESETS = {
    "bytes": Preset(
        GPTConfig(
            vocab_size=256,
            context_length=128,
            num_layers=4,
            num_heads=4,
            embedding_dim=256,
            dropout=0.1,
            bias=False,
        ),
        TrainingConfig(
            learning_rate=1e-3,
            weight_decay=0.1,
            min_learning_rate=0.1,
            batch_size=16,
            sequence_length=None,
            minutes=4.0,
        ),
    ),
    # nanoGPT's settings for a laptop without a GPU, https://github.com/karpathy/nanoGPT.
    "nanogpt-cpu": Preset(
        GPTConfig(
            vocab_size=256,
            context_length=64,
            num_layers=4,
            num_heads=4,
            embedding_dim=128,
            bias=False,
        ),
        TrainingConfig(
            learning_rate=1e-3,
            weight_decay=0.1,
            warmup=0.05,
            min_learning_rate=0.1,
            batch_size=12,
            sequence_length=None,
            steps=2000,
        ),
    ),
}

BERT_PRESETS = {
    "words": Preset(
        BERTConfig(
            vocab_size=2_000,
            context_length=64,
            num_layers=4,
            num_heads=4,
            embedding_dim=256,
            dropout=0.1,
        ),
        TrainingConfig(
            learning_rate=5e-4,
            weight_decay=0.01,
            warmup=0.1,
            batch_size=32,
            sequence_length=None,
            minutes=4.0,
        ),
    ),
}

T5_PRESETS = {
    # Letter by letter: an answer may have to copy a part of what a longer token would hide.
    "bytes": Preset(
        T5Config(vocab_size=256, num_layers=2, num_heads=4, embedding_dim=128, feedforward_dim=512),
        TrainingConfig(
            learning_rate=2e-3, warmup=0.05, batch_size=64, sequence_length=64, minutes=4.0
        ),
    ),
    "words": Preset(
        T5Config(
            vocab_size=2_000,
            num_layers=2,
            num_heads=4,
            embedding_dim=256,
            feedforward_dim=512,
            dropout=0.1,
        ),
        TrainingConfig(
            learning_rate=1e-3, warmup=0.05, batch_size=32, sequence_length=64, minutes=4.0
        ),
    ),
}

HMM_PRESETS = {
    "bytes": Preset(HMMConfig(num_states=64, vocab_size=256), EMConfig(minutes=2.0)),
}

MARKOV_PRESETS = {
    "bytes": Preset(MarkovConfig(order=5), FittingConfig(steps=1)),
}

TABLE_PRESETS = {
    "table": Preset(Structure(), CountingConfig(steps=1)),
}

# wgan-gp: with hinge or non-saturating loss each class soon has one image, whatever the noise.
GAN_PRESETS = {
    # scikit-learn's digits.
    "digits": Preset(
        GANConfig(image_size=8, width=48, spectral_norm=False),
        AdversarialConfig(
            learning_rate=4e-4,
            schedule="cosine",
            loss="wgan-gp",
            discriminator_steps=2,
            minutes=3.0,
        ),
    ),
    "mnist": Preset(
        GANConfig(image_size=28, width=24, spectral_norm=False),
        AdversarialConfig(
            learning_rate=4e-4,
            schedule="cosine",
            loss="wgan-gp",
            discriminator_steps=2,
            minutes=12.0,
        ),
    ),
}

RECURRENT_GAN_PRESETS = {
    "series": Preset(
        RecurrentGANConfig(length=24, num_classes=3),
        AdversarialConfig(
            learning_rate=1e-3,
            schedule="cosine",
            loss="wgan-gp",
            discriminator_steps=5,
            minutes=8.0,
        ),
    ),
}

SEQ2SEQ_PRESETS = {
    "bytes": Preset(
        Seq2SeqConfig(vocab_size=256, embedding_dim=64, hidden_size=256, dropout=0.1),
        TrainingConfig(
            learning_rate=3e-3, warmup=0.05, batch_size=64, sequence_length=64, minutes=2.0
        ),
    ),
    "words": Preset(
        Seq2SeqConfig(
            vocab_size=2_000, embedding_dim=256, hidden_size=512, num_layers=2, dropout=0.2
        ),
        TrainingConfig(
            learning_rate=1e-3, warmup=0.05, batch_size=64, sequence_length=64, minutes=10.0
        ),
    ),
}
