"""Retrieval metrics against a slow computation that shares nothing with them, and against SciPy's ranks; dual softmax
and QB-Norm against plain Python.
"""

import math
import statistics

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from vlab_jax.evaluation.retrieval_metrics import (
    _BLOCK,
    dual_softmax,
    dual_softmax_metrics,
    querybank,
    ranks,
    retrieval_metrics,
)


def slow_rank(scores: list[float], positive: list[bool]) -> int:
    """Sorts the candidates, wrong ones first where scores tie, and looks for the first right one."""
    order = sorted(range(len(scores)), key=lambda c: (-scores[c], positive[c]))
    return 1 + next(place for place, candidate in enumerate(order) if positive[candidate])


def slow_metrics(similarity: np.ndarray, owner: list[int]) -> dict[str, float]:
    table = similarity.tolist()
    videos = range(len(table[0]))
    found = {
        "text_to_video": [slow_rank(row, [v == owner[c] for v in videos]) for c, row in enumerate(table)],
        "video_to_text": [slow_rank([row[v] for row in table], [o == v for o in owner]) for v in videos if v in owner],
    }
    metrics = {}
    for direction, places in found.items():
        for k in (1, 5, 10):
            metrics[f"{direction}/R@{k}"] = 100 * sum(place <= k for place in places) / len(places)
        metrics[f"{direction}/median_rank"] = statistics.median(places)
        metrics[f"{direction}/mean_rank"] = statistics.fmean(places)
    return metrics


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A similarity matrix of few distinct values, so that ties abound, and the video of each caption."""
    videos = draw(st.integers(1, 14))
    owner = draw(st.lists(st.integers(0, videos - 1), min_size=1, max_size=20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 2, 3, 8, 1000]))
    return rng.integers(0, levels, (len(owner), videos)).astype(np.float32), np.array(owner)


@settings(max_examples=300, deadline=None)
@given(problems())
def test_metrics_agree_with_a_slow_independent_computation(problem):
    similarity, owner = problem
    metrics = retrieval_metrics(similarity, owner)
    assert metrics == pytest.approx(slow_metrics(similarity, owner.tolist()), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 12))
def test_ranks_with_several_positives_agree_with_sorting(seed, queries, candidates):
    rng = np.random.default_rng(seed)
    similarity = rng.integers(0, 4, (queries, candidates)).astype(np.float64)
    positives = rng.random((queries, candidates)) < 0.4
    positives[np.arange(queries), rng.integers(0, candidates, queries)] = True
    expected = [slow_rank(s, p) for s, p in zip(similarity.tolist(), positives.tolist(), strict=True)]
    assert ranks(similarity, positives).tolist() == expected


@pytest.mark.parametrize("queries", [1, 40, _BLOCK + 7])
def test_ranks_with_one_positive_are_scipys_maximal_ranks(queries):
    rng = np.random.default_rng(queries)
    similarity = rng.integers(0, 5, (queries, 9)).astype(np.float32)
    right = rng.integers(0, 9, queries)
    expected = scipy.stats.rankdata(-similarity, method="max", axis=1)[np.arange(queries), right]
    np.testing.assert_array_equal(ranks(similarity, right[:, None] == np.arange(9)), expected)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(-50, 50), st.randoms(use_true_random=False))
def test_adding_a_constant_or_reordering_videos_and_captions_changes_nothing(problem, constant, random):
    similarity, owner = problem
    videos = np.array(random.sample(range(similarity.shape[1]), similarity.shape[1]))
    captions = np.array(random.sample(range(len(owner)), len(owner)))
    place_of_video = np.argsort(videos)
    shuffled = (similarity + np.float32(constant))[captions][:, videos]
    metrics = retrieval_metrics(similarity, owner)
    assert retrieval_metrics(shuffled, place_of_video[owner[captions]]) == pytest.approx(metrics)


def test_each_query_has_one_rank_even_when_everything_ties():
    # CLIP4Clip's computation yields 4 x 4 ranks here, and calls R@1 perfect.
    assert ranks(np.zeros((4, 4), np.float32), np.eye(4, dtype=bool)).tolist() == [4, 4, 4, 4]


def test_other_positives_do_not_count_against_the_best_one():
    similarity = np.array([[0.9, 0.8, 0.7, 0.9], [0.1, 0.9, 0.9, 0.3]])
    positives = np.array([[True, True, False, True], [True, False, False, True]])
    assert ranks(similarity, positives).tolist() == [1, 3]


def test_a_small_example_with_several_captions_worked_by_hand():
    similarity = np.array([[0.9, 0.1, 0.2], [0.3, 0.5, 0.6], [0.4, 0.4, 0.1]])
    metrics = retrieval_metrics(similarity, np.array([0, 0, 1]))
    # Captions rank 1 (0.9), 3 (0.3 below 0.5 and 0.6) and 2 (tied with video 0).
    assert metrics["text_to_video/R@1"] == pytest.approx(100 / 3)
    assert metrics["text_to_video/R@5"] == 100.0
    assert (metrics["text_to_video/median_rank"], metrics["text_to_video/mean_rank"]) == (2.0, 2.0)
    # Video 0 by its better caption: rank 1. Video 1: 0.4 below 0.5, rank 2. Video 2 has no caption.
    assert metrics["video_to_text/R@1"] == 50.0
    assert (metrics["video_to_text/median_rank"], metrics["video_to_text/mean_rank"]) == (1.5, 1.5)


def test_a_video_without_caption_distracts_captions_but_is_never_a_query():
    owner = np.array([0, 1])
    alone = retrieval_metrics(np.array([[0.9, 0.1], [0.2, 0.8]]), owner)
    crowded = retrieval_metrics(np.array([[0.9, 0.1, 1.0], [0.2, 0.8, 1.0]]), owner)
    assert alone["text_to_video/R@1"] == 100.0
    assert crowded["text_to_video/R@1"] == 0.0
    assert crowded["video_to_text/R@1"] == alone["video_to_text/R@1"] == 100.0


def test_masked_similarities_of_minus_infinity_rank_last():
    similarity = np.array([[-np.inf, 0.0, -np.inf]])
    assert ranks(similarity, np.array([[True, False, False]])).tolist() == [3]


def test_a_nan_or_a_query_without_positive_is_named_even_in_a_later_block():
    rows = _BLOCK + 3
    similarity, positives = np.zeros((rows, 2), np.float32), np.ones((rows, 2), bool)
    similarity[rows - 1, 1] = np.nan
    with pytest.raises(ValueError, match=f"query {rows - 1} and candidate 1 is NaN"):
        ranks(similarity, positives)
    positives[rows - 2] = False
    with pytest.raises(ValueError, match=f"query {rows - 2} has no positive"):
        ranks(np.zeros((rows, 2), np.float32), positives)


@pytest.mark.parametrize(("owner", "message"), [([0, 2], "caption 1 belongs to clip 2"), ([-1, 0], "caption 0")])
def test_a_caption_of_an_unknown_video_is_named(owner, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(np.zeros((2, 2)), np.array(owner))


def test_no_caption_at_all_is_refused():
    with pytest.raises(ValueError, match="no caption"):
        retrieval_metrics(np.zeros((0, 2)), np.zeros(0, np.int64))


# Normalised queries.

COSINES = st.floats(-1, 1, width=32)
TEMPERATURES = st.sampled_from([0.01, 0.05, 1.0])


@st.composite
def matrices(draw: st.DrawFn, columns: int | None = None) -> np.ndarray:
    """Cosines of few queries and candidates."""
    rows, columns = draw(st.integers(1, 5)), columns or draw(st.integers(1, 5))
    return np.array(draw(st.lists(st.lists(COSINES, min_size=columns, max_size=columns), min_size=rows, max_size=rows)))


@st.composite
def with_banks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of queries, and of a bank's captions, with the same candidates."""
    similarity = draw(matrices())
    return similarity, draw(matrices(similarity.shape[1]))


