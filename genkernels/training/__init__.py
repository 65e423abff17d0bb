"""The training loop, evaluation, checkpoints and the timing against plain PyTorch."""

from .checkpoint import (
    LOSS_CURVE,
    Checkpoint,
    RunFolder,
    Which,
    load_checkpoint,
    load_state,
    replace_folder,
    save_checkpoint,
)
from .comparison import Comparison, compare_step_time
from .evaluation import Evaluation, evaluate
from .loop import (
    OptimizerName,
    ScheduleName,
    Step,
    Training,
    TrainingConfig,
    train,
    training_step,
)
from .plot import plot_loss
from .presets import GPT_PRESETS, RNN_PRESETS, Preset
from .tasks import TASKS, GPTTask, RNNTask, Task

__all__ = [
    "GPT_PRESETS",
    "LOSS_CURVE",
    "RNN_PRESETS",
    "TASKS",
    "Checkpoint",
    "Comparison",
    "Evaluation",
    "GPTTask",
    "OptimizerName",
    "Preset",
    "RNNTask",
    "RunFolder",
    "ScheduleName",
    "Step",
    "Task",
    "Training",
    "TrainingConfig",
    "Which",
    "compare_step_time",
    "evaluate",
    "load_checkpoint",
    "load_state",
    "plot_loss",
    "replace_folder",
    "save_checkpoint",
    "train",
    "training_step",
]
