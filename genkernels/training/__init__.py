"""The training loop, evaluation, checkpoints and the timing against plain PyTorch."""

from .checkpoint import (
    LOSS_CURVE,
    Checkpoint,
    RunFolder,
    Which,
    load_checkpoint,
    load_state,
    replace_file,
    replace_folder,
    save_checkpoint,
)
from .comparison import Comparison, compare_step_time
from .evaluation import Evaluation, Measures, TokenEvaluation, evaluate, evaluate_batches
from .loop import (
    OptimizerName,
    ScheduleName,
    Step,
    Training,
    TrainingConfig,
    train,
    training_step,
)
from .plot import plot_attention, plot_loss
from .presets import BERT_PRESETS, GPT_PRESETS, RNN_PRESETS, T5_PRESETS, Preset
from .tasks import TASKS, Baseline, Request, SampleFile, Task, TokenTask

__all__ = [
    "BERT_PRESETS",
    "GPT_PRESETS",
    "LOSS_CURVE",
    "RNN_PRESETS",
    "T5_PRESETS",
    "TASKS",
    "Baseline",
    "Checkpoint",
    "Comparison",
    "Evaluation",
    "Measures",
    "OptimizerName",
    "Preset",
    "Request",
    "RunFolder",
    "SampleFile",
    "ScheduleName",
    "Step",
    "Task",
    "TokenEvaluation",
    "TokenTask",
    "Training",
    "TrainingConfig",
    "Which",
    "compare_step_time",
    "evaluate",
    "evaluate_batches",
    "load_checkpoint",
    "load_state",
    "plot_attention",
    "plot_loss",
    "replace_file",
    "replace_folder",
    "save_checkpoint",
    "train",
    "training_step",
]
