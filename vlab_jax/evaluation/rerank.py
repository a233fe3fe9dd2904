"""Retrieval in two steps: the clips that embeddings find best are ranked anew by the decoder.

The decoder, which looks at a clip's tokens while it reads, says how likely the query is as a caption of the clip. Only
text to video is ranked anew: likelihoods of one text under several clips compare, those of several texts under one
clip favour short and common texts.

Dimensions: `C` captions, `V` clips, `k` clips that are ranked anew.
"""

import collections
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float

from vlab_jax.data.pieces import Batch
from vlab_jax.evaluation import retrieval
from vlab_jax.evaluation.run import Encoder, Retrieval
from vlab_jax.models.cached_decoder import Memory
from vlab_jax.models.likelihood import TEXTS_AT_ONCE, chunks, stacked, text_likelihoods
from vlab_jax.runtime import processes


def rerank(
    encoder: Encoder,
    source: Sequence,
    found: Retrieval,
    best: int,
    *,
    max_failed_share: float = 0.01,
    update: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Figures of `retrieval.retrieval_metrics`, of text to video alone, with the `best` clips of each query re-ranked.

    Args:
      source: a data source of the schema.
      found: what `evaluate_retrieval` made of it.
      best: clips of a query that are ranked anew, `k`; the order of all others is that of `found`, behind them.
      max_failed_share: see `pipeline.FailureCount`.
      update: called with the number of clips done.
    """
    likelihood = candidate_likelihoods(encoder, source, found, best, max_failed_share, update)
    merged = put_first(found.similarity, likelihood)
    return retrieval.direction_metrics(merged, found.clip_of_caption, "text_to_video")


def put_first(similarity: Float[np.ndarray, "C V"], likelihood: Float[np.ndarray, "C V"]) -> Float[np.ndarray, "C V"]:
    """Scores that rank what has a likelihood by it, and behind it the rest by similarity.

    Args:
      similarity: cosines, -1 to 1.
      likelihood: of the candidates; NaN elsewhere. Equal ones stay equal, so that ties count as everywhere.
    """
    lowest = np.nanmin(likelihood, axis=1, keepdims=True)
    return np.where(np.isnan(likelihood), lowest - 3.0 + similarity, likelihood)


def candidate_likelihoods(
    encoder: Encoder,
    source: Sequence,
    found: Retrieval,
    best: int,
    max_failed_share: float,
    update: Callable[[int], None],
) -> Float[np.ndarray, "C V"]:
    """The log-likelihood of each caption given each of its `best` clips; NaN for other clips."""
    likelihood = np.full(found.similarity.shape, np.nan)
    # [C, k]; other processors may round similarities otherwise, and each process ranks for all.
    candidates = processes.agreed(lambda: np.argsort(-found.similarity, axis=1, kind="stable")[:, :best])
    captions_of: dict[int, list[int]] = collections.defaultdict(list)
    for caption, columns in enumerate(candidates):
        for column in columns.tolist():
            captions_of[column].append(caption)
    at_once = max(1, TEXTS_AT_ONCE // encoder.batch)
    column_of = {int(index): column for column, index in enumerate(found.indices)}

    def score(batch: Batch, video: jax.Array) -> Iterator[tuple[int, tuple[Sequence[int], np.ndarray]]]:
        asked = []
        for row in np.flatnonzero(batch["valid"]).tolist():
            column = column_of[int(batch["index"][row])]
            asked += [(row, part) for part in chunks(captions_of[column], at_once)]
        memory = encoder.remember(video)
        for chunk in chunks(asked, encoder.batch):
            rows = np.zeros(encoder.batch, np.int32)
            rows[: len(chunk)] = [row for row, _ in chunk]
            texts = [[found.captions[caption] for caption in part] for _, part in chunk]
            scores = _likelihoods(encoder, memory, rows, texts + [[]] * (encoder.batch - len(chunk)))
            for (row, part), line in zip(chunk, scores, strict=False):
                yield int(batch["index"][row]), (part, line[: len(part)])

    for index, (part, scores) in encoder.of_clips(source, score, max_failed_share, update):
        likelihood[part, column_of[index]] = scores
    return likelihood


def _likelihoods(
    encoder: Encoder, memory: Memory, rows: np.ndarray, texts: Sequence[Sequence[str]]
) -> Float[np.ndarray, "Q R"]:
    """Of captions, whole."""
    tokenizer = encoder.tokenizer
    prefix = (np.full((len(rows), 1), tokenizer.start, np.int32), np.ones(len(rows), np.int32))
    ids = stacked([tokenizer.behind_start(some) for some in texts], tokenizer.context_length - 1)
    return text_likelihoods(encoder.model, encoder.parameters["decoder"], memory, rows, prefix, ids)
