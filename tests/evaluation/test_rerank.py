"""Retrieved clips ranked anew by the decoder's likelihood: which ones, by what, and how ties count."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_answer import encoder, slow_decoder, source  # noqa: F401 (fixtures)

from vlab_jax.data import schema
from vlab_jax.evaluation import retrieval
from vlab_jax.evaluation.encoder import evaluate_retrieval
from vlab_jax.evaluation.query_normalisation import candidate_likelihoods, put_first, rerank


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 7), st.data())
def test_candidates_come_first_by_likelihood_and_the_rest_follows_by_similarity(seed, clips, data):
    best = data.draw(st.integers(1, clips))
    rng = np.random.default_rng(seed)
    similarity = rng.uniform(-1, 1, (1, clips)).astype(np.float32)
    order = np.argsort(-similarity[0], kind="stable")
    likelihood = np.full((1, clips), np.nan)
    likelihood[0, order[:best]] = rng.uniform(-300, -0.1, best)
    expected = [*sorted(order[:best], key=lambda clip: -likelihood[0, clip]), *order[best:]]
    assert np.argsort(-put_first(similarity, likelihood)[0], kind="stable").tolist() == expected


def test_equal_likelihoods_count_against_the_right_clip():
    merged = put_first(np.array([[0.9, 0.8, 0.1]], np.float32), np.array([[-4.0, -4.0, np.nan]]))
    assert retrieval.retrieval_metrics(merged, np.array([1]))["text_to_video/mean_rank"] == 2.0


@pytest.fixture(scope="module")
def found(encoder, source):  # noqa: F811
    return evaluate_retrieval(encoder, source)


def test_a_candidates_likelihood_is_that_of_the_plain_decoder(encoder, source, found):  # noqa: F811
    likelihood = candidate_likelihoods(encoder, source, found, 3, 0.01, lambda done: None)
    assert (np.isfinite(likelihood).sum(axis=1) == 3).all()
    for caption in (0, 17, len(found.captions) - 1):
        candidates = np.flatnonzero(np.isfinite(likelihood[caption]))
        assert set(candidates) == set(np.argsort(-found.similarity[caption], kind="stable")[:3])
        clip = schema.from_example(source[int(found.indices[candidates[1]])])
        slow = slow_decoder(encoder, encoder.frames.decode(clip, None)[None])
        line, counts = encoder.tokenizer([found.captions[caption]])
        ids = line[0, : counts[0]].tolist()
        total = sum(slow(0, ids[:place])[ids[place]] for place in range(1, len(ids)))
        assert likelihood[caption, candidates[1]] == pytest.approx(total, abs=2e-3)


def test_recall_at_the_number_of_candidates_stays_and_what_is_said_is_text_to_video_alone(encoder, source, found):  # noqa: F811
    anew = rerank(encoder, source, found, 5)
    assert set(anew) == {name for name in found.metrics if name.startswith("text_to_video/")}
    assert anew["text_to_video/R@5"] == found.metrics["text_to_video/R@5"]
    assert anew["text_to_video/R@10"] == found.metrics["text_to_video/R@10"]


def test_with_one_candidate_nothing_changes(encoder, source, found):  # noqa: F811
    anew = rerank(encoder, source, dataclasses.replace(found), 1)
    assert anew == {name: found.metrics[name] for name in anew}
