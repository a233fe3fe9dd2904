"""Which checkpoint of a run is tested: of those evaluated along the last stage, the best on validation data.

What was evaluated stands in `<workdir>/selection.json`, so that a run that resumes selects as one that was not
interrupted does; `selected` there is the step of the checkpoint that was tested in the end.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vlab_jax.errors import InputError
from vlab_jax.evaluation.retrieval import LOWER_IS_BETTER
from vlab_jax.runtime import sharding
from vlab_jax.runtime.checkpoint import SELECTION
from vlab_jax.runtime.disk import write_json

USUAL = {"retrieval": "text_to_video/R@1", "captioning": "CIDEr", "question_answering": "QA all"}


class Selection:
    """Evaluations along a run, by the steps in all after which they were made.

    Args:
      workdir: of the run.
      fields: of a config's `checkpoint`.
      tasks: that the last stage is evaluated on; the first one's usual figure decides where `select_by` names none.
      stage: the last one, whose evaluations are selected among.
    """

    def __init__(self, workdir: pathlib.Path, fields: Mapping[str, Any], tasks: Sequence[str], stage: str) -> None:
        self.on, self.by = fields["select_on"], fields["select_by"] or USUAL[tasks[0]]
        self._file, self._stage = workdir / SELECTION, stage
        self._evaluated: dict[int, dict[str, Any]] = {}
        self._selected: int | None = None

    def resume(self, total: int) -> None:
        """Takes over what is in the workdir of the first `total` steps; what came later will come again."""
        if self._file.exists():
            saved = json.loads(self._file.read_text())
            self._evaluated = {int(step): entry for step, entry in saved["evaluated"].items() if int(step) <= total}
            self._selected = saved["selected"]

    def split(self, stage: str) -> str:
        """The split that a stage is evaluated on along the way."""
        return "test" if self.on == "test" and stage == self._stage else "validation"

    def has(self, total: int) -> bool:
        """Whether the model was evaluated after so many steps."""
        return total in self._evaluated

    def add(self, total: int, stage: str, metrics: Mapping[str, float]) -> None:
        """Notes an evaluation on the stage's `split`.

        Raises:
          InputError: it lacks the figure to select by.
        """
        if self.on != "last" and stage == self._stage and self.by not in metrics:
            raise InputError(
                f"config.checkpoint.select_by is {self.by!r}, which is no figure of stage {stage!r}; they are: "
                + ", ".join(metrics)
            )
        self._evaluated[total] = {"stage": stage, "metrics": dict(metrics)}
        self._write()

    def best(self) -> int | None:
        """The step of the best evaluation of the last stage, the earliest of equals; None: there is none yet."""
        candidates = {step: e["metrics"] for step, e in sorted(self._evaluated.items()) if e["stage"] == self._stage}
        if self.on == "last" or not candidates:
            return max(candidates, default=None)
        return max(candidates, key=lambda step: _goodness(self.by, candidates[step][self.by]))

    def select(self) -> "Selected":
        """The checkpoint to test; notes that it was selected."""
        self._selected = self.best()
        self._write()
        return Selected(self._selected, self.on, self._evaluated[self._selected]["metrics"])

    def _write(self) -> None:
        content = {"on": self.on, "by": self.by, "selected": self._selected, "evaluated": self._evaluated}
        if sharding.is_primary():
            write_json(self._file, content)


class Selected(NamedTuple):
    """A checkpoint to test, by its step, what it was selected on, and its figures there."""

    step: int
    on: str
    metrics: dict[str, float]

    def rows(self, stage: str, total: int) -> dict[str, dict[str, float]]:
        """What the results table gets besides the row of the stage's end, at step `total`: figures on validation."""
        earlier = self.on == "validation" and self.step != total
        return {f"{stage}, step {self.step} (validation)": self.metrics} if earlier else {}

    def test_row(self, stage: str, total: int) -> str:
        """The name of the row of its figures on test data, with a mark where it was selected on them."""
        if self.on == "test":
            return f"{stage}, step {self.step} (test, selected on test)"
        return f"{stage} (test)" if self.step == total else f"{stage}, step {self.step} (test)"


def _goodness(name: str, value: float) -> float:
    if math.isnan(value):
        return -math.inf
    return -value if name.rpartition("/")[2] in LOWER_IS_BETTER else value
