"""The tasks that a config names, run one after the other on one split."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from vlab_jax.data.tokenizer import Tokenizer
from vlab_jax.evaluation.encoder import Encoder
from vlab_jax.evaluation.registry import TASKS
from vlab_jax.models.generation import GenerationConfig
from vlab_jax.runtime.disk import writing

# Draws a sheet of a report. Arguments: the path of the PNG, how many rows, and a function from a clip's index in the
# split to its frames.
DrawSheet = Callable[[pathlib.Path, int, Callable[[int], UInt8[np.ndarray, "t s s 3"]]], None]


class TaskResult(NamedTuple):
    """What a task returns.

    `metrics` are the figures of the headline row. `rows` are rows of their own, by name, whose figures do not compare
    with those of others. `lines` are lines of text and their colours by the clip's index in the split, for the sheet
    that shows clips with their texts. `sheets` are further pictures of the report: heading, file name, `DrawSheet`.
    """

    metrics: dict[str, float]
    rows: Mapping[str, dict[str, float]] = {}
    lines: Mapping[int, list[tuple[str, str]]] = {}
    sheets: Sequence[tuple[str, str, DrawSheet]] = ()


class Outcome(NamedTuple):
    """The figures of all tasks, and the result of each by its name."""

    metrics: dict[str, float]
    tasks: dict[str, TaskResult]

    def by_row(self, name: str) -> dict[str, dict[str, float]]:
        """The rows of a results table: the model's own, and below it those that do not compare with others'."""
        rows = {row: figures for result in self.tasks.values() for row, figures in result.rows.items()}
        return {name: self.metrics, **{f"{name}, {row}": figures for row, figures in rows.items()}}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to evaluate, and how. `training` opens the training splits; the fields below it are a config's."""

    search: GenerationConfig
    training: Callable[[], Sequence[Sequence]]
    tasks: Sequence[str]
    multiple_choice: Sequence[str] = ()
    closed_list: int = 0
    answer_list: str = ""
    rerank: int = 0
    query_normalisation: Sequence[str] = ()
    dual_softmax_temperature: float = 0.01
    querybank_size: int = 10_000
    querybank_beta: float = 20.0

    @classmethod
    def of(
        cls,
        fields: Mapping[str, Any],
        generation: Mapping[str, Any],
        tokenizer: Tokenizer,
        training: Callable[[], Sequence[Sequence]],
    ) -> "Plan":
        """The plan of a config: of its fields `evaluation` (in the config of an evaluation: all) and `generation`.

        Raises:
          InputError: as `GenerationConfig.from_fields`.
        """
        search = GenerationConfig.from_fields(generation, tokenizer.end, tokenizer.context_length)
        names = {field.name for field in dataclasses.fields(cls)} & fields.keys()
        return cls(search, training, **{name: fields[name] for name in names})

    def headline(self, by: str) -> "Plan":
        """The plan without what costs time and does not decide: further rows, and the closed list unless it decides."""
        no_list = {} if by in ("QA ranked", "QA ceiling") else {"closed_list": 0, "answer_list": ""}
        return dataclasses.replace(self, **no_list, rerank=0, query_normalisation=())

    def evaluate(self, encoder: Encoder, source: Sequence, folder: pathlib.Path | None) -> Outcome:
        """Runs the tasks on a data source of the schema.

        Args:
          folder: where captions, references and answers go; None: nowhere.
        """
        if folder is not None:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
        chosen = [name for name in TASKS if name in self.tasks]
        results = {name: TASKS[name].evaluate()(encoder, source, self, folder) for name in chosen}
        return Outcome({key: value for result in results.values() for key, value in result.metrics.items()}, results)
