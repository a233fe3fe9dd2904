"""The report of a run or an evaluation: plots, a results table, sheets of clips with texts, one static page.

Plots are drawn from the recorded `metrics.jsonl`. A part of its keys tells what they are: `loss` or an ending in
`_loss` a loss (`loss/contrastive`), a beginning with `learning_rate` a learning rate; in the results, `twin` marks the
accuracy on time-reversed pairs ("twins").
"""

import collections
import html
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlab_jax.data import pipeline, schema
from vlab_jax.evaluation import sheets
from vlab_jax.evaluation.plan import Outcome
from vlab_jax.evaluation.retrieval_metrics import DIRECTIONS
from vlab_jax.runtime import metrics

# Figures by the name of the row (a stage, a protocol).
Results = Mapping[str, Mapping[str, SupportsFloat]]

_COLUMNS = {"R@1": "R@1", "R@5": "R@5", "R@10": "R@10", "median_rank": "MdR", "mean_rank": "MnR"}
_STAGE_COLOURS = ("#eef3fa", "#fbf3e6", "#edf7ee", "#f6eef8")
_RECALL_COLOURS = {"R@1": "#1f4e8c", "R@5": "#5b8fd0", "R@10": "#b3cdec"}


def write_report(
    folder: pathlib.Path,
    title: str,
    metrics_file: pathlib.Path,
    results: Results,
    outcome: Outcome,
    source: Sequence,
    frames: pipeline.FrameOptions,
    queries: int,
) -> None:
    """Writes the page with the plots and the sheets of each task; prints the table.

    Args:
      outcome: the results on `source`, a data source of the schema.
      queries: rows of each sheet.
    """

    def frames_of(index: int) -> np.ndarray:
        return frames.decode(schema.from_example(source[index]), None)

    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    lines: dict[int, list[tuple[str, str]]] = collections.defaultdict(list)
    for result in outcome.tasks.values():
        for heading, name, draw in result.sheets:
            draw(folder / name, queries, frames_of)
            pictures[heading] = name
        for index, new in result.lines.items():
            lines[index] += new
    if lines:
        samples = []
        for index in np.array(sorted(lines))[sheets.evenly(len(lines), queries)].tolist():
            clip = schema.from_example(source[index])
            references = [(f"reference: {caption}", sheets.FAINT) for caption in clip.captions[:2]]
            samples.append(sheets.Sample(clip.id, frames_of(index), references + lines[index]))
        pictures["Captions and answers"] = "samples.png"
        sheets.sample_sheet(folder / "samples.png", samples)
    page = write_page(folder, metrics_file, results, pictures, title)
    print(format_table(results))
    print(f"report: {page}")


def write_page(
    folder: pathlib.Path,
    metrics_file: pathlib.Path,
    results: Results,
    pictures: Mapping[str, str] = {},
    title: str = "VLAB-JAX run",
) -> pathlib.Path:
    """Writes plots, `results.json`, `results.md` and `index.html`, whose path it returns.

    Args:
      folder: created if missing; files of an earlier report are replaced.
      metrics_file: the run's `metrics.jsonl`; it may be missing.
      pictures: names of sheets in `folder`, by heading.

    Raises:
      InputError: `metrics_file` holds a line that is not a record of metrics.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = metrics.read_metrics(metrics_file) if metrics_file.exists() else []
    plots = (
        ("Training", "training.png", training_figure(records)),
        ("Results by stage", "results.png", results_figure(results)),
    )
    images = {}
    for heading, name, figure in plots:
        if figure is not None:
            figure.savefig(folder / name)
            images[heading] = name
    plain = {row: {k: metrics.json_safe(v) for k, v in figures.items()} for row, figures in results.items()}
    texts = {
        "results.json": json.dumps(plain, indent=2, allow_nan=False),
        "results.md": format_markdown(results),
        "index.html": _page(title, results, {**images, **pictures}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")
    return folder / "index.html"


# Plots.


def training_figure(records: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Loss of each objective, learning rates, clips a second, and shares (of time spent waiting for clips, of the
    chip's peak) over the global step, as far as records of `metrics.jsonl` have them; stages shaded and named.

    Returns:
      None if no record has any of these.
    """
    keys = sorted({key for record in records for key in record})
    panels = {
        "loss": [key for key in keys if _is_loss(key)],
        "learning rate": [key for key in keys if any(part.startswith("learning_rate") for part in key.split("/"))],
        "clips/s": [key for key in keys if key == "clips_per_second"],
        "share": [key for key in keys if key in ("input_wait_share", "mfu")],
    }
    panels = {name: curves for name, curves in panels.items() if curves}
    if not panels:
        return None
    heights = [3.6 if name == "loss" else 2.0 for name in panels]
    figure = Figure(figsize=(9, sum(heights) + 0.4), dpi=110, layout="constrained")
    grid = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, curves) in zip(grid, panels.items(), strict=True):
        for key in curves:
            _draw_curve(axes, records, key)
        _shade_stages(axes, records, named=axes is grid[0])
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        # Beside the curves, because no corner is free in every run.
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.005, 1.02), frameon=False)
    grid[-1].set_xlabel("global step")
    return figure


def _is_loss(key: str) -> bool:
    return any(part == "loss" or part.endswith("_loss") for part in key.split("/"))


