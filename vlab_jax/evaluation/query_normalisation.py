"""Retrieval with the hubs evened out: dual softmax and QB-Norm, as rows of their own beside the headline.

A hub is a clip that many queries find near, right or not. Both ways push it down by what other queries make of it: dual
softmax by the other queries of the test, which no one query in use has beside it; QB-Norm by a bank of captions that
were trained on. Their figures compare with published ones of the same kind alone, and never replace the plain ones.

Dimensions: `q` queries, `c` candidates, `b` captions of the bank; `C` captions, `V` clips.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from vlab_jax.data import schema
from vlab_jax.data.pieces import Batch
from vlab_jax.errors import InputError
from vlab_jax.evaluation import retrieval
from vlab_jax.evaluation.encoder import Encoder, Retrieval
from vlab_jax.models.decoder import Memory
from vlab_jax.models.likelihood import TEXTS_AT_ONCE, chunks, stacked, text_likelihoods
from vlab_jax.runtime import sharding

# FOLDED vlab_jax/evaluation/query_normalisation.py: Retrieval in two steps: the clips that embeddings find best are ranked anew
# by the decoder.  The decoder, which looks at a clip's tokens while it reads, says how likely the query is as a
# caption of the clip. Only text to video is ranked anew: likelihoods of one text under several clips compare, those
# of several texts under one clip favour short and common texts.  Dimensions: `C` captions, `V` clips, `k` clips
# that are ranked anew.


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
    candidates = sharding.agreed(lambda: np.argsort(-found.similarity, axis=1, kind="stable")[:, :best])
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


DUAL_SOFTMAX, QUERYBANK = "dual_softmax", "querybank"
METHODS = {DUAL_SOFTMAX: "dual softmax", QUERYBANK: "QB-Norm"}  # and what their rows are called

_BLOCK = 1024  # captions of the bank compared at a time


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Which rows there are besides the headline, and how they come about.

    Attributes:
      methods: of `dual_softmax` and `querybank`.
      temperature: of dual softmax.
      bank_size: training captions in the bank.
      inverse_temperature: of QB-Norm, its beta.
    """

    methods: tuple[str, ...] = ()
    temperature: float = 0.01
    bank_size: int = 10_000
    inverse_temperature: float = 20.0

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Normalisation":
        """What the fields of a config's `evaluation` say."""
        return cls(
            tuple(fields["query_normalisation"]),
            float(fields["dual_softmax_temperature"]),
            fields["querybank_size"],
            float(fields["querybank_beta"]),
        )

    def rows(
        self, encoder: Encoder, found: Retrieval, training: Callable[[], Sequence[Sequence]]
    ) -> dict[str, dict[str, float]]:
        """Figures of `retrieval.retrieval_metrics` by the name of the row; of QB-Norm, text to video alone.

        Args:
          found: what `evaluate_retrieval` made of the split.
          training: opens the splits trained on, whose captions make the bank.
        """
        rows = {}
        if DUAL_SOFTMAX in self.methods:
            figures = dual_softmax_metrics(found.similarity, found.clip_of_caption, self.temperature)
            rows[METHODS[DUAL_SOFTMAX]] = figures
        if QUERYBANK in self.methods:
            captions = sharding.agreed(lambda: choose_captions(training(), self.bank_size))
            bank = encoder.embed_texts(captions) @ found.embeddings.T
            normalised = querybank(found.similarity, bank, self.inverse_temperature)
            figures = retrieval.direction_metrics(normalised, found.clip_of_caption, "text_to_video")
            rows[METHODS[QUERYBANK]] = figures
        return rows


def dual_softmax(similarity: Float[np.ndarray, "q c"], temperature: float) -> Float[np.ndarray, "q c"]:
    """Each similarity times the share that its query has among all queries of the same candidate.

    The share is a softmax over the queries. Of CAMoE (arXiv 2109.04290), whose loss it is a part of; tables compare its
    use on the test's own queries, with a temperature of 1/100 on cosines, CLIP's largest logit scale
    (github.com/microsoft/XPretrain, CLIP-ViP). With one query nothing changes. A negative cosine comes nearer to 0 by a
    small share, which lifts it: so the published formula has it.
    """
    logits = similarity.astype(np.float64) / temperature
    share = np.exp(logits - _log_sum_exp(logits))
    return similarity * share


def dual_softmax_metrics(
    similarity: Float[np.ndarray, "C V"], clip_of_caption: Int[np.ndarray, " C"], temperature: float
) -> dict[str, float]:
    """`retrieval.retrieval_metrics`, each direction normalised over its own queries: captions, or described clips."""
    described = np.isin(np.arange(similarity.shape[1]), clip_of_caption)
    to_video = dual_softmax(similarity, temperature)
    to_text = np.zeros(similarity.shape)
    to_text[:, described] = dual_softmax(similarity[:, described].T, temperature).T
    return {
        **retrieval.direction_metrics(to_video, clip_of_caption, "text_to_video"),
        **retrieval.direction_metrics(to_text, clip_of_caption, "video_to_text"),
    }


def querybank(
    similarity: Float[np.ndarray, "q c"], bank: Float[np.ndarray, "b c"], inverse_temperature: float
) -> Float[np.ndarray, "q c"]:
    """Scores whose order in each row is that of QB-Norm's dynamic inverted softmax (arXiv 2112.12777).

    A query whose nearest candidate is also the nearest of some caption in the bank is normalised: the exponential of
    each similarity is divided by the sum of the bank's, candidate by candidate. Any other query keeps its similarities.
    Both are the defaults of the authors' code (github.com/ioanacroi/qb-norm): beta 20, and of each caption in the bank
    the one nearest candidate.

    Args:
      bank: similarities of the bank's captions with the same candidates, at least one.
      inverse_temperature: beta.

    Returns:
      Logarithms of what is divided, which have the same order and do not overflow.
    """
    sums = np.full(similarity.shape[1], -np.inf)
    for first in range(0, len(bank), _BLOCK):
        block = inverse_temperature * bank[first : first + _BLOCK].astype(np.float64)
        sums = np.logaddexp(sums, _log_sum_exp(block))
    hubs = np.zeros(similarity.shape[1], bool)
    hubs[bank.argmax(axis=1)] = True
    active = hubs[similarity.argmax(axis=1)]
    normalised = inverse_temperature * similarity.astype(np.float64) - sums
    return np.where(active[:, None], normalised, similarity)


def _log_sum_exp(logits: Float[np.ndarray, "q c"]) -> Float[np.ndarray, " c"]:
    """Over the queries."""
    highest = logits.max(axis=0)
    return highest + np.log(np.exp(logits - highest).sum(axis=0))


def choose_captions(sources: Sequence[Sequence], size: int, seed: int = 0) -> list[str]:
    """Captions of training splits, as many from each clip as it takes, of clips in random order.

    Args:
      sources: data sources of the schema.
      size: how many captions; fewer where there are not as many.

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
        drawn = rng.permutation(len(captions))[:each]
        chosen += [captions[number] for number in drawn]
    if not chosen:
        raise InputError("no clip trained on has a caption; without, config.evaluation.query_normalisation has no bank")
    return chosen[:size]
