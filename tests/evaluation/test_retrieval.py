"""Retrieval as the field does it, on real annotations, and re-ranking by the decoder's likelihood."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from listed_source import ListedSource
from test_question_answering import encoder, slow_decoder, source  # noqa: F401 (fixtures)

from vlab_jax.data import schema
from vlab_jax.datasets import registry
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.errors import InputError
from vlab_jax.evaluation.plan import Plan
from vlab_jax.evaluation.retrieval import (
    candidate_likelihoods,
    choose_captions,
    evaluate_retrieval,
    normalised_rows,
    put_first,
    rerank,
)
from vlab_jax.evaluation.retrieval_metrics import METHODS, retrieval_metrics
from vlab_jax.models.generation import GenerationConfig


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
    assert retrieval_metrics(merged, np.array([1]))["text_to_video/mean_rank"] == 2.0


@pytest.fixture(scope="module")
def found(encoder, source):  # noqa: F811
    return evaluate_retrieval(encoder, source)


def test_a_candidates_likelihood_is_that_of_the_plain_decoder(encoder, source, found):  # noqa: F811
    likelihood = candidate_likelihoods(encoder, source, found, 3)
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


def test_recall_at_the_number_of_candidates_stays_and_figures_are_text_to_video_alone(encoder, source, found):  # noqa: F811
    anew = rerank(encoder, source, found, 5)
    assert set(anew) == {name for name in found.metrics if name.startswith("text_to_video/")}
    assert anew["text_to_video/R@5"] == found.metrics["text_to_video/R@5"]
    assert anew["text_to_video/R@10"] == found.metrics["text_to_video/R@10"]


def test_with_one_candidate_nothing_changes(encoder, source, found):  # noqa: F811
    anew = rerank(encoder, source, found, 1)
    assert anew == {name: found.metrics[name] for name in anew}


@pytest.fixture(scope="module")
def msvd(assets) -> list[schema.ClipRecord]:
    """The four clips of MSVD that come with their captions, repeated ones included."""
    folder = assets / "videos" / "msvd"
    entries = json.loads((folder / "captions.json").read_text())
    return [
        schema.ClipRecord(name, (folder / entry["file"]).read_bytes(), tuple(entry["captions"]))
        for name, entry in entries.items()
    ]


def test_every_caption_of_msvd_is_a_query_and_none_is_joined_to_another(encoder, msvd):  # noqa: F811
    found = evaluate_retrieval(encoder, ListedSource(msvd))
    captions = [caption for clip in msvd for caption in clip.captions]
    assert found.captions == tuple(captions) and len(captions) > 80 and len(set(captions)) < len(captions)
    alone = encoder.embed_texts(captions) @ found.embeddings.T
    np.testing.assert_allclose(found.similarity, alone, atol=1e-6)
    places = scipy.stats.rankdata(-found.similarity, method="max", axis=1)[range(len(captions)), found.clip_of_caption]
    assert found.metrics["text_to_video/R@1"] == pytest.approx(100 * np.mean(places == 1))
    assert found.metrics["text_to_video/mean_rank"] == pytest.approx(places.mean())


def test_a_video_of_msvd_is_as_good_as_the_best_of_its_captions(encoder, msvd):  # noqa: F811
    found = evaluate_retrieval(encoder, ListedSource(msvd))
    best = []
    for column in range(len(msvd)):
        own = found.clip_of_caption == column
        scores = found.similarity[:, column]
        best.append(1 + int((scores[~own] >= scores[own].max()).sum()))
    assert found.metrics["video_to_text/mean_rank"] == pytest.approx(np.mean(best))


def test_a_paragraph_is_one_query(encoder, msvd):  # noqa: F811
    joined = [schema.ClipRecord(clip.id, clip.media, (" ".join(clip.captions),)) for clip in msvd]
    found = evaluate_retrieval(encoder, ListedSource(joined))
    assert found.similarity.shape == (len(msvd), len(msvd))
    assert (np.abs(np.linalg.norm(encoder.embed_texts(found.captions), axis=1) - 1) < 1e-5).all()


def test_the_bank_s_captions_are_of_training_clips_spread_evenly_and_the_same_each_time(data_dir):
    training = registry.open_split("motion/tiny", "train", BuildOptions(data_dir))
    clips = [schema.from_example(training[index]).captions for index in range(len(training))]
    chosen = choose_captions([training], len(clips) // 2)
    assert chosen == choose_captions([training], len(clips) // 2) and len(chosen) == len(clips) // 2
    owners = [{number for number, captions in enumerate(clips) if text in captions} for text in chosen]
    assert all(owners) and len(set.union(*owners)) >= len(chosen)  # one of each clip
    everything = choose_captions([training], 10**6)
    assert sorted(everything) == sorted(text for captions in clips for text in captions)
    with pytest.raises(InputError, match=r"^no training clip has a caption, "):
        choose_captions([[]], 10)


def test_rows_are_named_and_each_must_be_switched_on(encoder, source, found, data_dir):  # noqa: F811
    training = [registry.open_split("motion/tiny", "train", BuildOptions(data_dir))]
    plan = Plan(GenerationConfig(3, 1), training.copy, ("retrieval",), querybank_size=20)
    assert normalised_rows(encoder, found, plan) == {}
    rows = normalised_rows(encoder, found, dataclasses.replace(plan, query_normalisation=tuple(METHODS)))
    assert list(rows) == ["dual softmax", "QB-Norm"]
    assert set(rows["dual softmax"]) == set(found.metrics)
    assert set(rows["QB-Norm"]) == {name for name in found.metrics if name.startswith("text_to_video/")}


def test_a_question_with_options_is_right_if_its_answer_is_the_nearest_to_the_clip(encoder, source, found):  # noqa: F811
    answered = evaluate_retrieval(encoder, source, ("twin",))
    assert answered.metrics.items() - found.metrics.items() == {("twin_accuracy", answered.metrics["twin_accuracy"])}
    hits = []
    for index, embedding in zip(found.indices, found.embeddings, strict=True):
        for question in schema.from_example(source[int(index)]).questions:
            if question.type == "twin":
                scores = dict(zip(question.options, encoder.embed_texts(question.options) @ embedding, strict=True))
                hits.append(scores.pop(question.answer) > max(scores.values()))  # a tie is a miss
    assert answered.metrics["twin_accuracy"] == pytest.approx(100 * np.mean(hits)) and len(hits) == len(source)
