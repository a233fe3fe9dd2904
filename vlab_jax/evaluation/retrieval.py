"""Retrieval and multiple-choice metrics: pure functions of similarity matrices.

Ties are broken pessimistically: a wrong candidate that scores as high as the right one ranks above it, so a
model that scores everything alike gets nothing. Each query yields exactly one rank, under ties too; CLIP4Clip
finds ranks by matching values (`metrics.py`, `compute_metrics`) and so counts a tied query several times.

Letters in shapes: `q` queries, `c` candidates; `C` captions, `V` videos.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import SupportsFloat, SupportsIndex

import numpy as np
from jaxtyping import Bool, Float, Int

DIRECTIONS = {"text_to_video": "text to video", "video_to_text": "video to text"}
COLUMNS = {"R@1": "R@1", "R@5": "R@5", "R@10": "R@10", "median_rank": "MdR", "mean_rank": "MnR"}
LOWER_IS_BETTER = ("median_rank", "mean_rank", "QA count MSE")

# Rows ranked at a time: bounds the temporary arrays, which are as wide as there are candidates.
_BLOCK = 4096


def ranks(similarity: Float[np.ndarray, "q c"], positives: Bool[np.ndarray, "q c"]) -> Int[np.ndarray, " q"]:
    """1-based rank of each query's best-scoring positive; ties with negatives count against it.

    Other positives never count against the best one.

    Args:
        similarity: higher is more alike; -inf is allowed, NaN is not.
        positives: which candidates are right for a query; at least one each.

    Raises:
        ValueError: a similarity is NaN, or a query has no positive.
    """
    blocks = [
        _block_ranks(similarity[start : start + _BLOCK], positives[start : start + _BLOCK], start)
        for start in range(0, len(similarity), _BLOCK)
    ]
    return np.concatenate(blocks) if blocks else np.zeros(0, np.int64)


def _block_ranks(similarity: np.ndarray, positives: np.ndarray, first_query: int) -> np.ndarray:
    if (bad := np.argwhere(np.isnan(similarity))).size:
        query, candidate = bad[0]
        raise ValueError(f"similarity of query {first_query + query} and candidate {candidate} is NaN")
    if (lonely := np.flatnonzero(~positives.any(axis=1))).size:
        raise ValueError(f"query {first_query + lonely[0]} has no positive candidate, so it has no rank")
    best = np.max(similarity, axis=1, where=positives, initial=-np.inf, keepdims=True)
    return 1 + np.count_nonzero((similarity >= best) & ~positives, axis=1)


def retrieval_metrics(
    similarity: Float[np.ndarray, "C V"], video_of_caption: Int[np.ndarray, " C"]
) -> dict[str, float]:
    """Recall and ranks in both directions, several captions per video allowed.

    Every caption is a text-to-video query. Video to text takes the best-ranked of a video's captions. A video
    without a caption is a distractor: a candidate for captions, never a query.

    Args:
        similarity: captions by videos.
        video_of_caption: column of the video that a caption describes.

    Returns:
        `text_to_video/` and `video_to_text/` times `R@1`, `R@5`, `R@10` (percent, 0 to 100), `median_rank`
        and `mean_rank` (1 is best).

    Raises:
        ValueError: no caption, a NaN, or an index that names no video.
    """
    return {
        name: value
        for direction in DIRECTIONS
        for name, value in direction_metrics(similarity, video_of_caption, direction).items()
    }


def direction_metrics(
    similarity: Float[np.ndarray, "C V"], video_of_caption: Int[np.ndarray, " C"], direction: str
) -> dict[str, float]:
    """`retrieval_metrics` of one of `DIRECTIONS`; arguments and errors are the same."""
    captions, videos = similarity.shape
    if captions == 0:
        raise ValueError("no caption to retrieve with: the similarity matrix has no rows")
    if video_of_caption.min() < 0 or video_of_caption.max() >= videos:
        wrong = int(np.flatnonzero((video_of_caption < 0) | (video_of_caption >= videos))[0])
        raise ValueError(f"caption {wrong} belongs to video {video_of_caption[wrong]}, but there are {videos} videos")
    positives = video_of_caption[:, None] == np.arange(videos)
    if direction == "text_to_video":
        query_ranks = ranks(similarity, positives)
    else:
        described = positives.any(axis=0)
        query_ranks = ranks(similarity[:, described].T, positives[:, described].T)
    return {f"{direction}/{name}": value for name, value in _summary(query_ranks).items()}


def _summary(query_ranks: np.ndarray) -> dict[str, float]:
    recalls = {f"R@{k}": 100.0 * float(np.mean(query_ranks <= k)) for k in (1, 5, 10)}
    return {**recalls, "median_rank": float(np.median(query_ranks)), "mean_rank": float(np.mean(query_ranks))}


def multiple_choice_hits(
    scores: Sequence[Sequence[SupportsFloat] | np.ndarray], answers: Sequence[SupportsIndex] | np.ndarray
) -> Bool[np.ndarray, " q"]:
    """Whether the right option of each question scores above all others; a tie is a miss.

    Args:
        scores: per question, one score per option; numbers of options may differ.
        answers: per question, the index of its right option.

    Raises:
        ValueError: lengths differ, a question has fewer than two options, a score is NaN, or an answer names
            no option.
    """
    if len(scores) != len(answers):
        raise ValueError(f"{len(scores)} questions have scores, but {len(answers)} have answers")
    return np.array([_hit(i, *pair) for i, pair in enumerate(zip(scores, answers, strict=True))], dtype=bool)


def _hit(question: int, scores: Sequence[SupportsFloat] | np.ndarray, answer: SupportsIndex) -> bool:
    options, answer = np.asarray(scores, dtype=np.float64), operator.index(answer)
    if options.ndim != 1 or options.size < 2:
        raise ValueError(f"question {question} needs a list of at least two scores, not shape {options.shape}")
    if np.isnan(options).any():
        raise ValueError(f"question {question} has a NaN among its scores")
    if not 0 <= answer < options.size:
        raise ValueError(f"question {question} has {options.size} options, but its answer is option {answer}")
    return bool(np.delete(options, answer).max() < options[answer])


def multiple_choice_accuracy(
    scores: Sequence[Sequence[SupportsFloat] | np.ndarray], answers: Sequence[SupportsIndex] | np.ndarray
) -> float:
    """Percent (0 to 100) of questions whose right option scores above all others; a tie is a miss.

    It serves twin accuracy (two options) and MSRVTT multiple choice (five). Arguments and errors are those of
    `multiple_choice_hits`; no question at all is a ValueError too.
    """
    if len(scores) == 0:
        raise ValueError("no question to answer: accuracy is undefined")
    return 100.0 * float(np.mean(multiple_choice_hits(scores, answers)))


def by_type(
    scores: Sequence[Sequence[SupportsFloat] | np.ndarray],
    answers: Sequence[SupportsIndex] | np.ndarray,
    types: Sequence[str],
) -> dict[str, float]:
    """`multiple_choice_accuracy` of each question type, in percent, types in alphabetical order."""
    hits = multiple_choice_hits(scores, answers)
    if len(types) != len(hits):
        raise ValueError(f"{len(hits)} questions have scores, but {len(types)} have a type")
    labels = np.asarray(types, dtype=object)
    return {name: 100.0 * float(np.mean(hits[labels == name])) for name in sorted(set(types))}


def table(
    results: Mapping[str, Mapping[str, SupportsFloat]],
) -> tuple[list[str], list[str], list[list[str]]]:
    """The cells of a results table: columns of retrieval in the usual order, then whatever else there is.

    Args:
        results: metrics of each row (a stage, a protocol), by row name.

    Returns:
        Headings (`R@1`), the group that each belongs to (`text to video`; empty for other columns), and the
        rows; a metric that a row lacks is `-`.
    """
    present = dict.fromkeys(key for metrics in results.values() for key in metrics)
    known = {f"{d}/{c}": (heading, group) for d, group in DIRECTIONS.items() for c, heading in COLUMNS.items()}
    columns = {key: label for key, label in known.items() if key in present}
    columns |= {key: (key.replace("_", " "), "") for key in present if key not in known}
    headings = [""] + [heading for heading, _ in columns.values()]
    groups = [""] + [group for _, group in columns.values()]
    rows = [[name] + [_cell(metrics.get(key)) for key in columns] for name, metrics in results.items()]
    return headings, groups, rows


def _cell(value: SupportsFloat | None) -> str:
    return "-" if value is None else f"{float(value):.1f}"


def format_table(results: Mapping[str, Mapping[str, SupportsFloat]]) -> str:
    """Aligned text for a terminal, with the retrieval direction above its columns.

    Args:
        results: metrics of each row, by row name: keys of `retrieval_metrics`, and others as extra columns.
    """
    if not results:
        return "(no results)"
    headings, groups, rows = table(results)
    widths = _widths(groups, [headings, *rows])
    lines = [_group_line(groups, widths)] if any(groups) else []
    lines.append(_text_line(headings, widths))
    lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
    lines += [_text_line(row, widths) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _widths(groups: Sequence[str], cells: Sequence[Sequence[str]]) -> list[int]:
    widths = [max(len(row[i]) for row in cells) for i in range(len(groups))]
    for group in set(groups) - {""}:
        indices = [i for i, name in enumerate(groups) if name == group]
        span = sum(widths[i] for i in indices) + 2 * (len(indices) - 1)
        # A group of few columns is widened until its name fits above it.
        widths[indices[0]] += max(0, len(group) - span)
    return widths


def _text_line(row: Sequence[str], widths: Sequence[int]) -> str:
    # Two spaces between columns; names to the left, figures to the right.
    return "  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)])


def _group_line(groups: Sequence[str], widths: Sequence[int]) -> str:
    line = ""
    for group in dict.fromkeys(groups):
        first = groups.index(group)
        line = line.ljust(sum(widths[:first]) + 2 * first) + group
    return line


def format_markdown(results: Mapping[str, Mapping[str, SupportsFloat]]) -> str:
    """The same table in GitHub's Markdown, the retrieval direction written out in each heading."""
    if not results:
        return "(no results)"
    headings, groups, rows = table(results)
    names = [f"{group} {heading}".strip() for heading, group in zip(headings, groups, strict=True)]
    rule = [":--"] + ["--:"] * (len(names) - 1)
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in [names, rule, *rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in escaped)
