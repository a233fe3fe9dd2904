"""Text-to-video and video-to-text retrieval: by embeddings, and with the best clips re-ranked by the decoder.

The decoder, which reads a query with a clip's tokens before it, says how likely the query is as a caption of the clip.
Only text to video is re-ranked: likelihoods of one text under several clips compare; those of several texts under one
clip favour short and common texts.

Dimensions: `C` captions, `V` clips, `E` embedding width, `k` clips of a query that are re-ranked.
"""

import collections
import dataclasses
import functools
import logging
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float

from vlab_jax.data import schema
from vlab_jax.data.batches import Batch
from vlab_jax.errors import InputError
from vlab_jax.evaluation import sheets
from vlab_jax.evaluation.answers import chosen_options, mean_by_type
from vlab_jax.evaluation.encoder import Encoder, all_without_media
from vlab_jax.evaluation.plan import Plan, TaskResult
from vlab_jax.evaluation.retrieval_metrics import (
    DUAL_SOFTMAX,
    METHODS,
    QUERYBANK,
    direction_metrics,
    dual_softmax_metrics,
    querybank,
    ranks,
    retrieval_metrics,
)
from vlab_jax.models.generation import TEXTS_AT_ONCE, chunks, stack_texts, text_likelihoods
from vlab_jax.runtime import sharding


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """The outcome of a retrieval evaluation.

    Attributes:
      metrics: as `retrieval_metrics`, and `<type>_accuracy` of multiple choice.
      captions: the `C` queries; clip_of_caption: the row of each one's clip.
      similarity: cosine of caption and clip, `[C, V]`.
      indices: each clip's index in the source, `[V]`.
      embeddings: the clips', `[V, E]`.
    """

    metrics: dict[str, float]
    captions: tuple[str, ...]
    clip_of_caption: np.ndarray
    similarity: np.ndarray
    indices: np.ndarray
    embeddings: np.ndarray

    def best_clips(self, captions: np.ndarray | slice, count: int) -> np.ndarray:
        """The columns of the `count` most similar clips of some captions, best first: `[captions, count]`."""
        return np.argsort(-self.similarity[captions], axis=1, kind="stable")[:, :count]


def evaluate(encoder: Encoder, source: Sequence, plan: Plan, folder: pathlib.Path | None) -> TaskResult:
    """Runs the task; see `registry`. The rows are those of query normalisation and of re-ranking."""
    found = evaluate_retrieval(encoder, source, plan.multiple_choice)
    rows = normalised_rows(encoder, found, plan)
    if plan.rerank:
        rows[f"best {plan.rerank} re-ranked"] = rerank(encoder, source, found, plan.rerank)
    sheet = ("Retrieval", "retrieval.png", functools.partial(draw_sheet, found))
    return TaskResult(found.metrics, rows, sheets=[sheet])


def evaluate_retrieval(encoder: Encoder, source: Sequence, multiple_choice: Sequence[str] = ()) -> Retrieval:
    """Every caption is a query; `multiple_choice` names the types of questions to answer by similarity.

    Raises:
      InputError: the split is empty, or none of its clips has a caption.
    """
    if not len(source):
        raise InputError("the split to evaluate is empty")
    embeddings, indices = encoder.embed_clips(source)
    clips = all_without_media(source, indices.tolist())
    captions = [caption for clip in clips for caption in clip.captions]
    if not captions:
        raise InputError("no clip of the split to evaluate has a caption")
    clip_of_caption = np.repeat(np.arange(len(clips)), [len(clip.captions) for clip in clips])
    pairs = [(row, q) for row, clip in enumerate(clips) for q in clip.questions if q.type in multiple_choice]
    pairs = [(row, question) for row, question in pairs if question.options]
    texts = list(dict.fromkeys([*captions, *(option for _, question in pairs for option in question.options)]))
    place = {text: row for row, text in enumerate(texts)}
    embedded = encoder.embed_texts(texts)
    similarity = embedded[[place[caption] for caption in captions]] @ embeddings.T
    metrics = retrieval_metrics(similarity, clip_of_caption)
    if pairs:
        scores = [embedded[[place[option] for option in q.options]] @ embeddings[row] for row, q in pairs]
        questions = [question for _, question in pairs]
        chosen = chosen_options(scores, questions)
        hits = [option == question.answer for option, question in zip(chosen, questions, strict=True)]
        accuracy = mean_by_type(hits, [question.type for question in questions])
        metrics |= {f"{kind}_accuracy": share for kind, share in accuracy.items()}
    logging.info("evaluated %d clips with %d captions", len(clips), len(captions))
    return Retrieval(metrics, tuple(captions), clip_of_caption, similarity, indices, embeddings)


