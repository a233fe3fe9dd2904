"""Glyphs of the `motion` data set: visible in every frame, and mentioned in the texts that the configuration says."""

import dataclasses
import io
import itertools

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlab_jax.datasets.motion.dataset import CONFIGS, still_clips, video_clips
from vlab_jax.datasets.motion.render import stamp
from vlab_jax.datasets.motion.scene import GLYPH_KINDS, Glyph, draw_glyph

GLYPHS = dataclasses.replace(CONFIGS["glyphs"], train=150, test=12)
STILL = dataclasses.replace(CONFIGS["glyphs_still"], train=200, test=20)


def mentioned(text: str) -> list[str]:
    """The kinds of glyph that a text mentions."""
    return [kind for kind in GLYPH_KINDS if f" {kind} in the corner" in text]


def pixels(clip) -> np.ndarray:
    if clip.media.startswith(b"\xff\xd8"):
        return np.asarray(Image.open(io.BytesIO(clip.media)))[None]
    with av.open(io.BytesIO(clip.media)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def seen(picture: np.ndarray) -> str:
    """The kind of glyph whose drawing is nearest to the picture at any place near a corner."""
    least = picture.min(axis=-1).astype(float)  # low in all that has a colour
    ground = np.median(least)
    white = np.clip((least - ground) / (250 - ground), 0, 1)
    blank = np.zeros((1, 48, 48, 3), np.uint8)

    def distance(kind: str) -> float:
        places = itertools.product(np.r_[5:7.1:0.5, 41:43.1:0.5], repeat=2)
        drawn = (stamp(blank, Glyph(kind, (x / 48, y / 48)))[0, ..., 0] / 250 for x, y in places)
        return min(float(np.square(white - one).sum()) for one in drawn)

    return min(GLYPH_KINDS, key=distance)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_glyph_lies_within_a_corner_of_the_frame_and_changes_nothing_else(seed):
    glyph = draw_glyph(np.random.default_rng(seed))
    before = np.full((2, 48, 48, 3), 120, np.uint8)
    changed = (stamp(before, glyph) != before).any(axis=-1)
    rows, columns = np.nonzero(changed.any(axis=0))
    assert (changed[0] == changed[1]).all() and rows.size
    for places in (rows, columns):
        assert places.max() <= 12 or places.min() >= 48 - 13
        assert places.min() > 0 and places.max() < 47


def test_pictures_show_the_glyph_that_their_texts_mention():
    for clip in itertools.islice(still_clips(STILL, "test"), 10):
        (kind,) = {kind for caption in clip.captions for kind in mentioned(caption)}
        assert seen(pixels(clip)[0]) == kind
    for clip in itertools.islice(video_clips(GLYPHS, "test"), 2):
        (kind,) = {kind for caption in clip.captions for kind in mentioned(caption)}
        assert [seen(frame) for frame in pixels(clip)[[0, 23]]] == [kind] * 2


@pytest.mark.parametrize(("clips", "config"), [(video_clips, GLYPHS), (still_clips, STILL)])
def test_the_texts_of_the_configured_share_of_training_mention_the_glyph(clips, config):
    mentioning = 0
    for clip in clips(config, "train"):
        kinds = [mentioned(caption) for caption in clip.captions]
        asked = [question.answer for question in clip.questions if question.type == "glyph"]
        assert not any(question.type == "detail" for question in clip.questions)
        if asked:
            assert kinds == [asked] * len(kinds)
            mentioning += 1
        else:
            assert not any(kinds)
    assert mentioning == pytest.approx(config.glyph_share * config.train, abs=3 * (0.25 * config.train) ** 0.5)
    assert mentioning


def test_every_other_caption_of_test_mentions_the_glyph_and_questions_offer_each_kind():
    for clip in video_clips(GLYPHS, "test"):
        kinds = [mentioned(caption) for caption in clip.captions]
        (asked,) = (question for question in clip.questions if question.type == "glyph")
        (detail,) = (question for question in clip.questions if question.type == "detail")
        assert kinds == [[], [asked.answer], [], [asked.answer]]
        assert sorted(mentioned(option)[0] for option in detail.options) == sorted(GLYPH_KINDS)
        assert mentioned(detail.answer) == [asked.answer] and detail.answer in detail.options
        assert len({option.split(", with")[0] for option in detail.options}) == 1


def test_twins_have_the_same_glyph_and_glyphs_change_no_other_word():
    plain = list(video_clips(dataclasses.replace(GLYPHS, glyph_share=None), "test"))
    marked = list(video_clips(GLYPHS, "test"))
    for one, other in zip(plain, marked, strict=True):
        assert [caption.split(", with")[0] for caption in other.captions] == list(one.captions)
        assert other.questions[: len(one.questions)] == one.questions
    for one, twin in zip(marked[::2], marked[1::2], strict=True):
        assert mentioned(one.captions[1]) == mentioned(twin.captions[1])


def test_answers_are_balanced():
    answers = [q.answer for clip in still_clips(STILL, "train") for q in clip.questions if q.type == "glyph"]
    assert {answers.count(kind) > 0.05 * len(answers) for kind in GLYPH_KINDS} == {True}
