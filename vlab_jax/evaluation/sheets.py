"""Sheets of a report, drawn by matplotlib: clips as strips of frames, beside queries, captions, questions and answers.

Measures are pixels of the PNG. The words "right" and "wrong" repeat what colours say, for those who cannot tell them
apart.
"""

import pathlib
import textwrap
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

GREEN, RED, GREY, INK, FAINT = "#1a9641", "#c0392b", "#b8b8b8", "#222222", "#707070"
_MARGIN, _GAP, _LINE, _LETTER, _DPI = 18, 16, 19, 8, 100
_MAX_FRAMES = 8

Lines = Sequence[tuple[str, str]]  # of text, each with its colour


class Sample(NamedTuple):
    """A clip, uint8 `[T, S, S, 3]`, with the lines that stand beside it."""

    name: str
    frames: np.ndarray
    lines: Lines


def evenly(length: int, count: int) -> np.ndarray:
    """At most `count` indices below `length`, spread evenly, the first and the last among them."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int)


def strip(clip: UInt8[np.ndarray, "t s s 3"]) -> UInt8[np.ndarray, "s w 3"]:
    """At most 8 frames of a clip, spread evenly, side by side with a thin gap between them."""
    gap = max(1, clip.shape[1] // 48)
    padded = np.pad(clip[evenly(len(clip), _MAX_FRAMES)], ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
    return np.concatenate(padded, axis=1)[:, :-gap]


def wrap(text: str, width: int, lines: int) -> list[str]:
    """Breaks a text into lines of at most `width` letters; a text of more than `lines` of them ends in an ellipsis."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text[: 2 * width * lines])
    return textwrap.wrap(printable, width, max_lines=lines, placeholder=" …")


def retrieval_sheet(
    path: pathlib.Path,
    queries: Sequence[str],
    clips: Sequence[Sequence[UInt8[np.ndarray, "_ _ _ 3"]]],
    correct: Bool[np.ndarray, "q k"],
    scores: Float[np.ndarray, "q k"],
    ranks: Int[np.ndarray, " q"],
) -> None:
    """Draws a row for each query: its text, then its `k` best clips, right ones framed in green.

    Args:
      clips: per query, its `k` best clips, best first, each `[T, S, S, 3]`.
      correct: which of them are right.
      scores: their similarities.
      ranks: 1-based rank of each query's right clip.
    """
    width, size = 34, 48
    texts = [
        [*((line, INK) for line in wrap(query, width, 8)), (f"right clip: rank {rank}", FAINT)]
        for query, rank in zip(queries, ranks, strict=True)
    ]
    strips = [[strip(clip) for clip in row] for row in clips]
    column = max(_width(image, size) for row in strips for image in row) + _GAP
    places = [_MARGIN + _LETTER * width + _GAP + column * place for place in range(scores.shape[1] + 1)]
    axes, tops = _canvas(texts, size, places.pop() + _MARGIN, _MARGIN + _LINE)
    for number, x in enumerate(places, start=1):
        _write(axes, x, _MARGIN, [(f"rank {number}", FAINT)])
    for row, top in enumerate(tops):
        _write(axes, _MARGIN, top, texts[row])
        for x, image, right, score in zip(places, strips[row], correct[row], scores[row], strict=True):
            _draw(axes, x, top, image, size, edge=GREEN if right else GREY, edge_width=3 if right else 1)
            note = f"{score:.3f}{'  right' if right else ''}"
            _write(axes, x, top + size + 5, [(note, GREEN if right else FAINT)])
    _save(axes.figure, path)


def sample_sheet(path: pathlib.Path, samples: Sequence[Sample]) -> None:
    """Draws a row for each clip: its frames and its name, and beside them its lines."""
    width, size = 78, 64
    strips = [strip(sample.frames) for sample in samples]
    texts = [[(line, colour) for text, colour in each.lines for line in wrap(text, width, 3)] for each in samples]
    left = _MARGIN + max(_width(image, size) for image in strips) + _GAP
    axes, tops = _canvas(texts, size, left + _LETTER * width + _MARGIN, _MARGIN)
    for sample, image, text, top in zip(samples, strips, texts, tops, strict=True):
        _draw(axes, _MARGIN, top, image, size)
        _write(axes, _MARGIN, top + size + 5, [(line, FAINT) for line in wrap(sample.name, width, 1)])
        _write(axes, left, top, text)
    _save(axes.figure, path)


def _canvas(texts: Sequence[Lines], frame_size: int, width: int, first: int) -> tuple[Axes, list[int]]:
    """Axes that fill a figure, in pixels from the upper left corner, and the top of each row; `first` is the first's.

    A row has room for its text, and for a strip with a line below.
    """
    heights = [max(frame_size + 2 * _LINE, _LINE * len(lines)) + _GAP for lines in texts]
    *tops, bottom = [first + sum(heights[:row]) for row in range(len(heights) + 1)]
    height = bottom + _MARGIN
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    axes.set_axis_off()
    return axes, tops


def _width(image: np.ndarray, height: int) -> int:
    return round(image.shape[1] * height / image.shape[0])


def _draw(axes: Axes, x: int, y: int, image: np.ndarray, height: int, edge: str = "none", edge_width: int = 0) -> None:
    width = _width(image, height)
    axes.imshow(image, extent=(x, x + width, y + height, y), aspect="auto")
    # Outside of the frames: half of a line's width lies on either side of it.
    outside, points = edge_width / 2, edge_width * 72 / _DPI
    corner = (x - outside, y - outside)
    axes.add_patch(
        Rectangle(corner, width + edge_width, height + edge_width, fill=False, edgecolor=edge, linewidth=points)
    )


def _write(axes: Axes, x: int, y: int, lines: Lines) -> None:
    for place, (line, colour) in enumerate(lines):
        axes.text(x, y + place * _LINE, line, color=colour, size=10, va="top", parse_math=False)


def _save(figure: Figure, path: pathlib.Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # matplotlib's font lacks some scripts
        figure.savefig(path)
