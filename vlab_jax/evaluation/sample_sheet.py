"""The sample sheet: clips as strips of frames, each with what the model wrote about it and what is right."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from vlab_jax.evaluation.drawing import FAINT, GAP, GREEN, INK, LINE, MARGIN, RED, RULE, font, strip, wrap

# Measures in pixels.
_TEXT_WIDTH, _MAX_LINES = 620, 3


@dataclasses.dataclass(frozen=True)
class Sample:
    """A clip and its texts.

    Attributes:
      name: the clip's id.
      frames: `[T, S, S, 3]`; of more than 8, 8 spread evenly are shown.
      references: captions of the clip.
      caption: what the model wrote; None: it was not asked for one.
      answers: (question, the model's answer, the right one, whether it counts as right).
    """

    name: str
    frames: UInt8[np.ndarray, "t s s 3"]
    references: tuple[str, ...] = ()
    caption: str | None = None
    answers: tuple[tuple[str, str, str, bool], ...] = ()


def sample_sheet(path: str | os.PathLike[str], samples: Sequence[Sample], *, frame_size: int = 64) -> pathlib.Path:
    """Draws one row per clip: its frames, and beside them references, caption, and questions with answers.

    Args:
        path: where the PNG goes.
        frame_size: side of a drawn frame, pixels.

    Raises:
        ValueError: there is no sample.
    """
    if not samples:
        raise ValueError("no sample to draw")
    strips = [strip(sample.frames, frame_size) for sample in samples]
    texts = [_lines(sample) for sample in samples]
    left = MARGIN + max(drawn.width for drawn in strips) + GAP
    heights = [max(frame_size + LINE, LINE * len(lines)) + GAP for lines in texts]
    sheet = Image.new("RGB", (left + _TEXT_WIDTH + MARGIN, 2 * MARGIN + sum(heights)), "white")
    draw, top = ImageDraw.Draw(sheet), MARGIN
    for sample, drawn, lines, height in zip(samples, strips, texts, heights, strict=True):
        draw.line((MARGIN, top - 6, sheet.width - MARGIN, top - 6), fill=RULE)
        sheet.paste(drawn, (MARGIN, top))
        draw.text((MARGIN, top + frame_size + 2), sample.name, fill=FAINT, font=font(12))
        for place, (text, colour) in enumerate(lines):
            draw.text((left, top + place * LINE), text, fill=colour, font=font(14))
        top += height
    sheet.save(path)
    return pathlib.Path(path)


def _lines(sample: Sample) -> list[tuple[str, str]]:
    """The lines of a clip's texts, each with its colour."""
    texts = [(f"reference: {reference}", FAINT) for reference in sample.references[:2]]
    if sample.caption is not None:
        texts.append((f"caption: {sample.caption or '(empty)'}", INK))
    for question, answer, right, correct in sample.answers:
        # Words repeat what the colour says, for those who do not tell green from red.
        verdict = "right" if correct else f"wrong, it is: {right}"
        texts += [(question, INK), (f"→ {answer or '(empty)'}  ({verdict})", GREEN if correct else RED)]
    return [(line, colour) for text, colour in texts for line in wrap(text, font(14), _TEXT_WIDTH, _MAX_LINES)]