def _draw_curve(axes: Axes, records: Sequence[Mapping[str, Any]], key: str) -> None:
    steps, values = zip(*[(record["step"], record[key]) for record in records if key in record], strict=True)
    # A null was NaN or infinite: NaN leaves a gap.
    numbers = [math.nan if value is None else value for value in values]
    parts = [part.removesuffix("_loss") for part in key.split("/") if part not in ("loss", "learning_rate")]
    label = " ".join(parts).replace("_", " ") or ("total" if _is_loss(key) else "all parameters")
    style = "--" if key.startswith(("validation", "test")) else "-"
    marker = "o" if len(steps) < 30 else None
    axes.plot(steps, numbers, style, marker=marker, markersize=3, linewidth=1.3, label=label)


def _shade_stages(axes: Axes, records: Sequence[Mapping[str, Any]], *, named: bool) -> None:
    """A band for each stage, from the end of the one before; its name stands above it, where no curve runs."""
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
    """R@1/5/10 by row in both directions, and twin accuracy with its chance line of 50 %; None if there is neither."""
    present = dict.fromkeys(key for figures in results.values() for key in figures)
    panels = {
        heading: {f"{direction}/{name}": name for name in _RECALL_COLOURS if f"{direction}/{name}" in present}
        for direction, heading in DIRECTIONS.items()
    }
    panels["twin accuracy"] = {key: key.replace("_", " ") for key in present if "twin" in key}
    panels = {heading: bars for heading, bars in panels.items() if bars}
    if not panels:
        return None
    width = max(3.4, 0.9 * len(results) + 1.2)
    figure = Figure(figsize=(width * len(panels), 3.6), dpi=110, layout="constrained")
    for axes, (heading, bars) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
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
    # Above 100 % there is room for the legend.
    axes.set(xlim=(-0.6, len(results) - 0.4), ylim=(0, 122), yticks=range(0, 101, 20))
    axes.spines[["top", "right"]].set_visible(False)


# Tables.


def table(results: Results) -> tuple[list[str], list[str], list[list[str]]]:
    """Headings (`R@1`), the group of each (`text to video`, or empty), and the rows; a figure that a row lacks is `-`.

    Columns of retrieval come in the usual order, then the others as they are.
    """
    present = dict.fromkeys(key for figures in results.values() for key in figures)
    known = {f"{d}/{c}": (heading, group) for d, group in DIRECTIONS.items() for c, heading in _COLUMNS.items()}
    columns = {key: label for key, label in known.items() if key in present}
    columns |= {key: (key.replace("_", " "), "") for key in present if key not in known}
    headings, groups = (["", *(label[part] for label in columns.values())] for part in (0, 1))
    rows = [
        [name, *(f"{float(figures[key]):.1f}" if key in figures else "-" for key in columns)]
        for name, figures in results.items()
    ]
    return headings, groups, rows


def format_table(results: Results) -> str:
    """Aligned text for a terminal, with the retrieval direction above its columns."""
    if not results:
        return "(no results)"
    headings, groups, rows = table(results)
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    top, start = "", 0
    for group, members in itertools.groupby(range(len(groups)), key=groups.__getitem__):
        columns = list(members)
        # The first column of a group is widened until the group's name fits above all of them.
        widths[columns[0]] += max(0, len(group) - sum(widths[i] + 2 for i in columns) + 2)
        top = top.ljust(start) + group
        start += sum(widths[i] + 2 for i in columns)
    lines = [top] if top.strip() else []
    for row in (headings, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    lines.insert(len(lines) - len(rows), "-" * (start - 2))
    return "\n".join(line.rstrip() for line in lines)


def format_markdown(results: Results) -> str:
    """The same table in GitHub's Markdown, the retrieval direction written out in each heading."""
    if not results:
        return "(no results)"
    headings, groups, rows = table(results)
    names = [f"{group} {heading}".strip() for heading, group in zip(headings, groups, strict=True)]
    rule = [":--"] + ["--:"] * (len(names) - 1)
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in [names, rule, *rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in escaped)


# Page.

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: system-ui, sans-serif; color: #222; max-width: 1100px;
  margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }}
th[colspan] {{ text-align: center; }}
img {{ max-width: 100%; border: 1px solid #eee; }}
.table {{ overflow-x: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
<h2>Results</h2>
{table}
<p>R@k in percent; MdR, MnR: median and mean rank, 1 is best; ties count against the model.</p>
{sections}
</body>
</html>"""


def _page(title: str, results: Results, images: Mapping[str, str]) -> str:
    pairs = [(html.escape(heading), html.escape(source)) for heading, source in images.items()]
    sections = [f'<h2>{h}</h2>\n<a href="{source}"><img src="{source}" alt="{h}"></a>' for h, source in pairs]
    results_table = _html_table(results) if results else "<p>No results.</p>"
    return _PAGE.format(title=html.escape(title), table=results_table, sections="\n".join(sections))


def _html_table(results: Results) -> str:
    headings, groups, rows = table(results)
    runs = [(group, len(list(members))) for group, members in itertools.groupby(groups)]
    spans = [f'<th colspan="{size}">{html.escape(group)}</th>' if group else "<th></th>" * size for group, size in runs]
    head = [f"<th>{html.escape(heading)}</th>" for heading in headings]
    body = [[f"<td>{html.escape(cell)}</td>" for cell in row] for row in rows]
    lines = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in (spans, head, *body))
    return f'<div class="table"><table>\n{lines}\n</table></div>'
