"""A task is named in the registry alone: config checks, selection, evaluation, report and table know a new one."""

import sys
import types

import numpy as np
import pytest
import tiny_run
from listed_source import ListedSource

from vlab_jax import config_check
from vlab_jax.data import pipeline, schema
from vlab_jax.errors import InputError
from vlab_jax.evaluation import plan, registry, report, sheets
from vlab_jax.evaluation.encoder import Encoder
from vlab_jax.models.generation import GenerationConfig
from vlab_jax.training.selection import Selection


def evaluate(encoder, source, made, folder) -> plan.TaskResult:
    """A task that counts clips."""

    def draw(path, rows, frames_of):
        sheets.sample_sheet(path, [sheets.Sample("counted", frames_of(0), [("a clip", sheets.INK)])])

    lines = {0: [(f"counted: {len(source)}", sheets.INK)]}
    return plan.TaskResult({"missed": 2.0}, {"twice": {"missed": 4.0}}, lines, [("Counts", "counts.png", draw)])


@pytest.fixture
def counting(monkeypatch) -> str:
    monkeypatch.setitem(sys.modules, "vlab_jax.evaluation.counting", types.SimpleNamespace(evaluate=evaluate))
    monkeypatch.setitem(registry.TASKS, "counting", registry.Task("counting", "missed|found", "found", "missed"))
    return "counting"


def test_a_new_task_passes_config_checks_with_its_figures(counting):
    config = tiny_run.get_config()
    config.evaluation.tasks, config.checkpoint.select_by = (counting,), "missed"
    config_check.check(config)
    config.checkpoint.select_by = "CIDEr"
    with pytest.raises(InputError, match=r"must be a figure of counting, as 'found'$"):
        config_check.check(config)
    config.evaluation.tasks = ("guessing",)
    with pytest.raises(InputError, match=r"must name one or more of retrieval, .*, counting$"):
        config_check.check(config)


def test_a_new_task_selects_a_checkpoint_by_its_default_figure_and_knows_what_is_better(counting, tmp_path):
    assert Selection(tmp_path, {"select_on": "validation", "select_by": ""}, (counting,), "blend").by == "found"
    made = Selection(tmp_path, {"select_on": "validation", "select_by": "missed"}, (counting,), "blend")
    for step, missed in ((1, 3.0), (2, 1.0), (3, 2.0)):
        made.add(step, "blend", {"missed": missed})
    assert made.best() == 2


def test_a_new_task_is_run_and_shown_in_table_and_report(counting, tmp_path, capsys):
    class Frames(pipeline.FrameOptions):
        def decode(self, clip, rng):
            return np.zeros((2, 16, 16, 3), np.uint8)

    source = ListedSource([schema.ClipRecord("clip", b"", ("a caption",))])
    made = plan.Plan(GenerationConfig(3, 1), list, (counting,))
    outcome = made.evaluate(object.__new__(Encoder), source, None)
    assert outcome.by_row("clips") == {"clips": {"missed": 2.0}, "clips, twice": {"missed": 4.0}}
    results = outcome.by_row("clips")
    report.write_report(tmp_path, "x", tmp_path / "none", results, outcome, source, Frames(2, 16), 3)
    assert {"counts.png", "samples.png"} <= {path.name for path in tmp_path.iterdir()}
    page = (tmp_path / "index.html").read_text()
    assert "Counts" in page and "Captions and answers" in page and "missed" in capsys.readouterr().out


def test_every_task_has_a_module_and_its_default_figure_is_one_of_its_figures():
    for name, task in registry.TASKS.items():
        assert callable(task.evaluate()) and registry.is_figure(task.default_figure, (name,))
        assert not registry.lower_is_better(task.default_figure)
    assert registry.lower_is_better("text_to_video/mean_rank") and registry.lower_is_better("QA count MSE")
