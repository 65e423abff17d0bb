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
from .comparison import Comparison, compare_step_time, kernel_share
from .evaluation import Evaluation, Measures, TokenEvaluation, evaluate, evaluate_batches
from .fitting import EMConfig, Fitting, FittingConfig
from .human import Preference, score_votes, write_sheet
from .loop import (
    OptimizerName,
    ScheduleName,
    Step,
    Training,
    TrainingConfig,
    train,
    training_step,
)
from .plot import plot_attention, plot_loss, plot_runs
from .presets import (
    BERT_PRESETS,
    GPT_PRESETS,
    HMM_PRESETS,
    MARKOV_PRESETS,
    RNN_PRESETS,
    SEQ2SEQ_PRESETS,
    T5_PRESETS,
    Preset,
)
from .tasks import TASKS, Baseline, Request, SampleFile, Task, TokenTask, task_of

__all__ = [
    "BERT_PRESETS",
    "GPT_PRESETS",
    "HMM_PRESETS",
    "LOSS_CURVE",
    "MARKOV_PRESETS",
    "RNN_PRESETS",
    "SEQ2SEQ_PRESETS",
    "T5_PRESETS",
    "TASKS",
    "Baseline",
    "Checkpoint",
    "Comparison",
    "EMConfig",
    "Evaluation",
    "Fitting",
    "FittingConfig",
    "Measures",
    "OptimizerName",
    "Preference",
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
    "kernel_share",
    "load_checkpoint",
    "load_state",
    "plot_attention",
    "plot_loss",
    "plot_runs",
    "replace_file",
    "replace_folder",
    "save_checkpoint",
    "score_votes",
    "task_of",
    "train",
    "training_step",
    "write_sheet",
]
