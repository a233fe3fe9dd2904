"""Selects the checkpoint to test: the best on validation data among the evaluations of the last stage.

The evaluations stand in `<workdir>/selection.json`, so that a resumed run selects as an uninterrupted one does;
`selected` there is the step of the checkpoint that was tested in the end.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vlab_jax.errors import InputError
from vlab_jax.evaluation.registry import default_figure, lower_is_better
from vlab_jax.runtime import sharding
from vlab_jax.runtime.checkpoint import SELECTION
from vlab_jax.runtime.disk import write_json


class Selection:
    """The evaluations of a run, by global step.

    Args:
      fields: `config.checkpoint`.
      tasks, stage: of the last stage, among whose evaluations the best is selected.
    """

    def __init__(self, workdir: pathlib.Path, fields: Mapping[str, Any], tasks: Sequence[str], stage: str) -> None:
        self.on, self.by = fields["select_on"], fields["select_by"] or default_figure(tasks)
        self._file, self._stage = workdir / SELECTION, stage
        self._evaluated: dict[int, dict[str, Any]] = {}
        self._selected: int | None = None

    def resume(self, total: int) -> None:
        """Reads the evaluations of the first `total` steps; later ones will be made again."""
        if self._file.exists():
            saved = json.loads(self._file.read_text())
            self._evaluated = {int(step): entry for step, entry in saved["evaluated"].items() if int(step) <= total}
            self._selected = saved["selected"]

    def split(self, stage: str) -> str:
        """The split that a stage is evaluated on between its steps."""
        return "test" if self.on == "test" and stage == self._stage else "validation"

    def has(self, total: int) -> bool:
        """Whether there is an evaluation after so many steps."""
        return total in self._evaluated

    def add(self, total: int, stage: str, metrics: Mapping[str, float]) -> None:
        """Adds an evaluation on the stage's `split`; raises `InputError` if it lacks the figure to select by."""
        if self.on != "last" and stage == self._stage and self.by not in metrics:
            raise InputError(
                f"config.checkpoint.select_by is {self.by!r}, which is no figure of stage {stage!r}; they are: "
                + ", ".join(metrics)
            )
        self._evaluated[total] = {"stage": stage, "metrics": dict(metrics)}
        self._write()

    def best(self) -> int | None:
        """The step of the last stage's best evaluation, the earliest of equals; None if there is none yet."""
        candidates = {step: e["metrics"] for step, e in sorted(self._evaluated.items()) if e["stage"] == self._stage}
        if self.on == "last" or not candidates:
            return max(candidates, default=None)

        def score(step: int) -> float:
            value = candidates[step][self.by]
            return -math.inf if math.isnan(value) else -value if lower_is_better(self.by) else value

        return max(candidates, key=score)

    def select(self) -> int:
        """Selects the checkpoint to test, records it, and returns its step."""
        self._selected = self.best()
        self._write()
        return self._selected

    def rows(self, total: int) -> tuple[dict[str, dict[str, float]], str]:
        """Of the selected checkpoint, in a run of `total` steps: its row of validation figures in the results, if it is
        not that of the stage's end; and the name of its row of test figures, with a mark if it was selected on them."""
        name = self._stage if self._selected == total else f"{self._stage}, step {self._selected}"
        if self.on == "test":
            return {}, f"{self._stage}, step {self._selected} (test, selected on test)"
        earlier = self.on == "validation" and self._selected != total
        metrics = self._evaluated[self._selected]["metrics"]
        return {f"{name} (validation)": metrics} if earlier else {}, f"{name} (test)"

    def _write(self) -> None:
        content = {"on": self.on, "by": self.by, "selected": self._selected, "evaluated": self._evaluated}
        if sharding.is_primary():
            write_json(self._file, content)
