"""A predictor agrees with evaluation in training, takes lists of any length, and names what it cannot use."""

import dataclasses
import logging
import math
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from numbered_video import SIDE, encode, numbered
from saved_clip import rewrite, save_clip
from tiny_trained import save_run

from vlab_jax import Clip, Predictor
from vlab_jax.data import pipeline, schema
from vlab_jax.data import tokenizer as tokenizers
from vlab_jax.data.schema import Question
from vlab_jax.datasets import registry
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.errors import InputError
from vlab_jax.evaluation.captioning import caption_clips
from vlab_jax.evaluation.encoder import Encoder
from vlab_jax.evaluation.question_answering import answer_batch
from vlab_jax.export import export
from vlab_jax.inference import engine as engines
from vlab_jax.inference.clips import load_frames
from vlab_jax.inference.engine import load_trained_model
from vlab_jax.models import vlab
from vlab_jax.models.generation import GenerationConfig
from vlab_jax.restore import restore
from vlab_jax.runtime import sharding

QUESTION = "what colour is the circle?"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "workdir"
    save_run(folder)
    return folder


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "my_vlab"
    export(workdir, folder)
    return folder


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    """Of one device, so that batches may have any size."""
    axes = {"axis_types": (AxisType.Auto,) * 3, "devices": jax.devices()[:1]}
    return jax.make_mesh((1, 1, 1), sharding.AXES, **axes)


@pytest.fixture(scope="module")
def of_run(workdir, mesh) -> Predictor:
    return Predictor(load_trained_model(str(workdir), mesh), beams=1, batch_size=2)


@pytest.fixture(scope="module")
def of_export(exported, mesh) -> Predictor:
    return Predictor(load_trained_model(str(exported), mesh), beams=1, batch_size=2)


@pytest.fixture(scope="module")
def source(data_dir):
    return registry.open_split("motion/tiny", "test", BuildOptions(data_dir))


@pytest.fixture(scope="module")
def videos(source) -> list[Clip]:
    clips = [schema.from_example(source[index]) for index in range(len(source))]
    return [Clip(clip.media, clip.start, clip.end) for clip in clips]


@pytest.fixture(scope="module")
def encoder(workdir, mesh) -> Encoder:
    """The model as training evaluates it."""
    restored = restore(workdir, mesh)
    frames, streams = pipeline.FrameOptions(4, 16), ("video", "image")
    tokenizer = tokenizers.load(workdir, 16)
    return Encoder(restored.model, restored.parameters, tokenizer, frames, streams, (0, 3), mesh, 2)


def numbered_clips(count: int) -> list[bytes]:
    return [encode([numbered(number)]) for number in range(count)]


# Agreement with evaluation in training


@pytest.mark.parametrize("which", ["of_run", "of_export"])
def test_embeddings_captions_and_answers_are_those_of_evaluation(which, request, encoder, source, videos):
    predictor = request.getfixturevalue(which)
    expected, indices = encoder.embed_clips(source)
    assert indices.tolist() == list(range(len(videos)))
    embedded = predictor.embed_videos(videos)
    assert embedded.dtype == np.float32
    np.testing.assert_allclose(embedded, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-5)
    texts = ["a red circle", QUESTION, ""]
    np.testing.assert_allclose(predictor.embed_texts(texts), encoder.embed_texts(texts), atol=1e-5)
    search = GenerationConfig(15, encoder.tokenizer.end)
    captions = caption_clips(encoder, source, search)
    assert [caption.text for caption in predictor.caption(videos)] == [captions[i] for i in range(len(videos))]
    assert len(set(captions.values())) > 1
    options = ("red", "a blue square moves", "left")
    frames = np.stack([load_frames(clip, predictor.frames) for clip in videos[:2]])
    video = sharding.to_global({"video": frames}, encoder.mesh)["video"]
    questions = [(row, Question(QUESTION, "red", "open", choice)) for choice in ((), options) for row in range(2)]
    read = answer_batch(encoder, encoder.cache_visual(video), search, questions)
    own, chosen = predictor.answer(videos[:2], QUESTION), predictor.answer(videos[:2], QUESTION, options=options)
    assert [answer.text for answer in own] == [words for words, _ in read[:2]]
    assert [answer.text for answer in chosen] == [options[scores.argmax()] for _, scores in read[2:]]
    assert [answer.score for answer in chosen] == pytest.approx([max(scores) for _, scores in read[2:]], abs=1e-3)


@pytest.mark.eight_devices
def test_on_all_devices_it_computes_the_same(workdir, of_run, videos):
    several = Predictor.load(workdir, batch_size=3)
    np.testing.assert_allclose(several.embed_videos(videos[:9]), of_run.embed_videos(videos[:9]), atol=1e-5)


