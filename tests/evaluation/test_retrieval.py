"""Retrieval metrics against a slow computation that shares nothing with them, and against SciPy's ranks."""

import statistics

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from vlab_jax.evaluation import retrieval


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
    for direction, ranks in found.items():
        for k in (1, 5, 10):
            metrics[f"{direction}/R@{k}"] = 100 * sum(r <= k for r in ranks) / len(ranks)
        metrics[f"{direction}/median_rank"] = statistics.median(ranks)
        metrics[f"{direction}/mean_rank"] = statistics.fmean(ranks)
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
    metrics = retrieval.retrieval_metrics(similarity, owner)
    assert metrics == pytest.approx(slow_metrics(similarity, owner.tolist()), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 12))
def test_ranks_with_several_positives_agree_with_sorting(seed, queries, candidates):
    rng = np.random.default_rng(seed)
    similarity = rng.integers(0, 4, (queries, candidates)).astype(np.float64)
    positives = rng.random((queries, candidates)) < 0.4
    positives[np.arange(queries), rng.integers(0, candidates, queries)] = True
    expected = [slow_rank(s, p) for s, p in zip(similarity.tolist(), positives.tolist(), strict=True)]
    assert retrieval.ranks(similarity, positives).tolist() == expected


@pytest.mark.parametrize("queries", [1, 40, retrieval._BLOCK + 7])
def test_ranks_with_one_positive_are_scipys_maximal_ranks(queries):
    rng = np.random.default_rng(queries)
    similarity = rng.integers(0, 5, (queries, 9)).astype(np.float32)
    right = rng.integers(0, 9, queries)
    expected = scipy.stats.rankdata(-similarity, method="max", axis=1)[np.arange(queries), right]
    np.testing.assert_array_equal(retrieval.ranks(similarity, right[:, None] == np.arange(9)), expected)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(-50, 50), st.randoms(use_true_random=False))
def test_adding_a_constant_or_reordering_videos_and_captions_changes_nothing(problem, constant, random):
    similarity, owner = problem
    videos = np.array(random.sample(range(similarity.shape[1]), similarity.shape[1]))
    captions = np.array(random.sample(range(len(owner)), len(owner)))
    place_of_video = np.argsort(videos)
    shuffled = (similarity + np.float32(constant))[captions][:, videos]
    metrics = retrieval.retrieval_metrics(similarity, owner)
    assert retrieval.retrieval_metrics(shuffled, place_of_video[owner[captions]]) == pytest.approx(metrics)


def test_each_query_has_one_rank_even_when_everything_ties():
    # CLIP4Clip's computation yields 4 x 4 ranks here, and calls R@1 perfect.
    ranks = retrieval.ranks(np.zeros((4, 4), np.float32), np.eye(4, dtype=bool))
    assert ranks.tolist() == [4, 4, 4, 4]


def test_other_positives_do_not_count_against_the_best_one():
    similarity = np.array([[0.9, 0.8, 0.7, 0.9], [0.1, 0.9, 0.9, 0.3]])
    positives = np.array([[True, True, False, True], [True, False, False, True]])
    assert retrieval.ranks(similarity, positives).tolist() == [1, 3]


def test_a_small_example_with_several_captions_worked_by_hand():
    similarity = np.array([[0.9, 0.1, 0.2], [0.3, 0.5, 0.6], [0.4, 0.4, 0.1]])
    metrics = retrieval.retrieval_metrics(similarity, np.array([0, 0, 1]))
    # Captions rank 1 (0.9), 3 (0.3 below 0.5 and 0.6) and 2 (tied with video 0).
    assert metrics["text_to_video/R@1"] == pytest.approx(100 / 3)
    assert metrics["text_to_video/R@5"] == 100.0
    assert (metrics["text_to_video/median_rank"], metrics["text_to_video/mean_rank"]) == (2.0, 2.0)
    # Video 0 by its better caption: rank 1. Video 1: 0.4 below 0.5, rank 2. Video 2 has no caption.
    assert metrics["video_to_text/R@1"] == 50.0
    assert (metrics["video_to_text/median_rank"], metrics["video_to_text/mean_rank"]) == (1.5, 1.5)


def test_a_video_without_caption_distracts_captions_but_is_never_a_query():
    owner = np.array([0, 1])
    alone = retrieval.retrieval_metrics(np.array([[0.9, 0.1], [0.2, 0.8]]), owner)
    crowded = retrieval.retrieval_metrics(np.array([[0.9, 0.1, 1.0], [0.2, 0.8, 1.0]]), owner)
    assert alone["text_to_video/R@1"] == 100.0
    assert crowded["text_to_video/R@1"] == 0.0
    assert crowded["video_to_text/R@1"] == alone["video_to_text/R@1"] == 100.0


def test_masked_similarities_of_minus_infinity_rank_last():
    similarity = np.array([[-np.inf, 0.0, -np.inf]])
    assert retrieval.ranks(similarity, np.array([[True, False, False]])).tolist() == [3]


def test_a_nan_or_a_query_without_positive_is_named_even_in_a_later_block():
    rows = retrieval._BLOCK + 3
    similarity, positives = np.zeros((rows, 2), np.float32), np.ones((rows, 2), bool)
    similarity[rows - 1, 1] = np.nan
    with pytest.raises(ValueError, match=f"query {rows - 1} and candidate 1 is NaN"):
        retrieval.ranks(similarity, positives)
    positives[rows - 2] = False
    with pytest.raises(ValueError, match=f"query {rows - 2} has no positive"):
        retrieval.ranks(np.zeros((rows, 2), np.float32), positives)


