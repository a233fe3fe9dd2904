"""The best checkpoint on validation data is tested, also of an interrupted run; selected on test data, it is marked."""

import json
import math
import pathlib
import re
import types

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from run_files import interrupted
from tiny_run import evaluation_of

from vlab_jax import config_check
from vlab_jax.datasets.registry import open_split
from vlab_jax.errors import InputError
from vlab_jax.evaluation.checkpoint import evaluate
from vlab_jax.evaluation.plan import Plan
from vlab_jax.evaluation.registry import is_figure
from vlab_jax.runtime.checkpoint import Checkpoints, find_checkpoint
from vlab_jax.training import inputs
from vlab_jax.training.loop import train
from vlab_jax.training.selection import Selection

FIELDS = {"select_on": "validation", "select_by": ""}


def selection(folder: pathlib.Path, **fields: str) -> Selection:
    return Selection(folder, {**FIELDS, **fields}, ("retrieval",), "blend")


# Selection among evaluations


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.integers(1, 99), st.sampled_from([0.0, 1.5, 7.0, math.nan]), min_size=1, max_size=6))
def test_the_best_is_the_highest_figure_the_earliest_of_equals_and_never_a_nan(tmp_path_factory, values):
    made = selection(tmp_path_factory.mktemp("run"), select_by="CIDEr")
    for step, value in values.items():
        made.add(step, "blend", {"CIDEr": value})
    known = {step: value for step, value in values.items() if not math.isnan(value)} or dict.fromkeys(values, 0.0)
    assert made.best() == min(step for step, value in known.items() if value == max(known.values()))


@pytest.mark.parametrize(("by", "best"), [("", 3), ("text_to_video/mean_rank", 2), ("video_to_text/median_rank", 1)])
def test_ranks_are_better_when_they_are_lower(tmp_path, by, best):
    made = selection(tmp_path, select_by=by)
    names = ("text_to_video/R@1", "text_to_video/mean_rank", "video_to_text/median_rank")
    for step, figures in enumerate([(1.0, 9.0, 2.0), (2.0, 7.0, 3.0), (3.0, 8.0, 4.0)], start=1):
        made.add(step, "blend", dict(zip(names, figures, strict=True)))
    assert made.best() == best


def test_evaluations_of_other_stages_and_of_steps_not_yet_done_do_not_count(tmp_path):
    made = selection(tmp_path)
    assert made.best() is None
    for step, stage, value in [(1, "adapt", 90.0), (3, "blend", 10.0), (4, "blend", 20.0), (5, "blend", 30.0)]:
        made.add(step, stage, {"text_to_video/R@1": value})
    assert made.best() == 5
    resumed = selection(tmp_path)
    resumed.resume(4)
    assert resumed.best() == 4 and not resumed.has(5) and resumed.has(1)
    assert selection(tmp_path, select_on="last").best() is None


def test_with_last_the_end_is_tested_whatever_the_figures(tmp_path):
    made = selection(tmp_path, select_on="last", select_by="nothing")
    for step, value in [(1, 50.0), (2, 10.0)]:
        made.add(step, "blend", {"text_to_video/R@1": value})
    assert made.select() == 2 and made.rows(2) == ({}, "blend (test)")


def test_a_figure_that_is_not_there_is_answered_with_those_there_are(tmp_path):
    with pytest.raises(
        InputError, match=r"^config\.checkpoint\.select_by is 'CIDEr', which .* they are: BLEU-4, METEOR$"
    ):
        selection(tmp_path, select_by="CIDEr").add(1, "blend", {"BLEU-4": 1.0, "METEOR": 2.0})


@pytest.mark.parametrize(("on", "spelled_out"), [("test", False), ("validation", True), ("last", True)])
def test_selecting_on_test_data_must_be_spelled_out_twice(config, on, spelled_out):
    config.checkpoint.select_on, config.checkpoint.i_select_on_test_data = on, spelled_out
    with pytest.raises(InputError, match=r"^config\.checkpoint\.select_on is '\w+' and i_select_on_test_data [^\n]*$"):
        config_check.check(config)


