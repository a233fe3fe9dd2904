"""The tasks that a model is evaluated on: the only place that names them.

A new task is a module of this package with a function `evaluate(encoder, source, plan, folder)`, whose arguments are
those of `Plan.evaluate` and which returns a `plan.TaskResult`, and its entry in `TASKS`. Config checks, selection,
evaluation and report read their names here. Nothing heavy is imported: a mistake in a config is reported at once.
"""

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Task(NamedTuple):
    """How a task is run, and what its figures are called.

    Attributes:
      module: of `vlab_jax.evaluation`.
      figures: regular expression of the names of its figures.
      default_figure: selects a checkpoint unless `config.checkpoint.select_by` names another.
      lower_is_better: regular expression of the figures that are better when they are lower.
    """

    module: str
    figures: str
    default_figure: str
    lower_is_better: str = r"(?!)"  # matches nothing

    def evaluate(self) -> Callable[..., Any]:
        """The function that runs the task; importing it takes seconds."""
        return importlib.import_module(f"vlab_jax.evaluation.{self.module}").evaluate


TASKS: dict[str, Task] = {
    "retrieval": Task(
        "retrieval",
        r"(text_to_video|video_to_text)/(R@1|R@5|R@10|median_rank|mean_rank)|.+_accuracy",
        "text_to_video/R@1",
        r".+/(median_rank|mean_rank)",
    ),
    "captioning": Task("captioning", r"BLEU-[1-4]|METEOR|ROUGE-L|CIDEr", "CIDEr"),
    "question_answering": Task("question_answering", r"QA .+", "QA all", r"QA count MSE"),
}


def default_figure(tasks: Sequence[str]) -> str:
    """The figure that selects a checkpoint of a model that is evaluated on these tasks: that of the first."""
    return TASKS[tasks[0]].default_figure


def is_figure(name: str, tasks: Sequence[str]) -> bool:
    """Whether one of the tasks has a figure of this name."""
    return any(re.fullmatch(TASKS[task].figures, name) for task in tasks)


def lower_is_better(figure: str) -> bool:
    """Whether a figure, such as a rank or an error, is better when it is lower."""
    return any(re.fullmatch(task.lower_is_better, figure) for task in TASKS.values())
