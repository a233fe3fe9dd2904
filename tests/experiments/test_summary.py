"""The table and the plot of an experiment, from made-up records."""

import types

import jax
import pytest

from configs import pretrain
from experiments import grid, recipe, summary
from vlab_jax.config import model_fields, plain
from vlab_jax.errors import InputError
from vlab_jax.models.vlab import VLAB, parameter_shapes

MODULE = types.SimpleNamespace(
    ARMS={"new": 3, "old": 3, "unrun": 3},
    ROW="blend (test)",
    FIGURES={"R@1": "text_to_video/R@1", "order": "QA order"},
    COMPARED=(("new", "old"), ("new", "unrun")),
    get_config=lambda arm: recipe.tiny(1) if arm == "new" else pretrain.get_config("tiny,no_adapter"),
)


def record(arm: str, seed: int, recall: float, **more: float) -> grid.Record:
    return {"arm": arm, "seed": seed, "rows": {"blend (test)": {"text_to_video/R@1": recall, **more}}}


RECORDS = [record("new", 0, 40.0), record("new", 1, 44.0), record("old", 1, 31.0), record("old", 0, 29.0)]


def test_the_table_has_means_errors_and_paired_differences():
    costs = {arm: " | ".join(summary.cost(MODULE.get_config(arm))) for arm in ("new", "old")}
    assert costs["new"] != costs["old"]
    assert summary.table(MODULE, RECORDS).splitlines() == [
        "| arm | seeds | parameters | GFLOPs | R@1 | order |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| new | 2 | {costs['new']} | 42.0 ± 2.0 | - |",
        f"| old | 2 | {costs['old']} | 30.0 ± 1.0 | - |",
        "",
        "| difference | seeds | R@1 | order |",
        "| --- | --- | --- | --- |",
        "| new - old | 2 | 12.0 ± 1.0 (p 0.053) | - |",
        "",
        "p: two-sided paired t-test over the seeds, not corrected for the number of tests (1).",
    ]


def test_the_cost_of_an_arm_is_its_models():
    parameters, flops = summary.cost(recipe.tiny(1))
    shapes = parameter_shapes(VLAB.from_fields(model_fields(plain(recipe.tiny(1).to_dict()))), 8)
    assert int(parameters.replace(",", "")) == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert float(flops) > float(summary.cost(pretrain.get_config("tiny,no_adapter"))[1]) > 0


def test_the_plot_has_a_panel_a_figure_and_a_dot_a_seed():
    figure = summary.plot(MODULE, [*RECORDS, record("new", 2, 42.0, **{"QA order": 90.0})])
    first, second = figure.axes
    assert [len(panel.patches) for panel in (first, second)] == [2, 1]  # arms
    dots = [line for line in first.lines if line.get_marker() == "."]
    assert sorted(dots[0].get_xdata()) == [40.0, 42.0, 44.0]


def test_without_records_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "RESULTS", "no_such_results.json")
    with pytest.raises(InputError, match=r"records no run of adapting; run experiments\.grid first$"):
        summary.summarise("adapting")
