"""What each model is trained on and measured by; one file each."""

from ...data import InputError
from ..checkpoint import Checkpoint
from .bert import BERTTask
from .gan import GANTask, RecurrentGANTask
from .language import GPTTask, HMMTask, MarkovTask
from .rnn import RNNTask
from .seq2seq import Seq2SeqTask
from .t5 import T5Task
from .table import TableTask
from .task import (
    MAX_NEW_TOKENS,
    TEMPERATURE,
    Baseline,
    Example,
    Request,
    SampleFile,
    Task,
    TokenTask,
)

# By the model's name; `Task.of` then goes by the data.
TASKS: dict[str, type[Task]] = {
    task.model_class.name: task
    for task in (
        RNNTask,
        GPTTask,
        BERTTask,
        T5Task,
        Seq2SeqTask,
        HMMTask,
        MarkovTask,
        TableTask,
        GANTask,
        RecurrentGANTask,
    )
}


def task_of(checkpoint: Checkpoint) -> type[Task]:
    """Return the task of a model that was loaded.

    Raises:
        InputError: no command knows such a model.
    """
    name = checkpoint.model.name
    if name not in TASKS:
        raise InputError(f"no command knows a {name}; expected one of {', '.join(TASKS)}")
    return TASKS[name].of_checkpoint(checkpoint)


__all__ = [
    "MAX_NEW_TOKENS",
    "TASKS",
    "TEMPERATURE",
    "Baseline",
    "Example",
    "Request",
    "SampleFile",
    "Task",
    "TokenTask",
    "check_contents",
    "task_of",
]