@pytest.mark.parametrize(
    ("by", "tasks"), [("CIDer", ("captioning",)), ("CIDEr", ("retrieval",)), ("R@1", ("retrieval",))]
)
def test_a_figure_that_no_task_has_is_refused_before_training(config, by, tasks):
    config.checkpoint.select_by, config.evaluation.tasks = by, tasks
    with pytest.raises(
        InputError, match=rf"^config\.checkpoint\.select_by is '{by}'; it must be a figure of {tasks[0]}, "
    ):
        config_check.check(config)


# Runs. R@1 along the way is made to fall as the adapters grow, which start at zero.


@pytest.fixture
def falling(monkeypatch) -> None:
    whole = Plan.evaluate

    def evaluated(plan, encoder, source, folder):
        outcome = whole(plan, encoder, source, folder)
        if folder is None and encoder.label.startswith("blend ("):  # along the way
            grown = sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(encoder.parameters["video_adapter"]))
            outcome.metrics["text_to_video/R@1"] = 1e6 - grown
        return outcome

    monkeypatch.setattr(Plan, "evaluate", evaluated)


def evaluated_often(config: ConfigDict, steps: int) -> ConfigDict:
    config.stages = ("blend",)
    config.stage.blend.evaluate_every = 1
    config.stage.blend.steps = steps
    config.checkpoint.every, config.checkpoint.keep = 100, 2
    return config


def files(workdir: pathlib.Path) -> list[object]:
    return [json.loads((workdir / name).read_text()) for name in ("results.json", "selection.json")]


def test_the_best_checkpoint_is_kept_tested_and_found_and_an_interruption_changes_nothing(config, falling, tmp_path):
    evaluated_often(config, steps=4)
    whole = tmp_path / "whole"
    results = train(config, whole)
    figures = results["blend (validation)"]
    assert all(is_figure(name, ("retrieval",)) for name in figures) and len(figures) > 10
    assert list(results) == ["blend (validation)", "blend, step 1 (validation)", "blend, step 1 (test)"]
    with Checkpoints(whole / "checkpoints") as checkpoints:
        assert sorted(checkpoints._manager.all_steps()) == [1, 3, 4]
    assert find_checkpoint(whole) == (whole, 1)
    (row,) = evaluate(evaluation_of(config), whole, None).items()
    assert row[0] == "blend, step 1 (motion/tiny test)" and row[1] == pytest.approx(results["blend, step 1 (test)"])

    resumed = interrupted(whole, tmp_path / "resumed", 3)
    assert find_checkpoint(resumed) == (resumed, 3)  # the newest of a run that is not finished
    train(config, resumed)
    assert files(resumed) == files(whole)


def test_a_run_whose_data_have_no_validation_tests_its_last_checkpoint_or_is_refused(config, tmp_path, monkeypatch):
    without = types.SimpleNamespace(info=types.SimpleNamespace(splits=("train", "test")))
    registry = types.SimpleNamespace(prepare=lambda *_: without, open_split=open_split)
    monkeypatch.setattr(inputs, "registry", registry)
    with pytest.raises(InputError, match=r"^data set 'motion/tiny' has no validation split .*select_on='last'$"):
        train(config, tmp_path)
    evaluated_often(config, steps=2).checkpoint.select_on = "last"
    assert list(train(config, tmp_path)) == ["blend (test)"]
    assert find_checkpoint(tmp_path) == (tmp_path, 2)


def test_a_run_selected_on_test_data_is_marked_wherever_its_figures_stand(config, falling, tmp_path, capsys):
    evaluated_often(config, steps=2)
    config.checkpoint.select_on, config.checkpoint.i_select_on_test_data = "test", True
    config_check.check(config)
    first, tested = train(config, tmp_path)
    assert first == "blend (validation)" and tested == "blend, step 1 (test, selected on test)"
    assert tested in capsys.readouterr().out and tested in json.loads((tmp_path / "results.json").read_text())
    for name in ("index.html", "results.md", "results.json"):
        assert "selected on test" in (tmp_path / "report" / name).read_text()
    made = evaluation_of(config)
    (row,) = evaluate(made, tmp_path, None)
    assert row == "blend, step 1 (motion/tiny test, selected on test)"
    made.split = "validation"
    (row,) = evaluate(made, tmp_path, None)
    assert re.fullmatch(r"blend, step 1 \(motion/tiny validation\)", row)
