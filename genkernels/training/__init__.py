"""The training loop, evaluation, checkpoints and the timing against plain PyTorch."""

from .checkpoint import LOSS_CURVE, Checkpoint, load_checkpoint, replace_folder, save_checkpoint
from .comparison import Comparison, compare_step_time
from .evaluation import Evaluation, evaluate
from .loop import OptimizerName, ScheduleName, Step, TrainingConfig, train, training_step
from .plot import plot_loss
from .presets import RNN_PRESETS, RNNPreset

__all__ = [
    "LOSS_CURVE",
    "RNN_PRESETS",
    "Checkpoint",
    "Comparison",
    "Evaluation",
    "OptimizerName",
    "RNNPreset",
    "ScheduleName",
    "Step",
    "TrainingConfig",
    "compare_step_time",
    "evaluate",
    "load_checkpoint",
    "plot_loss",
    "replace_folder",
    "save_checkpoint",
    "train",
    "training_step",
]
