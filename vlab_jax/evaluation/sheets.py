"""The report of an evaluation: what was found, what was written, as sheets of frames and texts beside the figures."""

import collections
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlab_jax.data import pipeline, schema
from vlab_jax.evaluation import contact_sheet, report, retrieval
from vlab_jax.evaluation.run import Retrieval
from vlab_jax.evaluation.sample_sheet import Sample, sample_sheet
from vlab_jax.evaluation.tasks import Outcome


def write_report(
    folder: pathlib.Path,
    metrics_file: pathlib.Path,
    results: report.Results,
    outcome: Outcome,
    source: Sequence,
    frames: pipeline.FrameOptions,
    *,
    queries: int,
    title: str,
) -> None:
    """Writes the page with plots and sheets of what retrieval found and of captions and answers; prints the table.

    Args:
      outcome: of `source`.
      queries: rows of each sheet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sheets = {}
    if outcome.retrieval is not None:
        sheets["Retrieval"] = folder / "retrieval.png"
        draw_retrieval_sheet(sheets["Retrieval"], outcome.retrieval, source, frames, queries)
    if samples := choose_samples(outcome, source, frames, queries):
        sheets["Captions and answers"] = folder / "samples.png"
        sample_sheet(sheets["Captions and answers"], samples)
    page = report.write_report(folder, metrics_file, results, sheets=sheets, title=title)
    print(retrieval.format_table(results))
    print(f"report: {page}")


def draw_retrieval_sheet(
    path: Any, found: Retrieval, source: Sequence, frames: pipeline.FrameOptions, queries: int
) -> None:
    """Draws evenly chosen queries of an evaluation, each with its five best clips."""
    captions, clips = found.similarity.shape
    chosen = _evenly(captions, queries)
    best = np.argsort(-found.similarity[chosen], axis=1, kind="stable")[:, : min(5, clips)]  # [Q, 5]
    scores = np.take_along_axis(found.similarity[chosen], best, axis=1)
    own = found.clip_of_caption[chosen]
    positives = own[:, None] == np.arange(clips)
    contact_sheet.retrieval_contact_sheet(
        path,
        [found.captions[i] for i in chosen],
        [[frames.decode(_clip(source, found.indices[column]), None) for column in row] for row in best],
        best == own[:, None],
        scores,
        ranks=retrieval.ranks(found.similarity[chosen], positives),
    )


def choose_samples(outcome: Outcome, source: Sequence, frames: pipeline.FrameOptions, count: int) -> list[Sample]:
    """Evenly chosen clips of those that the model has written about, with its texts."""
    captions = outcome.captions.captions if outcome.captions else {}
    answers: dict[int, list[tuple[str, str, str, bool]]] = collections.defaultdict(list)
    if outcome.answers:
        _, answered, headline, judged = outcome.answers
        for each, answer, right in zip(answered, headline, judged, strict=True):
            answers[each.index].append((each.question.question, answer, each.question.answer, right))
    written = sorted({*captions, *answers})
    samples = []
    for index in [written[place] for place in _evenly(len(written), count)] if written else []:
        clip = _clip(source, index)
        shown = frames.decode(clip, None)
        samples.append(Sample(clip.id, shown, clip.captions, captions.get(index), tuple(answers[index])))
    return samples


def _evenly(length: int, count: int) -> np.ndarray:
    return np.linspace(0, length - 1, min(count, length)).round().astype(int)


def _clip(source: Sequence, index: int | np.integer) -> schema.Clip:
    return schema.from_example(source[int(index)])
