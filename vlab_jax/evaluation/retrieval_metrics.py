"""Retrieval metrics, plain and with normalised queries: pure functions of similarity matrices.

Ties are broken pessimistically: a wrong candidate that scores as high as the right one ranks above it, so a model that
scores everything alike gets nothing. Each query yields exactly one rank, under ties too; CLIP4Clip finds ranks by
matching values (`metrics.py`, `compute_metrics`) and so counts a tied query several times.

A hub is a clip that is near many queries, right or not. Dual softmax lowers it by the similarities of the test's other
queries, which a search in use does not have; QB-Norm by those of a bank of training captions. Their figures compare
only with published ones of the same kind, and never replace the plain ones.

Dimensions: `q` queries, `c` candidates, `b` captions of the bank; `C` captions, `V` clips.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

DIRECTIONS = {"text_to_video": "text to video", "video_to_text": "video to text"}
DUAL_SOFTMAX, QUERYBANK = "dual_softmax", "querybank"
METHODS = {DUAL_SOFTMAX: "dual softmax", QUERYBANK: "QB-Norm"}  # of normalising queries, and the names of their rows

# Rows ranked, and captions of the bank compared, at a time: they bound the temporary arrays.
_BLOCK, _BANK_BLOCK = 4096, 1024


def ranks(similarity: Float[np.ndarray, "q c"], positives: Bool[np.ndarray, "q c"]) -> Int[np.ndarray, " q"]:
    """1-based rank of each query's best-scoring positive; ties with negatives count against it.

    Other positives never count against the best one.

    Args:
      similarity: higher is more alike; -inf is allowed, NaN is not.
      positives: which candidates are right for a query; at least one each.

    Raises:
      ValueError: a similarity is NaN, or a query has no positive.
    """
    found = [np.zeros(0, np.int64)]
    for first in range(0, len(similarity), _BLOCK):
        scores, right = similarity[first : first + _BLOCK], positives[first : first + _BLOCK]
        if (bad := np.argwhere(np.isnan(scores))).size:
            raise ValueError(f"similarity of query {first + bad[0, 0]} and candidate {bad[0, 1]} is NaN")
        if (lonely := np.flatnonzero(~right.any(axis=1))).size:
            raise ValueError(f"query {first + lonely[0]} has no positive candidate, so it has no rank")
        best = np.max(scores, axis=1, where=right, initial=-np.inf, keepdims=True)
        found.append(1 + np.count_nonzero((scores >= best) & ~right, axis=1))
    return np.concatenate(found)


def retrieval_metrics(similarity: Float[np.ndarray, "C V"], clip_of_caption: Int[np.ndarray, " C"]) -> dict[str, float]:
    """Recall and ranks in both directions, several captions per clip allowed.

    Every caption is a text-to-video query. Video to text takes the best-ranked of a clip's captions. A clip without a
    caption is a distractor: a candidate for captions, never a query.

    Args:
      clip_of_caption: column of the clip that a caption describes.

    Returns:
      `text_to_video/` and `video_to_text/` times `R@1`, `R@5`, `R@10` (percent, 0 to 100), `median_rank` and
      `mean_rank` (1 is best).

    Raises:
      ValueError: no caption, a NaN, or an index that names no clip.
    """
    directions = [direction_metrics(similarity, clip_of_caption, direction) for direction in DIRECTIONS]
    return directions[0] | directions[1]


def direction_metrics(
    similarity: Float[np.ndarray, "C V"], clip_of_caption: Int[np.ndarray, " C"], direction: str
) -> dict[str, float]:
    """`retrieval_metrics` of one of `DIRECTIONS`; arguments and errors are the same."""
    captions, clips = similarity.shape
    if captions == 0:
        raise ValueError("no caption to retrieve with: the similarity matrix has no rows")
    if (wrong := np.flatnonzero((clip_of_caption < 0) | (clip_of_caption >= clips))).size:
        raise ValueError(f"caption {wrong[0]} belongs to clip {clip_of_caption[wrong[0]]}, but there are {clips} clips")
    positives = clip_of_caption[:, None] == np.arange(clips)
    if direction == "text_to_video":
        found = ranks(similarity, positives)
    else:
        described = positives.any(axis=0)
        found = ranks(similarity[:, described].T, positives[:, described].T)
    summary = {f"R@{k}": 100.0 * float(np.mean(found <= k)) for k in (1, 5, 10)}
    summary |= {"median_rank": float(np.median(found)), "mean_rank": float(np.mean(found))}
    return {f"{direction}/{name}": value for name, value in summary.items()}


def dual_softmax(similarity: Float[np.ndarray, "q c"], temperature: float) -> Float[np.ndarray, "q c"]:
    """Each similarity times the share that its query has among all queries of the same candidate.

    The share is a softmax over the queries. It is part of the loss of CAMoE (arXiv 2109.04290); published tables apply
    it to the test's own queries, with a temperature of 1/100 on cosines, CLIP's largest logit scale
    (github.com/microsoft/XPretrain, CLIP-ViP). With one query nothing changes. A negative cosine times a small share
    comes nearer to 0, and so is raised, as in the published formula.
    """
    logits = similarity.astype(np.float64) / temperature
    return similarity * np.exp(logits - _log_sum_exp(logits))


def dual_softmax_metrics(
    similarity: Float[np.ndarray, "C V"], clip_of_caption: Int[np.ndarray, " C"], temperature: float
) -> dict[str, float]:
    """`retrieval_metrics`, each direction normalised over its own queries: captions, or clips that have a caption."""
    described = np.isin(np.arange(similarity.shape[1]), clip_of_caption)
    to_video = dual_softmax(similarity, temperature)
    to_text = np.zeros(similarity.shape)
    to_text[:, described] = dual_softmax(similarity[:, described].T, temperature).T
    return {
        **direction_metrics(to_video, clip_of_caption, "text_to_video"),
        **direction_metrics(to_text, clip_of_caption, "video_to_text"),
    }


def querybank(
    similarity: Float[np.ndarray, "q c"], bank: Float[np.ndarray, "b c"], beta: float
) -> Float[np.ndarray, "q c"]:
    """Scores that order each row as QB-Norm's dynamic inverted softmax does (arXiv 2112.12777).

    A query is normalised if its nearest candidate is also the nearest of some caption in the bank: the exponential of
    each similarity is divided by the sum of the bank's, candidate by candidate. Any other query keeps its similarities.
    Both are the defaults of the authors' code (github.com/ioanacroi/qb-norm): beta 20, and of each caption in the bank
    the one nearest candidate.

    Args:
      bank: similarities of the bank's captions with the same candidates, at least one.

    Returns:
      Logarithms of the quotients, which have the same order and do not overflow.
    """
    sums = np.full(similarity.shape[1], -np.inf)
    for first in range(0, len(bank), _BANK_BLOCK):
        block = beta * bank[first : first + _BANK_BLOCK].astype(np.float64)
        sums = np.logaddexp(sums, _log_sum_exp(block))
    hubs = np.zeros(similarity.shape[1], bool)
    hubs[bank.argmax(axis=1)] = True
    active = hubs[similarity.argmax(axis=1)]
    return np.where(active[:, None], beta * similarity.astype(np.float64) - sums, similarity)


def _log_sum_exp(logits: Float[np.ndarray, "q c"]) -> Float[np.ndarray, " c"]:
    """Over the queries."""
    highest = logits.max(axis=0)
    return highest + np.log(np.exp(logits - highest).sum(axis=0))
