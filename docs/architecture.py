"""Draws the model: two streams, the text tower, and the decoder that attends to both streams.

python docs/architecture.py   # → docs/architecture.svg
"""

import argparse
import itertools
import pathlib

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

OUT = pathlib.Path(__file__).with_suffix(".svg")
CLIP, NEW, DATA, LOSS = "#dbe7f6", "#fbd9b5", "#eeeeee", "#dff0d8"


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    """Draws a rounded box with its lower left corner at (x, y), and a text in its middle."""
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor="#444444"))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, *points: tuple[float, float]) -> None:
    """Draws a line through points, with a head at the last one."""
    for one, other in itertools.pairwise(points[:-1]):
        axes.plot(*zip(one, other, strict=True), color="#444444", linewidth=1)
    axes.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "color": "#444444", "linewidth": 1})


def draw(axes: Axes) -> None:
    """Draws the whole picture, 12 units wide and 6.4 high."""
    box(axes, 0, 4.5, 1.5, 1, "T frames", DATA)
    box(axes, 0, 2.5, 1.5, 1, "some of\nthe frames", DATA)
    box(axes, 0, 0.5, 1.5, 1, "sentence", DATA)

    box(axes, 2.2, 4.1, 3.2, 1.8, "", CLIP)
    axes.text(3.8, 5.7, "video stream: CLIP's blocks", ha="center", va="center", fontsize=9)
    box(axes, 2.4, 4.8, 2.8, 0.6, "video adapter: mixes the frames", NEW)
    box(axes, 2.4, 4.2, 2.8, 0.5, "self-attention, MLP", "white")
    box(axes, 2.2, 2.5, 3.2, 1, "image stream: CLIP as it is\n(shared or separate parameters)", CLIP)
    box(axes, 2.2, 0.5, 3.2, 1, "CLIP's text tower", CLIP)
    for y in (5, 3, 1):
        arrow(axes, (1.5, y), (2.2, y))

    box(axes, 6.4, 3.9, 2.9, 2, "", NEW)
    axes.text(7.85, 5.65, "multimodal decoder", ha="center", va="center", fontsize=9)
    box(axes, 6.6, 4.9, 2.5, 0.5, "self-attention, MLP", "white")
    box(axes, 6.6, 4.1, 2.5, 0.7, "cross-attention:\nconcat, parallel or stacked", "white")
    arrow(axes, (5.4, 5), (6.4, 5))
    arrow(axes, (5.4, 3.2), (5.9, 3.2), (5.9, 4.4), (6.4, 4.4))

    box(axes, 6.4, 1.9, 2.9, 1, "means over frames, weighted,\nnormalised", "white")
    arrow(axes, (5.4, 2.8), (6.4, 2.5))
    arrow(axes, (5.0, 4.1), (5.0, 3.75), (6.1, 3.75), (6.1, 2.7), (6.4, 2.7))

    box(axes, 10.1, 5, 1.9, 0.8, "captions,\nanswers", LOSS)
    box(axes, 10.1, 4, 1.9, 0.8, "masked words", LOSS)
    box(axes, 10.1, 1.2, 1.9, 1.2, "retrieval\n(contrastive)", LOSS)
    arrow(axes, (9.3, 5.4), (10.1, 5.4))
    arrow(axes, (9.3, 4.4), (10.1, 4.4))
    arrow(axes, (9.3, 2.4), (10.1, 2.0))
    arrow(axes, (5.4, 1), (8.6, 1), (10.1, 1.5))

    for x, colour, text in ((2.2, CLIP, "CLIP"), (3.6, NEW, "added by VLAB"), (6.0, LOSS, "objectives")):
        box(axes, x, -0.2, 0.3, 0.3, "", colour)
        axes.text(x + 0.42, -0.05, text, ha="left", va="center", fontsize=9)


def main() -> None:
    """Writes the picture."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    # The same file from the same code: no date, no random names, text as text.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "architecture", "font.family": "sans-serif"}
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(10, 5.5), layout="constrained")
        draw(axes)
        axes.set(xlim=(-0.1, 12.1), ylim=(-0.4, 6.1))
        axes.set_axis_off()
        figure.savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    main()
