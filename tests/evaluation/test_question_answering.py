"""Questions on clips are answered as the model would alone, one by one; every convention is scored."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from listed_source import ListedSource
from PIL import Image
from tiny_models import quick_jit, random_like

from vlab_jax import config as configuration
from vlab_jax.data import pipeline, schema
from vlab_jax.data.schema import Question
from vlab_jax.data.tokenizer import train_bpe
from vlab_jax.datasets import registry
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.datasets.text_files import TextFile, read_answer_list
from vlab_jax.datasets.xu_qa import read_xu_qa
from vlab_jax.evaluation.answers import ceiling
from vlab_jax.evaluation.encoder import Encoder
from vlab_jax.evaluation.plan import Plan
from vlab_jax.evaluation.question_answering import answer_batch, answer_questions, evaluate
from vlab_jax.models import generation
from vlab_jax.models.generation import GenerationConfig
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.runtime import sharding
from vlab_jax.training.loop import train

CLOSED = ("red", "a blue square", "left", "2", "circle")


@pytest.fixture(scope="module")
def encoder(data_dir) -> Encoder:
    """A model of random parameters that compiles within seconds."""
    config = tiny_run.get_config()
    model = VLAB.from_fields(configuration.model_fields(configuration.plain(config.to_dict())))
    parameters = random_like(parameter_shapes(model, 4))
    texts = ["what colour is the red circle?", "a blue square moves left", "how many shapes are there? 2"] * 5
    tokenizer = train_bpe(texts, 300, 16)
    frames = pipeline.FrameOptions(4, 16)
    return Encoder(model, parameters, tokenizer, frames, ("video", "image"), (0, 2), sharding.make_mesh(), 8)


@pytest.fixture(scope="module")
def source(data_dir):
    return registry.open_split("motion/tiny", "test", BuildOptions(data_dir))


def slow_decoder(encoder: Encoder, video: np.ndarray):
    """(row of a clip, ids of a text) to log-probabilities of the next token, by the plain decoder."""

    def apply(method, *given):
        return encoder.model.apply({"params": encoder.parameters}, *given, method=method)

    seen = quick_jit(lambda v: apply("encode_visual", v, encoder.streams, encoder.image_frames).streams)(video)
    decode = quick_jit(lambda row, tokens: apply("decode", tokens, jax.tree.map(lambda x: x[row][None], seen), True))

    def log_probabilities(row: int, ids: list[int]) -> np.ndarray:
        tokens = np.zeros((1, 16), np.int32)
        tokens[0, : len(ids)] = ids
        return np.asarray(jax.nn.log_softmax(decode(row, tokens)[0, len(ids) - 1]), np.float64)

    return log_probabilities


@pytest.mark.parametrize("at_once", [512, 16], ids=["one ranking step", "three, the last one filled up"])
def test_generated_answers_and_likelihoods_are_those_of_one_clip_alone(encoder, source, at_once, monkeypatch):
    monkeypatch.setattr(generation, "TEXTS_AT_ONCE", at_once)
    search = GenerationConfig(4, encoder.tokenizer.end)
    video = np.stack([encoder.frames.decode(schema.from_example(source[index]), None) for index in range(8)])
    given = sharding.to_global({"video": video}, encoder.mesh)["video"]
    visual = encoder.cache_visual(given)
    long = "what colour is the red circle? what colour is the red circle? how many shapes are there?"
    asked = [
        (5, Question("what colour is the circle?", "red")),
        (1, Question(long, "2")),
        (5, Question("which way?", "left", "motion", ("left", "right", "a blue square"))),
        (0, Question("", "red")),
    ]
    answers = answer_batch(encoder, visual, search, asked, CLOSED)
    slow = slow_decoder(encoder, jnp.asarray(video))
    for (row, question), (words, scores) in zip(asked, answers, strict=True):
        tokens, lengths, _ = encoder.tokenizer.pairs([question.question])
        start = tokens[0, : lengths[0]].tolist()
        assert lengths[0] <= 12 and (words is None) == bool(question.options)
        if words is not None:
            text = list(start)
            for _ in range(4):
                text.append(int(slow(row, text).argmax()))
                if text[-1] == encoder.tokenizer.end:
                    break
            assert words == encoder.tokenizer.decode(text[len(start) :])
        for given_answer, score in zip(question.options or CLOSED, scores, strict=True):
            line, counts, starts = encoder.tokenizer.pairs([""], [given_answer])
            text, total = list(start), 0.0
            for token in line[0, starts[0] : counts[0]].tolist():
                total += slow(row, text)[token]
                text.append(token)
            assert score == pytest.approx(total, abs=1e-3)


def test_every_question_of_every_clip_is_answered_but_those_left_out(encoder, source):
    answered = answer_questions(encoder, source, GenerationConfig(3, encoder.tokenizer.end), without=("order",))
    clips = [schema.from_example(source[index]) for index in range(len(source))]
    expected = [(clip.id, q) for clip in clips for q in clip.questions if q.type != "order"]
    assert [(each.clip, each.question) for each in answered] == expected and len(expected) > len(clips)
    assert all((each.generated is None) == bool(each.question.options) for each in answered)


def test_all_conventions_are_scored_and_every_prediction_is_saved(encoder, source, data_dir, tmp_path):
    training = [registry.open_split("motion/tiny", "train", BuildOptions(data_dir))]
    search = GenerationConfig(3, encoder.tokenizer.end)
    plan = Plan(search, lambda: training, ("question_answering",), ("twin",), closed_list=3)
    metrics, _, shown, _ = evaluate(encoder, source, plan, tmp_path)
    assert {"QA all", "QA appearance", "QA ranked", "QA ceiling"} <= set(metrics)
    assert 0 < metrics["QA ceiling"] < 100 and metrics["QA ranked"] <= metrics["QA ceiling"]
    lines = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert set(lines[0]["predictions"]) == {"headline", "ranked"}
    for name, figure in (("headline", "QA all"), ("ranked", "QA ranked")):
        right = [line["predictions"][name]["right"] for line in lines]
        assert metrics[figure] == pytest.approx(100 * np.mean(right))
    answers = [line["predictions"]["headline"] for line in lines]
    verdicts = [text for index in sorted(shown) for text, _ in shown[index][1::2]]
    for text, line, answer in zip(verdicts, lines, answers, strict=True):
        verdict = "right" if answer["right"] else f"wrong, it is: {line['answer']}"
        assert text == f"→ {answer['answer'] or '(empty)'}  ({verdict})"


def test_a_run_learns_from_answers_and_is_scored_on_them(data_dir, tmp_path):
    config = tiny_run.get_config()
    config.data.directory, config.data.workers = data_dir, 0
    config.stages = ("blend",)
    config.stage.blend.update({"steps": 30, "groups": ((".*", 1e-2),)})
    config.stage.blend.objectives.update(contrastive=0.0, captioning=0.0, masked_lm=0.0, question_answering=1.0)
    config.evaluation.tasks, config.evaluation.closed_list, config.generation.beams = ("question_answering",), 5, 1
    config.checkpoint.every = 30
    results = train(config, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["question_answering_loss"] for record in records if "question_answering_loss" in record]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])
    assert {"QA all", "QA ranked", "QA ceiling"} <= set(results["blend (test)"])
    assert (tmp_path / "texts" / "blend (test)" / "questions.jsonl").is_file()


def test_every_validation_question_of_msrvtt_qa_is_answered_and_scored(encoder, assets, tmp_path):
    """By a model of random parameters that sees one grey picture; of the list, the first two answers are ranked."""
    folder = assets / "annotations" / "msrvtt_qa"
    listed = read_answer_list(folder / "answer_list.json")[:2]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    asked: dict[str, list[Question]] = {}
    for video, question in read_xu_qa(TextFile(folder / "val_qa.json")):
        asked.setdefault(video, []).append(question)
    questions = [question for each in asked.values() for question in each]
    assert len(questions) == 12_278 and len(asked) == 497
    picture = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 128, np.uint8)).save(picture, "JPEG")
    clips = [schema.ClipRecord(video, picture.getvalue(), (), tuple(questions)) for video, questions in asked.items()]
    plan = Plan(GenerationConfig(2, encoder.tokenizer.end), list, (), answer_list=str(tmp_path / "list.json"))
    metrics = evaluate(dataclasses.replace(encoder, batch_size=512), ListedSource(clips), plan, tmp_path).metrics
    lines = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert [line["question"] for line in lines] == [question.question for question in questions]
    right = [line["predictions"]["headline"]["right"] for line in lines]
    assert metrics["QA all"] == pytest.approx(100 * np.mean(right)) and metrics["QA all"] < 1
    kinds = {"QA what", "QA who", "QA how", "QA when", "QA where"}
    assert set(metrics) == kinds | {"QA all", "QA ranked", "QA ceiling"}
    assert metrics["QA ceiling"] == ceiling(listed, questions) >= metrics["QA ranked"]
