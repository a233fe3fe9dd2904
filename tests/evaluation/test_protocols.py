"""The field's retrieval protocols on real annotations: every caption of MSVD is a query, a paragraph is one."""

import json

import numpy as np
import pytest
import scipy.stats
from listed_source import ListedSource
from test_answer import encoder  # noqa: F401 (fixture)

from vlab_jax.data import schema
from vlab_jax.evaluation.encoder import evaluate_retrieval


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