@settings(max_examples=150, deadline=None)
@given(matrices(), TEMPERATURES)
def test_dual_softmax_agrees_with_its_formula_in_plain_python(similarity, temperature):
    expected = [
        [value * math.exp(value / temperature) / sum(math.exp(row[c] / temperature) for row in similarity.tolist())
         for c, value in enumerate(line)]
        for line in similarity.tolist()
    ]  # fmt: skip
    np.testing.assert_allclose(dual_softmax(similarity, temperature), expected, rtol=1e-9, atol=1e-300)


@settings(max_examples=150, deadline=None)
@given(with_banks(), st.sampled_from([1.0, 20.0]))
def test_qb_norm_orders_candidates_as_its_formula_in_plain_python_does(problem, beta):
    similarity, bank = (matrix.tolist() for matrix in problem)
    scores = querybank(*problem, beta)
    hubs = {line.index(max(line)) for line in bank}
    for query, line in enumerate(similarity):
        expected = line
        if line.index(max(line)) in hubs:
            sums = [sum(math.exp(beta * caption[c]) for caption in bank) for c in range(len(line))]
            expected = [math.exp(beta * value) / total for value, total in zip(line, sums, strict=True)]
        for one in range(len(line)):
            for other in range(len(line)):
                if not math.isclose(expected[one], expected[other], rel_tol=1e-9, abs_tol=1e-15):
                    assert (expected[one] > expected[other]) == (scores[query, one] > scores[query, other])