def normalised_rows(encoder: Encoder, found: Retrieval, plan: Plan) -> dict[str, dict[str, float]]:
    """The rows of normalised queries by name: figures of `retrieval_metrics`, of QB-Norm text to video alone."""
    rows = {}
    if DUAL_SOFTMAX in plan.query_normalisation:
        figures = dual_softmax_metrics(found.similarity, found.clip_of_caption, plan.dual_softmax_temperature)
        rows[METHODS[DUAL_SOFTMAX]] = figures
    if QUERYBANK in plan.query_normalisation:
        captions = sharding.from_primary(lambda: choose_captions(plan.training(), plan.querybank_size))
        bank = encoder.embed_texts(captions) @ found.embeddings.T
        normalised = querybank(found.similarity, bank, plan.querybank_beta)
        rows[METHODS[QUERYBANK]] = direction_metrics(normalised, found.clip_of_caption, "text_to_video")
    return rows


def choose_captions(sources: Sequence[Sequence], size: int, seed: int = 0) -> list[str]:
    """At most `size` captions of training splits for the bank: of clips in random order, equally many from each.

    Raises:
      InputError: there is none.
    """
    rng = np.random.default_rng(seed)
    places = [(source, index) for source in sources for index in range(len(source))]
    each = math.ceil(size / len(places)) if places else 0
    chosen: list[str] = []
    for place in rng.permutation(len(places)):
        if len(chosen) >= size:
            break
        source, index = places[place]
        captions = schema.from_example(source[index]).captions
        chosen += [captions[number] for number in rng.permutation(len(captions))[:each]]
    if not chosen:
        raise InputError("no training clip has a caption, so config.evaluation.query_normalisation has no bank")
    return chosen[:size]


def rerank(encoder: Encoder, source: Sequence, found: Retrieval, best: int) -> dict[str, float]:
    """Figures of `retrieval_metrics`, of text to video alone, with the `best` clips of each query re-ranked.

    All other clips keep their order, behind them.
    """
    likelihood = candidate_likelihoods(encoder, source, found, best)
    return direction_metrics(put_first(found.similarity, likelihood), found.clip_of_caption, "text_to_video")


def put_first(similarity: Float[np.ndarray, "C V"], likelihood: Float[np.ndarray, "C V"]) -> Float[np.ndarray, "C V"]:
    """Scores that rank candidates with a likelihood by it, and behind them the rest by similarity.

    Args:
      similarity: cosines, -1 to 1.
      likelihood: of the candidates; NaN elsewhere. Equal ones stay equal, so that ties count as everywhere.
    """
    lowest = np.nanmin(likelihood, axis=1, keepdims=True)
    return np.where(np.isnan(likelihood), lowest - 3.0 + similarity, likelihood)


def candidate_likelihoods(encoder: Encoder, source: Sequence, found: Retrieval, best: int) -> Float[np.ndarray, "C V"]:
    """The log-likelihood of each caption given each of its `best` clips; NaN for other clips."""
    likelihood = np.full(found.similarity.shape, np.nan)
    # [C, k]; of one process for all, because other processors may round similarities differently.
    candidates = sharding.from_primary(lambda: found.best_clips(slice(None), best))
    captions_of: dict[int, list[int]] = collections.defaultdict(list)
    for caption, columns in enumerate(candidates):
        for column in columns.tolist():
            captions_of[column].append(caption)
    at_once = max(1, TEXTS_AT_ONCE // encoder.batch)
    column_of = {int(index): column for column, index in enumerate(found.indices)}
    tokenizer, decoder = encoder.tokenizer, encoder.parameters["decoder"]
    prefix = np.full((encoder.batch, 1), tokenizer.start, np.int32), np.ones(encoder.batch, np.int32)

    def score(batch: Batch, video: jax.Array) -> Iterator[tuple[int, tuple[Sequence[int], np.ndarray]]]:
        queries = []
        for row in np.flatnonzero(batch["valid"]).tolist():
            column = column_of[int(batch["index"][row])]
            queries += [(row, part) for part in chunks(captions_of[column], at_once)]
        visual = encoder.cache_visual(video)
        for chunk in chunks(queries, encoder.batch):
            rows = np.zeros(encoder.batch, np.int32)
            rows[: len(chunk)] = [row for row, _ in chunk]
            texts = [tokenizer.encode_without_bos([found.captions[caption] for caption in part]) for _, part in chunk]
            ids = stack_texts(texts + [[]] * (encoder.batch - len(chunk)), tokenizer.context_length - 1)
            scores = text_likelihoods(encoder.model, decoder, visual, rows, prefix, ids)
            for (row, part), line in zip(chunk, scores, strict=False):
                yield int(batch["index"][row]), (part, line[: len(part)])

    for index, (part, scores) in encoder.map_clips(source, "re-rank", score):
        likelihood[part, column_of[index]] = scores
    return likelihood


def draw_sheet(found: Retrieval, path: pathlib.Path, count: int, frames_of: Callable[[int], np.ndarray]) -> None:
    """Draws evenly chosen queries, each with its five best clips; see `plan.DrawSheet`."""
    chosen = sheets.evenly(len(found.captions), count)
    best, own = found.best_clips(chosen, 5), found.clip_of_caption[chosen]
    sheets.retrieval_sheet(
        path,
        [found.captions[i] for i in chosen],
        [[frames_of(int(found.indices[column])) for column in row] for row in best],
        best == own[:, None],
        np.take_along_axis(found.similarity[chosen], best, axis=1),
        ranks(found.similarity[chosen], own[:, None] == np.arange(len(found.indices))),
    )
