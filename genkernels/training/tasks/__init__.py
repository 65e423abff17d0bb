"""What each model is trained on and measured by; one file each."""

from .bert import BERTTask
from .language import GPTTask, RNNTask
from .t5 import T5Task
from .task import Baseline, Request, SampleFile, Task, TokenTask

# By the model's name; `Task.of` then goes by the data.
TASKS: dict[str, type[Task]] = {
    task.model_class.name: task for task in (RNNTask, GPTTask, BERTTask, T5Task)
}

__all__ = ["TASKS", "Baseline", "Request", "SampleFile", "Task", "TokenTask"]
