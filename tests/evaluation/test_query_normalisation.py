"""Dual softmax and QB-Norm against plain Python, and what they must leave as it is."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_answer import encoder, source  # noqa: F401 (fixtures)

from vlab_jax import config_check
from vlab_jax.data import schema
from vlab_jax.datasets import registry
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.errors import InputError
from vlab_jax.evaluation import query_normalisation, retrieval
from vlab_jax.evaluation.encoder import evaluate_retrieval
from vlab_jax.evaluation.query_normalisation import Normalisation, choose_captions, dual_softmax, querybank

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
    assert retrieval.retrieval_metrics(similarity, own)["text_to_video/R@1"] == pytest.approx(100 / 3)
    assert retrieval.retrieval_metrics(dual_softmax(similarity, 0.01), own)["text_to_video/R@1"] == 100.0
    bank = np.array([[0.6, 0.1, 0.1], [0.5, 0.2, 0.1], [0.5, 0.1, 0.2]])
    assert retrieval.retrieval_metrics(querybank(similarity, bank, 20.0), own)["text_to_video/R@1"] > 50.0


def test_a_bank_near_none_of_the_clips_that_queries_find_changes_nothing():
    similarity = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    np.testing.assert_array_equal(querybank(similarity, np.array([[0.0, 0.1, 0.5]]), 20.0), similarity)


def test_each_direction_of_dual_softmax_is_normalised_over_its_own_queries():
    """A clip without a caption is no query: it must not count among those that share a caption."""
    rng = np.random.default_rng(0)
    similarity, own = rng.uniform(-0.2, 0.5, (7, 4)), np.array([0, 0, 1, 1, 1, 3, 3])
    metrics = query_normalisation.dual_softmax_metrics(similarity, own, 0.05)
    kept = [0, 1, 3]
    to_text = dual_softmax(similarity[:, kept].T, 0.05).T
    alone = retrieval.retrieval_metrics(to_text, np.searchsorted(kept, own))
    to_video = retrieval.retrieval_metrics(dual_softmax(similarity, 0.05), own)
    expected = to_video | {name: value for name, value in alone.items() if name.startswith("video_to_text/")}
    assert metrics == expected and set(metrics) == set(retrieval.retrieval_metrics(similarity, own))


def test_the_bank_s_captions_are_of_training_clips_spread_evenly_and_the_same_each_time(data_dir):
    training = registry.open_split("motion/tiny", "train", BuildOptions(data_dir))
    clips = [schema.from_example(training[index]).captions for index in range(len(training))]
    chosen = choose_captions([training], len(clips) // 2)
    assert chosen == choose_captions([training], len(clips) // 2) and len(chosen) == len(clips) // 2
    owners = [{number for number, captions in enumerate(clips) if text in captions} for text in chosen]
    assert all(owners) and len(set.union(*owners)) >= len(chosen)  # one of each clip
    everything = choose_captions([training], 10**6)
    assert sorted(everything) == sorted(text for captions in clips for text in captions)
    with pytest.raises(InputError, match=r"^no clip trained on has a caption; "):
        choose_captions([[]], 10)


def test_rows_are_named_and_none_of_them_is_there_unless_asked_for(encoder, source, data_dir):  # noqa: F811
    found = evaluate_retrieval(encoder, source)
    training = [registry.open_split("motion/tiny", "train", BuildOptions(data_dir))]
    assert Normalisation().rows(encoder, found, training.copy) == {}
    rows = Normalisation(config_check.QUERY_NORMALISATIONS, bank_size=20).rows(encoder, found, training.copy)
    assert list(rows) == ["dual softmax", "QB-Norm"]
    retrieved = {name for name in found.metrics if "/" in name}
    assert set(rows["dual softmax"]) == retrieved
    assert set(rows["QB-Norm"]) == {name for name in retrieved if name.startswith("text_to_video/")}
