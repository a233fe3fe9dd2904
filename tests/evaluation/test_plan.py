"""What a config asks to be evaluated is evaluated, captions included, and what was written can be scored again."""

import dataclasses
import itertools
import json
from collections.abc import Iterator

import pytest
import tiny_run
from ml_collections import ConfigDict

from vlab_jax import config as configuration
from vlab_jax.data import schema
from vlab_jax.data.tokenizer import train_bpe
from vlab_jax.datasets import registry
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.errors import InputError
from vlab_jax.evaluation import captioning
from vlab_jax.evaluation.checkpoint import evaluate
from vlab_jax.evaluation.plan import Plan
from vlab_jax.models.generation import GenerationConfig
from vlab_jax.training.loop import train

SCORES = {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"}


@pytest.fixture(scope="module", autouse=True)
def quick_meteor() -> Iterator[None]:
    """A stand-in for METEOR, which loads its tables for seven seconds; test_captioning.py has the real one."""

    def letters(predictions, references, deadline):
        return sum(map(len, [*predictions, *itertools.chain(*references)])) / 1e4

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captioning, "_meteor", letters)
        yield


@pytest.fixture(scope="module")
def captioned(data_dir, tmp_path_factory) -> tuple:
    """A run that learns captions alone, evaluated on captions alone; its results and its workdir."""
    config: ConfigDict = tiny_run.get_config()
    config.data.directory, config.data.workers = data_dir, 0
    config.stages = ("blend",)
    config.stage.blend.steps = 2
    config.stage.blend.objectives.update(contrastive=0.0, masked_lm=0.0)
    config.evaluation.tasks, config.generation.beams = ("captioning",), 2
    workdir = tmp_path_factory.mktemp("captioned")
    return train(config, workdir), workdir


def test_a_run_that_asks_for_captioning_is_scored_on_captions_alone(captioned):
    results, workdir = captioned
    assert set(results["blend (test)"]) == SCORES
    assert (workdir / "report" / "index.html").is_file() and not (workdir / "report" / "retrieval.png").exists()


def test_captions_and_references_can_be_scored_again(captioned, data_dir):
    results, workdir = captioned
    folder = workdir / "texts" / "blend (test)"
    written = json.loads((folder / "predictions.json").read_text())
    predictions = {entry["image_id"]: entry["caption"] for entry in written}
    references: dict[str, list[str]] = {}
    for entry in json.loads((folder / "references.json").read_text())["annotations"]:
        references.setdefault(entry["image_id"], []).append(entry["caption"])
    source = registry.open_split("motion/tiny", "test", BuildOptions(data_dir))
    clips = [schema.from_example(source[index]) for index in range(len(source))]
    assert references == {clip.id: list(clip.captions) for clip in clips}
    again = captioning.score_captions(predictions, references)
    assert {name: 100 * score for name, score in again.items()} == pytest.approx(results["blend (test)"])


def test_a_checkpoint_is_evaluated_on_both_tasks(captioned, data_dir, tmp_path):
    results, workdir = captioned
    made = configuration.evaluation_config()
    made.data.directory, made.data.workers, made.batch_size = data_dir, 0, 8
    made.tasks, made.generation.beams = ("retrieval", "captioning"), 2
    (row,) = evaluate(made, workdir, tmp_path).values()
    assert {name: row[name] for name in SCORES} == pytest.approx(results["blend (test)"])
    assert "text_to_video/R@1" in row and (tmp_path / "texts" / "predictions.json").is_file()


def test_on_the_way_to_a_selection_only_what_decides_is_evaluated():
    plan = Plan(
        GenerationConfig(3, 1),
        list,
        tasks=("retrieval",),
        multiple_choice=("twin",),
        closed_list=5,
        answer_list="list.json",
        rerank=7,
        query_normalisation=("dual_softmax",),
    )
    quick = plan.headline("text_to_video/R@1")
    assert (quick.closed_list, quick.answer_list, quick.rerank, quick.query_normalisation) == (0, "", 0, ())
    assert dataclasses.replace(quick, closed_list=5, answer_list="list.json") == plan.headline("QA ranked")
    assert (quick.tasks, quick.multiple_choice, quick.search) == (plan.tasks, plan.multiple_choice, plan.search)


@pytest.mark.parametrize("fields", [tiny_run.get_config().evaluation, configuration.evaluation_config()])
def test_a_plan_has_all_fields_of_a_config_that_say_what_is_evaluated(fields):
    scored = {**dict(fields), "rerank": 7, "closed_list": 3, "querybank_beta": 9.0}
    made = Plan.of(scored, dict(configuration.generation_config()), train_bpe(["a circle"], 300, 16), list)
    names = configuration._scored().keys()
    assert names == {field.name for field in dataclasses.fields(made)} - {"search", "training"}
    assert {name: getattr(made, name) for name in names} == {name: scored[name] for name in names}


def test_a_caption_longer_than_the_text_tower_is_refused():
    tokenizer = train_bpe(["a circle"], 300, 16)
    generation = configuration.generation_config()
    ends = (tokenizer.end, tokenizer.context_length)
    assert GenerationConfig.from_fields(dict(generation), *ends).max_tokens == 15
    generation.max_tokens = 16
    with pytest.raises(InputError, match=r"^config\.generation\.max_tokens is 16, but .* there are only 15 positions"):
        GenerationConfig.from_fields(dict(generation), *ends)


@pytest.mark.long
def test_a_stage_is_evaluated_on_what_it_names_and_the_sheet_shows_what_was_written(data_dir, tmp_path):
    config: ConfigDict = tiny_run.get_config()
    config.data.directory = data_dir
    config.stage.adapt.steps = config.stage.blend.steps = 1
    config.evaluation.tasks, config.stage.adapt.evaluate = ("retrieval", "question_answering"), ("retrieval",)
    config.evaluation.closed_list, config.evaluation.rerank = 0, 3
    results = train(config, tmp_path)
    rows = {
        f"{stage} ({split})" for stage, split in (("adapt", "validation"), ("blend", "validation"), ("blend", "test"))
    }
    assert set(results) == rows | {f"{row}, best 3 re-ranked" for row in rows}
    assert "QA all" not in results["adapt (validation)"] and "QA all" in results["blend (test)"]
    assert set(results["blend (test), best 3 re-ranked"]) < set(results["blend (test)"])
    assert "samples.png" in (tmp_path / "report" / "index.html").read_text()
    assert (tmp_path / "report" / "samples.png").is_file()
