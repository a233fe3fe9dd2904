"""The report at the end of a run: plots, a results table, retrieval contact sheets, one static page.

Everything is drawn from what was recorded (`metrics.jsonl`, result figures, frames), so a report can be
written again without the model. Losses are recognised by a part of their key that is `loss` or ends in
`_loss` (`loss/contrastive`), learning rates by one that begins with `learning_rate`, twin accuracy by `twin`.
"""

import html
import itertools
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlab_jax.evaluation import retrieval
from vlab_jax.runtime import metrics

Results = Mapping[str, Mapping[str, SupportsFloat]]

_STAGE_COLOURS = ("#eef3fa", "#fbf3e6", "#edf7ee", "#f6eef8")
_RECALL_COLOURS = {"R@1": "#1f4e8c", "R@5": "#5b8fd0", "R@10": "#b3cdec"}


def write_report(
    report_dir: str | os.PathLike[str],
    metrics_file: str | os.PathLike[str],
    results: Results,
    *,
    sheets: Mapping[str, str | os.PathLike[str]] | None = None,
    title: str = "VLAB-JAX run",
) -> pathlib.Path:
    """Writes plots, `results.json`, `results.md` and `index.html`; what was not recorded is left out.

    Args:
        report_dir: created if missing; files of an earlier report are replaced.
        metrics_file: the run's `metrics.jsonl`; it may be missing.
        results: figures of each stage or protocol, by its name: keys of `retrieval_metrics`, and others.
        sheets: contact sheets already written inside `report_dir`, by heading.
        title: heading of the page.

    Returns:
        The path of `index.html`.

    Raises:
        InputError: `metrics_file` holds a line that is not a record of metrics.
    """
    folder = pathlib.Path(report_dir)
    folder.mkdir(parents=True, exist_ok=True)
    records = metrics.read_metrics(metrics_file) if os.path.exists(metrics_file) else []
    images = {}
    for heading, name, figure in (
        ("Training", "training.png", training_figure(records)),
        ("Results by stage", "results.png", results_figure(results)),
    ):
        if figure is not None:
            figure.savefig(folder / name)
            images[heading] = name
    for heading, sheet in (sheets or {}).items():
        images[heading] = pathlib.Path(os.path.relpath(sheet, folder)).as_posix()
    plain = {row: {k: metrics.json_safe(v) for k, v in figures.items()} for row, figures in results.items()}
    _write(folder / "results.json", json.dumps(plain, indent=2, allow_nan=False))
    _write(folder / "results.md", retrieval.format_markdown(results))
    return _write(folder / "index.html", _page(title, results, images))


def _write(path: pathlib.Path, text: str) -> pathlib.Path:
    path.write_text(text + "\n", encoding="utf-8")
    return path


# Plots.