def test_a_run_and_its_export_have_one_fingerprint_and_others_have_others(workdir, mesh, of_run, of_export):
    assert of_run.fingerprint == of_export.fingerprint and len(of_run.fingerprint) == 32
    trained = load_trained_model(str(workdir), mesh)

    def fingerprint(part: str, **options) -> str:
        changed = {**trained.parameters, part: jax.tree.map(lambda leaf: leaf + 1e-3, trained.parameters[part])}
        return Predictor(dataclasses.replace(trained, parameters=changed), **options).fingerprint

    others = [fingerprint("vision"), fingerprint("text"), fingerprint("decoder", frames=5)]
    assert len({of_run.fingerprint, *others}) == 4
    assert fingerprint("decoder") == of_run.fingerprint  # it embeds the same


# The form of results


def test_one_in_one_out_and_a_list_in_a_list_out(of_run, videos):
    one, several = of_run.caption(videos[0]), of_run.caption(videos[:2])
    assert str(one) == one.text == several[0].text and one.score == pytest.approx(several[0].score, abs=1e-3)
    assert of_run.caption([]) == [] and of_run.embed_videos([]).shape == (0, 16) == of_run.embed_texts([]).shape
    assert of_run.embed_videos(videos[0]).shape == (1, 16) == of_run.embed_texts("a circle").shape
    assert list(of_run.captions(iter(videos[:2]))) == several == of_run.caption(iter(videos[:2]))
    questions = [QUESTION, "left?"]
    both = of_run.answer(videos[:2], questions)
    assert [[answer.question for answer in answers] for answers in both] == [questions, questions]
    assert [answers[0] for answers in both] == of_run.answer(videos[:2], QUESTION)
    assert [answer.text for answer in of_run.answer(videos[1], questions)] == [answer.text for answer in both[1]]
    assert of_run.answer(videos[1], QUESTION).text == both[1][0].text
    assert [ranking.video for ranking in of_run.rank(videos[:2], questions)] == [video.name for video in videos[:2]]


def test_texts_are_ranked_by_similarity_or_by_likelihood(of_run, encoder, videos):
    texts = ["a blue square", "a circle", "the red square moves left", "a circle"]
    ranked = of_run.rank(videos[0], texts)
    similarity = of_run.similarity(videos[:1], texts)[0]
    assert [each.text for each in ranked.texts] == [texts[i] for i in np.argsort(-similarity, kind="stable")]
    assert [each.score for each in ranked.texts] == pytest.approx(sorted(similarity, reverse=True), abs=1e-5)
    likely = of_run.rank(videos[0], texts, by="likelihood")
    assert (ranked.by, likely.by) == ("similarity", "likelihood")
    scores = {each.text: each.score for each in likely.texts}
    assert [each.score for each in likely.texts] == sorted((each.score for each in likely.texts), reverse=True)
    # The likelihood of what it would say itself is that of its caption, and above that of other texts.
    said = of_run.caption(videos[0])
    own = of_run.rank(videos[0], [said.text, *texts], by="likelihood")
    assert math.isfinite(own.texts[0].score) and set(scores) == set(texts)
    assert str(ranked).splitlines()[0] == f"{ranked.texts[0].score:.3f}  {ranked.texts[0].text}"


def test_any_number_of_frames_can_be_requested(workdir, mesh, videos):
    predictor = Predictor(load_trained_model(str(workdir), mesh), frames=6)
    assert predictor.frames.num_frames == 6
    assert np.linalg.norm(predictor.embed_videos(videos[:1])) == pytest.approx(1, abs=1e-5)


def test_a_program_is_compiled_once_for_each_size_of_batch(workdir, mesh):
    predictor = Predictor(load_trained_model(str(workdir), mesh), frames=2, batch_size=4)
    clips = numbered_clips(7)
    before = vlab.embed_clips._cache_size()
    every = predictor.embed_videos(clips)  # 4 and 3
    assert vlab.embed_clips._cache_size() - before == 1
    for count in (1, 2, 3, 4, 5, 7):
        np.testing.assert_allclose(predictor.embed_videos(clips[:count]), every[:count], atol=1e-5)
    assert vlab.embed_clips._cache_size() - before == 3  # 1, 2 and 4


# Errors of videos


