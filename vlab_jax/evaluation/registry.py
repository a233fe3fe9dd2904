"""The evaluations that a config asks for, one after the other, on one split."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vlab_jax.data.tokenizer import Tokenizer
from vlab_jax.datasets.annotations import read_answer_list
from vlab_jax.evaluation.answers import Scored, evaluate_question_answering
from vlab_jax.evaluation.captioning import Captioned, evaluate_captioning
from vlab_jax.evaluation.encoder import Encoder, Retrieval, evaluate_retrieval
from vlab_jax.evaluation.query_normalisation import Normalisation, rerank
from vlab_jax.models.generation import Search
from vlab_jax.runtime import metrics as meters
from vlab_jax.runtime import sharding
from vlab_jax.runtime.disk import writing


class Outcome(NamedTuple):
    """The figures of all tasks, further rows of figures by name, and what each task found, if it was among them."""

    metrics: dict[str, float]
    rows: dict[str, dict[str, float]]
    retrieval: Retrieval | None
    captions: Captioned | None
    answers: Scored | None

    def by_row(self, name: str) -> dict[str, dict[str, float]]:
        """The rows of a results table: that of a model, and under it those that do not compare with others'."""
        return {name: self.metrics, **{f"{name}, {row}": figures for row, figures in self.rows.items()}}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to evaluate, and how.

    Attributes:
      tasks: of `retrieval`, `captioning` and `question_answering`.
      multiple_choice: types of questions that retrieval answers by similarity, and question answering leaves out.
      search: how texts are generated.
      list_size: answers of the closed list that question answering ranks, of those most frequent in training.
      list_file: a JSON file with such a list, used instead; empty: none.
      rerank: how many of the clips that retrieval finds best are ranked anew by the decoder's likelihood; 0: none.
      normalisation: rows of retrieval that see other queries.
      training: opens the splits trained on, of which the closed list and the querybank are made.
      max_failed_share: see `pipeline.FailureCount`.
    """

    tasks: tuple[str, ...]
    multiple_choice: tuple[str, ...]
    search: Search
    list_size: int
    list_file: str
    rerank: int
    normalisation: Normalisation
    training: Callable[[], list[Sequence]]
    max_failed_share: float

    @classmethod
    def of(
        cls,
        fields: Mapping[str, Any],
        generation: Mapping[str, Any],
        tokenizer: Tokenizer,
        training: Callable[[], list[Sequence]],
        max_failed_share: float,
    ) -> "Plan":
        """What a config says: `fields` of its `evaluation` (of an evaluation: its own), and of its `generation`.

        Raises:
          InputError: as `Search.of`.
        """
        return cls(
            tuple(fields["tasks"]),
            tuple(fields["multiple_choice"]),
            Search.of(generation, tokenizer.end, tokenizer.context_length),
            fields["closed_list"],
            fields["answer_list"],
            fields["rerank"],
            Normalisation.of(fields),
            training,
            max_failed_share,
        )

    def headline(self, by: str) -> "Plan":
        """The plan without what costs time and does not decide: further rows, and the closed list but where it does."""
        listed = {} if by in ("QA ranked", "QA ceiling") else {"list_size": 0, "list_file": ""}
        return dataclasses.replace(self, **listed, rerank=0, normalisation=Normalisation())

    def evaluate(self, encoder: Encoder, source: Sequence, name: str, folder: pathlib.Path | None) -> Outcome:
        """Runs the tasks.

        Args:
          name: what the progress bars call it.
          folder: where captions, references and answers go; None: nowhere.
        """
        given = (encoder, source)
        progress = functools.partial(meters.ProgressBar, total_steps=len(source), stream=sharding.display())
        shared = {"max_failed_share": self.max_failed_share}
        if folder is not None:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
        retrieval = captions = answers = None
        rows: dict[str, dict[str, float]] = {}
        if "retrieval" in self.tasks:
            with progress(f"evaluate {name}") as bar:
                choice = {"multiple_choice": self.multiple_choice}
                retrieval = evaluate_retrieval(*given, **choice, **shared, update=bar.update)
        if retrieval:
            rows |= self.normalisation.rows(encoder, retrieval, self.training)
        if retrieval and self.rerank:
            with progress(f"re-rank {name}") as bar:
                best = rerank(*given, retrieval, self.rerank, **shared, update=bar.update)
            rows[f"best {self.rerank} re-ranked"] = best
        if "captioning" in self.tasks:
            with progress(f"caption {name}") as bar:
                captions = evaluate_captioning(*given, self.search, folder, **shared, update=bar.update)
        if "question_answering" in self.tasks:
            listed = read_answer_list(self.list_file) if self.list_file else ()
            training = self.training() if self.list_size and not listed else []
            asked = {"list_size": self.list_size, "answers": listed, "without": self.multiple_choice, "folder": folder}
            with progress(f"answer {name}") as bar:
                answers = evaluate_question_answering(
                    *given, self.search, training, **asked, **shared, update=bar.update
                )
        metrics = {
            key: value for found in (retrieval, captions, answers) if found for key, value in found.metrics.items()
        }
        return Outcome(metrics, rows, retrieval, captions, answers)