@pytest.mark.parametrize(("owner", "message"), [([0, 2], "caption 1 belongs to video 2"), ([-1, 0], "caption 0")])
def test_a_caption_of_an_unknown_video_is_named(owner, message):
    with pytest.raises(ValueError, match=message):
        retrieval.retrieval_metrics(np.zeros((2, 2)), np.array(owner))


def test_no_caption_at_all_is_refused():
    with pytest.raises(ValueError, match="no caption"):
        retrieval.retrieval_metrics(np.zeros((0, 2)), np.zeros(0, np.int64))


def test_multiple_choice_counts_ties_as_wrong_and_takes_ragged_options():
    scores = [[0.2, 0.9], np.array([0.5, 0.5], np.float32), [3, 1, 2], [0.1, 0.2, 0.3, 0.4]]
    assert retrieval.multiple_choice_hits(scores, [1, 0, 0, 0]).tolist() == [True, False, True, False]
    assert retrieval.multiple_choice_accuracy(scores, np.array([1, 0, 0, 0])) == 50.0


def test_a_model_that_scores_all_options_alike_gets_nothing():
    assert retrieval.multiple_choice_accuracy([[1.0, 1.0]] * 10, [0, 1] * 5) == 0.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=5), min_size=1, max_size=12), st.data())
def test_multiple_choice_agrees_with_the_rank_of_the_right_option(scores, data):
    answers = [data.draw(st.integers(0, len(options) - 1)) for options in scores]
    pairs = list(zip(scores, answers, strict=True))
    ranks = [slow_rank(options, [i == answer for i in range(len(options))]) for options, answer in pairs]
    expected = 100 * sum(rank == 1 for rank in ranks) / len(ranks)
    assert retrieval.multiple_choice_accuracy(scores, answers) == pytest.approx(expected)


def test_accuracy_by_type_splits_the_questions():
    scores = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    by_type = retrieval.by_type(scores, [0, 1, 1, 0], ["order", "motion", "motion", "order"])
    assert by_type == {"motion": 50.0, "order": 100.0}
    assert list(by_type) == ["motion", "order"]


@pytest.mark.parametrize(
    ("scores", "answers", "message"),
    [
        ([], [], "no question"),
        ([[1.0, 2.0]], [0, 1], "1 questions have scores, but 2"),
        ([[1.0, 2.0], [1.0]], [0, 0], "question 1 needs a list of at least two"),
        ([[1.0, 2.0], [1.0, float("nan")]], [0, 0], "question 1 has a NaN"),
        ([[1.0, 2.0]], [2], "question 0 has 2 options, but its answer is option 2"),
        ([[1.0, 2.0]], [-1], "answer is option -1"),
    ],
)
def test_a_question_that_cannot_be_scored_is_named(scores, answers, message):
    with pytest.raises(ValueError, match=message):
        retrieval.multiple_choice_accuracy(scores, answers)


def test_types_must_match_the_questions():
    with pytest.raises(ValueError, match="1 questions have scores, but 2 have a type"):
        retrieval.by_type([[1.0, 0.0]], [0], ["a", "b"])


def sample_results() -> dict[str, dict[str, float]]:
    metrics = retrieval.retrieval_metrics(np.eye(12), np.arange(12))
    return {"clip": metrics, "adapt": {**metrics, "twin_accuracy": 87.46}}


def test_the_text_table_is_aligned_and_marks_missing_figures():
    lines = retrieval.format_table(sample_results()).splitlines()
    groups, headings, _, clip, adapt = lines
    names = "R@1 R@5 R@10 MdR MnR R@1 R@5 R@10 MdR MnR twin accuracy"
    assert headings.split() == names.split()
    assert clip.split() == ["clip", *["100.0"] * 3, "1.0", "1.0", *["100.0"] * 3, "1.0", "1.0", "-"]
    assert adapt.split()[-1] == "87.5"
    assert len(headings) == len(clip) == len(adapt)
    # Each direction's name begins over its own first column, and not over one before.
    for name, occurrence in (("text to video", 0), ("video to text", 1)):
        column_end = [i for i in range(len(headings)) if headings.startswith("R@1 ", i)][occurrence] + 3
        assert column_end - len("100.0") == groups.index(name)


def test_directions_do_not_run_into_each_other_over_single_columns():
    text = retrieval.format_table({"a": {"text_to_video/R@1": 1.0, "video_to_text/R@1": 2.0, "twin": 3.0}})
    assert text.splitlines()[0].split() == ["text", "to", "video", "video", "to", "text"]
    assert len({len(line) for line in text.splitlines()[1:]}) == 1


def test_the_markdown_table_says_the_direction_in_each_heading():
    lines = retrieval.format_markdown(sample_results()).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][1] == "text to video R@1" and cells[0][6] == "video to text R@1"
    assert cells[2][0] == "clip" and cells[2][-1] == "-"
    assert {len(row) for row in cells} == {12}


def test_no_results_make_a_table_that_says_so():
    assert retrieval.format_table({}) == retrieval.format_markdown({}) == "(no results)"