@settings(max_examples=80, deadline=None)
@given(matrices(), TEMPERATURES, st.randoms(use_true_random=False))
def test_the_order_of_queries_and_candidates_does_not_matter_to_dual_softmax(similarity, temperature, random):
    rows, columns = (np.array(random.sample(range(size), size)) for size in similarity.shape)
    shuffled = dual_softmax(similarity[rows][:, columns], temperature)
    np.testing.assert_allclose(shuffled, dual_softmax(similarity, temperature)[rows][:, columns], rtol=1e-9)


@settings(max_examples=80, deadline=None)
@given(with_banks(), st.integers(0, 4))
def test_qb_norm_of_a_query_does_not_depend_on_other_queries_or_the_bank_s_order(problem, seed):
    similarity, bank = problem
    whole = querybank(similarity, bank, 20.0)
    shuffled = np.random.default_rng(seed).permutation(bank)
    for row, line in enumerate(similarity):
        np.testing.assert_allclose(querybank(line[None], shuffled, 20.0)[0], whole[row], atol=1e-9)


def test_one_query_alone_is_not_changed_by_dual_softmax():
    similarity = np.array([[0.3, -0.2, 0.1]])
    np.testing.assert_array_equal(dual_softmax(similarity, 0.01), similarity)


def test_cosines_far_apart_neither_overflow_nor_become_equal():
    similarity = np.array([[1.0, 0.9], [-1.0, -0.9]], np.float32)
    assert np.isfinite(dual_softmax(similarity, 0.01)).all() and (dual_softmax(similarity, 0.01) != 0).all()
    assert np.isfinite(querybank(similarity, np.array([[1.0, -1.0]]), 1000.0)).all()


def test_both_push_a_hub_down_that_is_near_to_every_query():
    """Clip 0 is nearest to all three captions, of which it is right for the first."""
    similarity, own = np.array([[0.50, 0.10, 0.10], [0.45, 0.40, 0.10], [0.45, 0.10, 0.40]]), np.arange(3)
    assert retrieval_metrics(similarity, own)["text_to_video/R@1"] == pytest.approx(100 / 3)
    assert retrieval_metrics(dual_softmax(similarity, 0.01), own)["text_to_video/R@1"] == 100.0
    bank = np.array([[0.6, 0.1, 0.1], [0.5, 0.2, 0.1], [0.5, 0.1, 0.2]])
    assert retrieval_metrics(querybank(similarity, bank, 20.0), own)["text_to_video/R@1"] > 50.0


def test_a_bank_near_none_of_the_clips_that_queries_find_changes_nothing():
    similarity = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    np.testing.assert_array_equal(querybank(similarity, np.array([[0.0, 0.1, 0.5]]), 20.0), similarity)


def test_each_direction_of_dual_softmax_is_normalised_over_its_own_queries():
    """A clip without a caption is no query: it must not count among those that share a caption."""
    rng = np.random.default_rng(0)
    similarity, own = rng.uniform(-0.2, 0.5, (7, 4)), np.array([0, 0, 1, 1, 1, 3, 3])
    metrics = dual_softmax_metrics(similarity, own, 0.05)
    kept = [0, 1, 3]
    to_text = dual_softmax(similarity[:, kept].T, 0.05).T
    alone = retrieval_metrics(to_text, np.searchsorted(kept, own))
    to_video = retrieval_metrics(dual_softmax(similarity, 0.05), own)
    expected = to_video | {name: value for name, value in alone.items() if name.startswith("video_to_text/")}
    assert metrics == expected and set(metrics) == set(retrieval_metrics(similarity, own))
