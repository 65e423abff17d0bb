"""What each model is trained on and measured by; one file each."""

from typing import Any

from ...data import InputError
from .bert import BERTTask
from .gan import GANTask, RecurrentGANTask
from .language import GPTTask, HMMTask, MarkovTask, RNNTask
from .seq2seq import Seq2SeqTask
from .t5 import T5Task
from .table import TableTask
from .task import TEMPERATURE, Baseline, Example, Request, SampleFile, Task, TokenTask

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


def task_of(model: Any) -> type[Task]:
    """Return the task of a model that was loaded.

    Raises:
        InputError: no command knows such a model.
    """
    if model.name not in TASKS:
        raise InputError(f"no command knows a {model.name}; expected one of {', '.join(TASKS)}")
    return TASKS[model.name]


__all__ = [
    "TASKS",
    "TEMPERATURE",
    "Baseline",
    "Example",
    "Request",
    "SampleFile",
    "Task",
    "TokenTask",
    "task_of",
]
