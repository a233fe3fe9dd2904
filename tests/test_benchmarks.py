"""Benchmarks: every config is in order, every value has a source, every protocol of the results page has a command."""

import pathlib
import re

import jax
import pytest
from saved_clip import save_clip

from configs import benchmarks, evaluate
from configs.captioning import get_config as captioning
from configs.fine_tuning import fine_tuning
from vlab_jax import config_check
from vlab_jax.config import model_fields, plain
from vlab_jax.datasets import registry
from vlab_jax.errors import InputError
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.training import optim
from vlab_jax.training.setup import read_stage
from vlab_jax.training.stage import all_groups

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "experiments" / "benchmarks.md").read_text()
ALL = [(task, name) for task, known in benchmarks.BENCHMARKS.items() for name in known]
COMMANDS = re.findall(r"^python -m vlab_jax\.main (.*)$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """The directory of published weights, in small."""
    folder = tmp_path_factory.mktemp("weights")
    save_clip(folder)
    return str(folder)


@pytest.mark.parametrize(("task", "name"), ALL)
def test_the_config_of_a_benchmark_is_in_order_and_says_what_its_table_says(clip, task, name):
    config = fine_tuning(task, f"{name},pretrained={clip},manual_dir=/data")
    config_check.check(config)
    benchmark, stage = benchmarks.BENCHMARKS[task][name], config.stage[task]
    values = {key: sourced.value for key, sourced in benchmark.values.items()}
    assert config.data.evaluate == benchmark.data and config.data.manual_dir == "/data"
    assert (config.frames, stage.frames, stage.batch_size) == (
        values["frames"],
        values["training_frames"],
        values["batch_size"],
    )
    assert stage.steps * stage.batch_size == pytest.approx(values["epochs"] * values["examples"], abs=stage.batch_size)
    assert {rate for _, rate in stage.groups} == {values["learning_rate"], values["clip_learning_rate"]}
    assert values["evaluations"] - 1 <= stage.steps // stage.evaluate_every <= values["evaluations"]
    scored = evaluate.get_config(f"{task}/{name},manual_dir=/data")
    config_check.check(scored)
    assert scored.dataset == benchmark.data and scored.tasks == config.evaluation.tasks == (task,)
    assert scored.generation == config.generation and scored.closed_list == config.evaluation.closed_list


@pytest.mark.parametrize(("task", "name"), ALL)
def test_every_value_has_a_source_and_what_is_published_nowhere_says_so(task, name):
    values = benchmarks.BENCHMARKS[task][name].values
    assert set(benchmarks.COMMON) < set(values)
    for key, (_, source) in values.items():
        short, colon, place = source.partition(": ")
        assert short in benchmarks.SOURCES and colon and place, f"{key}: {source!r}"
    assert any(source.startswith(("CLIP4Clip: ", "VALOR: ")) for _, source in values.values())


@pytest.mark.parametrize(("task", "name"), ALL)
def test_a_benchmark_s_data_set_has_its_splits_and_as_many_examples_as_are_counted(task, name):
    benchmark = benchmarks.BENCHMARKS[task][name]
    data, _, configuration = benchmark.data.partition("/")
    protocol = registry.DATASETS[data].protocol(configuration)
    assert protocol.name == configuration and {"train", "test"} <= set(protocol.files)
    assert ("validation" in protocol.files) == (benchmark.select_on == "validation")
    trained = (counts for splits, counts in protocol.expected.items() if splits.startswith("train"))
    counted = {number for counts in trained for number in counts.values()}
    # Of MSVD's training split: its captions, and the clips that MSVD-QA's questions are on.
    counted |= {"msvd": {48_774}, "msvd_qa": {1200}}.get(data, set())
    assert benchmark.values["examples"].value in counted


@pytest.mark.parametrize(
    ("task", "name", "unused"),
    [
        ("retrieval", "msvd", {"decoder"}),
        ("captioning", "msvd", {"text", "logit_scale"}),
        ("question_answering", "msvd_qa", {"text", "logit_scale"}),
        ("retrieval", "", {"decoder"}),
        ("captioning", "", {"text", "logit_scale"}),
    ],
)
def test_fine_tuning_trains_the_parts_that_its_task_uses_and_leaves_the_others_alone(clip, task, name, unused):
    config = fine_tuning(task, f"{name},pretrained={clip}" if name else f"pretrained={clip},data=folder:/x")
    model = VLAB.from_fields(model_fields(plain(config.to_dict())))
    shapes = parameter_shapes(model, config.frames)
    groups = all_groups(model, read_stage(config, task))
    numbers = optim.assign_groups(shapes, groups)
    rates = {part: {groups[number].learning_rate for number in jax.tree.leaves(numbers[part])} for part in shapes}
    assert {part for part, found in rates.items() if found == {None}} == unused
    assert max(rate for rate in rates["vision"] if rate) < min(rates["video_adapter"])


def test_retrieval_averages_frames_as_clip4clip_does_and_other_tasks_as_the_weights_they_start_from(clip):
    asked = (("retrieval", "msvd"), ("retrieval", "data=folder:/x"), ("captioning", "msvd"))
    pooling = [fine_tuning(task, f"{what},pretrained={clip}").model.frame_pooling for task, what in asked]
    assert pooling == ["normalise_then_mean", "normalise_then_mean", "mean_then_normalise"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "msvd",
            "configs/captioning.py needs pretrained=<weights>; a benchmark or data=<data set> may be added",
        ),
        ("msdv,pretrained=x", "there is no benchmark 'msdv' of captioning; did you mean 'msvd'?"),
        ("msvd,vatex,pretrained=x", "configs/captioning.py takes the name of a benchmark and pretrained=…, data=…, "),
        (
            "manual_dri=x",
            "configs/captioning.py takes the name of a benchmark and pretrained=…, data=…, manual_dir=…, ",
        ),
    ],
)
def test_an_argument_that_says_nothing_known_is_answered_in_one_line(argument, message):
    with pytest.raises(InputError) as raised:
        captioning(argument)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_a_benchmark_is_evaluated_with_its_task_before_it():
    with pytest.raises(InputError, match=r"^configs/evaluate\.py takes a task and a benchmark, as in retrieval/msvd; "):
        evaluate.get_config("msvd")
    with pytest.raises(InputError, match=r"^there is no benchmark 'msvd_qa' of captioning; "):
        evaluate.get_config("captioning/msvd_qa")


def test_the_results_page_has_a_command_for_every_protocol_it_has_a_row_of_and_no_workdir_twice():
    named = set(re.findall(r"configs/(\w+)\.py:(\w+),", " ".join(COMMANDS))) - {("pretrain", "pretrained")}
    left_out = {("retrieval", name) for name in ("msrvtt_7k", "msrvtt_7k_all", "msrvtt_full")} | {
        ("captioning", "tgif")
    }
    assert {pair for pair in named if pair[0] != "evaluate"} == set(ALL) - left_out
    workdirs = re.findall(r"--workdir=(\S+)", PAGE)
    assert len(workdirs) == len(set(workdirs)) == len(COMMANDS)


def test_figures_of_ours_stand_nowhere_without_having_been_measured():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ours")]
    assert len(rows) >= 16 and not any(re.search(r"\d\.\d", row) for row in rows)
    published = [line for line in PAGE.splitlines() if re.match(r"\| [^|]*\|.*\d\.\d", line)]
    assert len(published) > 25
    assert all(re.search(r"arXiv \d{4}\.\d{5}|github\.com/", line.split("|")[-2]) for line in published)