def training_figure(records: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Loss per objective, learning rates, clips a second, and shares (of time that the model waits for clips, of the
    chip's peak), as far as they are recorded, over the global step; stages shaded and named.

    Args:
        records: lines of `metrics.jsonl` (`meters.read_metrics`).

    Returns:
        The figure, or None where none of these was recorded.
    """
    keys = sorted({key for record in records for key in record})
    panels = {
        "loss": [k for k in keys if _is_loss(k)],
        "learning rate": [k for k in keys if _is_rate(k)],
        "clips/s": [k for k in keys if k == "clips_per_second"],
        "share": [k for k in keys if k in ("input_wait_share", "mfu")],
    }
    panels = {name: curves for name, curves in panels.items() if curves}
    if not panels:
        return None
    heights = [3.6 if name == "loss" else 2.0 for name in panels]
    figure = Figure(figsize=(9, sum(heights) + 0.4), dpi=110, layout="constrained")
    grid = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)
    for axes, (name, curves) in zip(grid[:, 0], panels.items(), strict=True):
        for key in curves:
            _draw_curve(axes, records, key)
        _shade_stages(axes, records, named=axes is grid[0, 0])
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        # Beside the curves: there is no corner that is free in every run.
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.005, 1.02), frameon=False)
    grid[-1, 0].set_xlabel("global step")
    return figure


def _is_loss(key: str) -> bool:
    return any(part == "loss" or part.endswith("_loss") for part in key.split("/"))


def _is_rate(key: str) -> bool:
    return any(part.startswith("learning_rate") for part in key.split("/"))


def _draw_curve(axes: Axes, records: Sequence[Mapping[str, Any]], key: str) -> None:
    points = [(record["step"], record[key]) for record in records if key in record]
    steps = [step for step, _ in points]
    # A null was NaN or infinite: NaN leaves a gap there.
    values = [math.nan if value is None else value for _, value in points]
    style = "--" if key.startswith(("validation", "test")) else "-"
    marker = "o" if len(points) < 30 else None
    axes.plot(steps, values, style, marker=marker, markersize=3, linewidth=1.3, label=_curve_label(key))


def _curve_label(key: str) -> str:
    parts = [part.removesuffix("_loss") for part in key.split("/") if part not in ("loss", "learning_rate")]
    return " ".join(parts).replace("_", " ") or ("total" if _is_loss(key) else "all parameters")


def _shade_stages(axes: Axes, records: Sequence[Mapping[str, Any]], *, named: bool) -> None:
    """A band per stage, from where the stage before ended; its name stands above it, where no curve runs."""
    ends: dict[str, int] = {}
    for record in records:
        if record.get("stage") is not None:
            ends[record["stage"]] = max(record["step"], ends.get(record["stage"], 0))
    start = 0
    for index, (stage, end) in enumerate(ends.items()):
        axes.axvspan(start, end, color=_STAGE_COLOURS[index % len(_STAGE_COLOURS)], zorder=0)
        if named:
            middle = (start + end) / 2
            axes.text(middle, 1.015, stage, transform=axes.get_xaxis_transform(), ha="center", fontsize=9)
        start = end
    axes.margins(x=0)


def results_figure(results: Results) -> Figure | None:
    """R@1/5/10 by stage in both directions, and twin accuracy with its chance line of 50 %.

    Args:
        results: figures in percent, by stage, then by key.

    Returns:
        The figure, or None where the results hold nothing of the kind.
    """
    panels = [
        (heading, {f"{direction}/{name}": name for name in _RECALL_COLOURS})
        for direction, heading in retrieval.DIRECTIONS.items()
    ]
    twins = dict.fromkeys(key for figures in results.values() for key in figures if "twin" in key)
    panels.append(("twin accuracy", {key: key.replace("_", " ") for key in twins}))
    panels = [p for p in panels if any(key in figures for figures in results.values() for key in p[1])]
    if not panels:
        return None
    width = max(3.4, 0.9 * len(results) + 1.2)
    figure = Figure(figsize=(width * len(panels), 3.6), dpi=110, layout="constrained")
    for axes, (heading, bars) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_bars(axes, results, bars)
        axes.set_title(heading, fontsize=11)
        if heading == "twin accuracy":
            axes.axhline(50, color="#c0392b", linestyle="--", linewidth=1.2, label="chance")
        axes.legend(fontsize=8, loc="upper center", ncols=4, frameon=False)
    figure.axes[0].set_ylabel("%")
    return figure


def _draw_bars(axes: Axes, results: Results, bars: Mapping[str, str]) -> None:
    width = 0.8 / len(bars)
    for index, (key, label) in enumerate(bars.items()):
        values = [float(figures.get(key, math.nan)) for figures in results.values()]
        places = np.arange(len(values)) + (index - (len(bars) - 1) / 2) * width
        colour = _RECALL_COLOURS.get(label, "#6b5b95" if index == 0 else None)
        drawn = axes.bar(places, values, width * 0.92, label=label, color=colour)
        axes.bar_label(drawn, [f"{v:.0f}" if math.isfinite(v) else "" for v in values], fontsize=7, padding=1)
    crowded = max(map(len, results)) * len(results) > 30
    turned = {"rotation": 30, "ha": "right"} if crowded else {}
    axes.set_xticks(range(len(results)), list(results), **turned)
    axes.set_xlim(-0.6, len(results) - 0.4)
    # Above 100 % there is room for the legend.
    axes.set_ylim(0, 122)
    axes.set_yticks(range(0, 101, 20))
    axes.spines[["top", "right"]].set_visible(False)


# Page.

_STYLE = """
body { font-family: system-ui, sans-serif; color: #222; max-width: 1100px;
  margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
th[colspan] { text-align: center; }
img { max-width: 100%; border: 1px solid #eee; }
.table { overflow-x: auto; }
"""


def _page(title: str, results: Results, images: Mapping[str, str]) -> str:
    sections = [
        f'<h2>{html.escape(heading)}</h2>\n<a href="{html.escape(source)}">'
        f'<img src="{html.escape(source)}" alt="{html.escape(heading)}"></a>'
        for heading, source in images.items()
    ]
    name = html.escape(title)
    return "\n".join(
        [
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{name}</title>',
            f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{name}</h1>",
            "<h2>Results</h2>",
            _html_table(results) if results else "<p>No results.</p>",
            "<p>R@k in percent; MdR, MnR: median and mean rank, 1 is best; ties count against the model.</p>",
            *sections,
            "</body>\n</html>",
        ]
    )


def _html_table(results: Results) -> str:
    headings, groups, rows = retrieval.table(results)
    runs = [(group, len(list(members))) for group, members in itertools.groupby(groups)]
    spans = "".join(
        f'<th colspan="{size}">{html.escape(group)}</th>' if group else "<th></th>" * size for group, size in runs
    )
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    lines = [spans, head, *body]
    return '<div class="table"><table>\n' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table></div>"
