"""The table and the plot of an experiment, from the records of its grid.

    python -m experiments.summary adapting

writes `table.md` and `results.png` beside the experiment's `results.json`. The experiment's `config.py` chooses their
content: `ROW` of a run's results, `FIGURES` (heading and name of each score), and `COMPARED`, the pairs of arms that
are tested.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

import jax
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import grid
from experiments.comparison import Mean, Paired, paired, values
from vlab_jax.config import model_fields, plain
from vlab_jax.errors import InputError
from vlab_jax.models.flops import Workload, forward_flops
from vlab_jax.models.vlab import VLAB, parameter_shapes


def table(module: ModuleType, records: Sequence[grid.Record]) -> str:
    """Arms by scores: mean ± standard error over the seeds, then the differences of the compared arms, with p.

    Each arm also has its cost: parameters of the model, and GFLOPs of embedding one clip. The last line
    explains p, and gives the number of tests, some of which give a small p by chance.
    """
    headings = list(module.FIGURES)
    arms = ["arm", "seeds", "parameters", "GFLOPs", *headings]
    lines = [_line(arms), _line(["---"] * len(arms))]
    for arm in module.ARMS:
        seeds = {record["seed"] for record in records if record["arm"] == arm}
        if seeds:
            lines.append(_line([arm, str(len(seeds)), *cost(module.get_config(arm)), *_cells(module, records, arm)]))
    compared = {pair: _tests(module, records, *pair) for pair in module.COMPARED}
    count = sum(test is not None for tests in compared.values() for test in tests)
    if count:
        heads = ["difference", "seeds", *headings]
        lines += ["", _line(heads), _line(["---"] * len(heads))]
        lines += [_difference(*pair, tests) for pair, tests in compared.items() if any(tests)]
        lines += ["", f"p: two-sided paired t-test over the seeds, not corrected for the number of tests ({count})."]
    return "\n".join(lines) + "\n"


def cost(config: ConfigDict) -> tuple[str, str]:
    """The number of parameters of a config's model, and the GFLOPs of embedding a clip in its last stage."""
    model = VLAB.from_fields(model_fields(plain(config.to_dict())))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(model, config.frames)))
    streams = tuple(config.stage[config.stages[-1]].streams)
    one = Workload(1, config.frames, config.image_frames, streams, embedded_texts=0, decoded_texts=0)
    return f"{parameters:,}", f"{forward_flops(model, one) / 1e9:.3f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(module: ModuleType, records: Sequence[grid.Record], arm: str) -> list[str]:
    found = [values(records, arm, module.ROW, figure) for figure in module.FIGURES.values()]
    return [str(Mean.of(each.values())) if each else "-" for each in found]


def _tests(module: ModuleType, records: Sequence[grid.Record], one: str, other: str) -> list[Paired | None]:
    """The paired tests of each score, if two arms have seeds in common."""
    return [
        paired(*(values(records, arm, module.ROW, figure) for arm in (one, other)))
        for figure in module.FIGURES.values()
    ]


def _difference(one: str, other: str, tests: Sequence[Paired | None]) -> str:
    cells = [f"{test.difference} (p {test.p:.2g})" if test else "-" for test in tests]
    return _line([f"{one} - {other}", str(max(test.difference.count for test in tests if test)), *cells])


def plot(module: ModuleType, records: Sequence[grid.Record]) -> Figure:
    """One panel for each score: a bar for each arm's mean, its standard error, and a dot for each seed."""
    shown = {figure: _by_arm(module, records, figure) for figure in module.FIGURES.values()}
    figure = Figure(figsize=(2.6 * len(shown), 4.2), layout="constrained")
    for place, (heading, name) in enumerate(module.FIGURES.items(), 1):
        axes = figure.add_subplot(1, len(shown), place)
        axes.set_title(heading, fontsize=10)
        for row, (arm, found) in enumerate(shown[name].items()):
            mean = Mean.of(found.values())
            axes.barh(row, mean.value, color="#1f4e8c" if arm == next(iter(module.ARMS)) else "#b3cdec")
            if mean.count > 1:
                axes.errorbar(mean.value, row, xerr=mean.error, color="black", capsize=3)
            axes.plot(list(found.values()), [row] * len(found), ".", color="#d9822b", markersize=4)
        axes.set_yticks(range(len(shown[name])), list(shown[name]) if place == 1 else [""] * len(shown[name]))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _by_arm(module: ModuleType, records: Sequence[grid.Record], figure: str) -> Mapping[str, dict[int, float]]:
    found = {arm: values(records, arm, module.ROW, figure) for arm in module.ARMS}
    return {arm: by_seed for arm, by_seed in found.items() if by_seed}


def summarise(experiment: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes the table and the plot, and returns their paths.

    Raises:
      InputError: nothing is recorded yet, or there is no such experiment.
    """
    module, recorded = grid.module_of(experiment), grid.results_of(experiment)
    records = grid.current(experiment, grid.read_records(experiment))
    if not records:
        raise InputError(f"{recorded} records no run of {experiment}; run experiments.grid first")
    written, drawn = recorded.with_name("table.md"), recorded.with_name("results.png")
    written.write_text(table(module, records), encoding="utf-8")
    plot(module, records).savefig(drawn, dpi=110)
    return written, drawn


def main() -> None:
    """Writes the table and the plot of an experiment, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="a folder beside this file that has a config.py")
    try:
        written, drawn = summarise(parser.parse_args().experiment)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{written.read_text(encoding='utf-8')}\nwritten: {written}, {drawn}")


if __name__ == "__main__":
    main()