def test_videos_that_cannot_be_read_raise_or_are_skipped_and_named(of_run, tmp_path, caplog):
    (tmp_path / "notes.txt").write_text("words\n" * 100)
    clips = [*numbered_clips(5), tmp_path / "notes.txt", tmp_path / "none.mp4", *numbered_clips(2)]
    with pytest.raises(InputError, match=r"notes.txt: the media cannot be decoded"):
        of_run.caption(clips)
    with pytest.raises(InputError, match=r"none.mp4: there is no such file"):
        of_run.embed_videos(tmp_path / "none.mp4")
    found = of_run.caption(clips, on_error="skip")
    assert [bool(caption.error) for caption in found] == [False] * 5 + [True] * 2 + [False] * 2
    assert (found[5].text, found[5].video) == ("", str(tmp_path / "notes.txt")) and "notes.txt: " in found[5].error
    assert [caption.text for caption in found[:2]] == [caption.text for caption in found[-2:]]
    embedded = of_run.embed_videos(clips, on_error="skip")
    assert np.isnan(embedded).all(axis=1).tolist() == [bool(caption.error) for caption in found]
    assert "none.mp4: there is no such file" in caplog.text
    np.testing.assert_allclose(embedded[-2:], embedded[:2], atol=1e-6)
    assert all(of_run.answer(clips[5:7], QUESTION, on_error="skip")[place].error for place in (0, 1))
    assert of_run.rank(clips[5:6], ["a"], on_error="skip")[0].texts == ()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda p: p.caption([], on_error="ignore"), "on_error is 'ignore'; it must be 'raise' or 'skip'"),
        (lambda p: p.rank([], ["a"], by="taste"), "by is 'taste'; it must be 'similarity' or 'likelihood'"),
        (lambda p: p.caption(3), "a video is a path"),
    ],
)
def test_a_wrong_argument_is_refused(of_run, ask, message):
    with pytest.raises(InputError, match=message):
        ask(of_run)


# Texts


def test_a_text_that_is_too_long_is_cut_and_logged_once(workdir, mesh, caplog):
    predictor = Predictor(load_trained_model(str(workdir), mesh), batch_size=2)
    long = "what colour is the red circle? " * 9
    with caplog.at_level(logging.WARNING):
        cut = predictor.embed_texts(["a circle", long])
        predictor.embed_texts([long])
    assert len(caplog.records) == 1 and "tokens is cut to the 14 that the model reads" in caplog.text
    np.testing.assert_allclose(predictor.embed_texts([long + "!"])[0], cut[1], atol=1e-6)


def test_any_language_and_any_characters_are_read(of_run):
    texts = ["一只狗接住飞盘", "собака", "🐕" * 40, "\x00\x07", "half of a pair: \ud83d", "", " \n"]
    assert np.isfinite(of_run.embed_texts(texts)).all()
    assert of_run.rank(numbered_clips(1)[0], texts[:1], by="likelihood").texts[0].text == texts[0]


# Errors of models


def test_a_path_without_a_model_is_refused_in_one_line(workdir, exported, tmp_path, monkeypatch):
    def refusal(path, **options) -> str:
        with pytest.raises(InputError) as raised:
            Predictor.load(path, **options)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    monkeypatch.chdir(tmp_path)
    assert refusal(tmp_path / "none").startswith(f"there is no model at '{tmp_path / 'none'}'; name a run's workdir")
    assert refusal(tmp_path).startswith(f"{tmp_path} holds no model; name a run's workdir")
    (tmp_path / "checkpoints").mkdir()
    assert refusal(tmp_path) == f"{tmp_path / 'checkpoints'} holds no complete checkpoint"
    assert refusal(workdir / "checkpoints" / "9").startswith(f"no checkpoint at {workdir / 'checkpoints' / '9'};")
    (tmp_path / "clip").mkdir()
    save_clip(tmp_path / "clip")
    assert "is a CLIP alone (Hugging Face CLIP), without video adapters" in refusal(tmp_path / "clip")
    assert refusal(exported, frames=0) == "frames is 0; it must be at least 1"
    assert refusal(exported, batch_size=0) == "batch_size is 0; it must be at least 1"
    assert refusal(exported, beams=0) == "beams is 0; it must be at least 1"
    assert refusal(exported, dtype="int8") == "dtype is 'int8'; it must be float32 or bfloat16"


def test_parameters_that_are_not_finite_are_refused(exported, mesh, tmp_path):
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path, lambda tensors: {**tensors, "logit_scale": np.array(np.nan, np.float32)})
    with pytest.raises(InputError, match=r"1 of its parameters hold numbers that are not finite, such as logit_scale;"):
        load_trained_model(str(tmp_path), mesh)


def test_a_checkpoint_that_cannot_be_read_is_named(workdir, mesh, tmp_path):
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "checkpoints" / "8" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(InputError, match=rf"^{tmp_path / 'checkpoints' / '8'} cannot be read: [^\n]+$"):
        load_trained_model(str(tmp_path), mesh)


def test_more_texts_than_fit_at_once_are_embedded_in_parts(of_run, monkeypatch):
    monkeypatch.setattr(engines, "TEXTS_PER_BATCH", 2)
    texts = ["a", "a red circle", "a blue square", "left", "two"]
    expected = np.concatenate([of_run.embed_texts(text) for text in texts])
    np.testing.assert_allclose(of_run.embed_texts(texts), expected, atol=1e-6)


def test_frames_of_another_size_are_resized(of_run):
    frames = np.stack([numbered(number) for number in range(20)])
    assert frames.shape[1] == SIDE
    np.testing.assert_allclose(of_run.embed_videos([frames])[0], of_run.embed_videos(frames)[0], atol=1e-6)
