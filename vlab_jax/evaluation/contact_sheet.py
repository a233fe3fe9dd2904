"""The retrieval contact sheet: queries, and the clips found for them as strips of frames."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw

from vlab_jax.evaluation.drawing import FAINT, GAP, GREEN, GREY, INK, LINE, MARGIN, RULE, font, strip, wrap

# Measures in pixels.
_FRAME_WIDTH, _TEXT_WIDTH, _MAX_LINES = 3, 270, 8


def retrieval_contact_sheet(
    path: str | os.PathLike[str],
    queries: Sequence[str],
    clips: Sequence[Sequence[UInt8[np.ndarray, "_ s s 3"]]],
    correct: Bool[np.ndarray, "q k"],
    scores: Float[np.ndarray, "q k"],
    *,
    ranks: Int[np.ndarray, " q"] | None = None,
    frame_size: int = 48,
) -> pathlib.Path:
    """Draws one row per query: its text, then its best clips as strips of frames, right ones framed in green.

    Args:
        path: where the PNG goes.
        queries: captions; long ones are wrapped, very long ones end in an ellipsis.
        clips: per query, its `k` best clips, best first, each `[T, S, S, 3]`; of more than 8 frames, 8 spread
            evenly are shown.
        correct: which of them are right.
        scores: their similarities, written beneath.
        ranks: 1-based rank of each query's right clip, told where it is given.
        frame_size: side of a drawn frame, pixels.

    Raises:
        ValueError: no query, or lengths that differ.
    """
    if not queries or len(queries) != len(clips) or len(queries) != len(correct) or len(queries) != len(scores):
        raise ValueError(f"{len(queries)} queries, {len(clips)} lists of clips, {len(scores)} rows of scores")
    if any(len(row) != scores.shape[1] for row in clips):
        raise ValueError(f"every query needs as many clips as it has scores: {scores.shape[1]}")
    strips = [[strip(clip, frame_size) for clip in row] for row in clips]
    texts = [wrap(query, font(14), _TEXT_WIDTH, _MAX_LINES) for query in queries]
    notes = [""] * len(queries) if ranks is None else [f"right clip: rank {rank}" for rank in ranks]
    column = max(drawn.width for row in strips for drawn in row) + 2 * _FRAME_WIDTH + GAP
    clip_height = frame_size + 2 * _FRAME_WIDTH + 22
    heights = [max(clip_height, LINE * (len(text) + bool(note))) + GAP for text, note in zip(texts, notes, strict=True)]
    width = 2 * MARGIN + _TEXT_WIDTH + GAP + column * scores.shape[1] - GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + LINE + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    left = MARGIN + _TEXT_WIDTH + GAP
    _draw_header(draw, [left + column * place for place in range(scores.shape[1])])
    top = MARGIN + LINE + 6
    for row, height in enumerate(heights):
        draw.line((MARGIN, top - 6, width - MARGIN, top - 6), fill=RULE)
        _draw_query(draw, (MARGIN, top), texts[row], notes[row])
        for place, drawn in enumerate(strips[row]):
            corner = (left + column * place, top)
            _draw_clip(sheet, corner, drawn, bool(correct[row, place]), float(scores[row, place]))
        top += height
    sheet.save(path)
    return pathlib.Path(path)


def _draw_header(draw: ImageDraw.ImageDraw, columns: Sequence[int]) -> None:
    draw.text((MARGIN, MARGIN - 6), "query", fill=FAINT, font=font(12))
    for place, x in enumerate(columns, start=1):
        draw.text((x, MARGIN - 6), f"rank {place}", fill=FAINT, font=font(12))


def _draw_query(draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], note: str) -> None:
    x, y = corner
    for number, line in enumerate(lines):
        draw.text((x, y + number * LINE), line, fill=INK, font=font(14))
    draw.text((x, y + len(lines) * LINE + 1), note, fill=FAINT, font=font(12))


def _draw_clip(sheet: Image.Image, corner: tuple[int, int], drawn: Image.Image, right: bool, score: float) -> None:
    x, y = corner
    draw = ImageDraw.Draw(sheet)
    outer = (x, y, x + drawn.width + 2 * _FRAME_WIDTH - 1, y + drawn.height + 2 * _FRAME_WIDTH - 1)
    draw.rectangle(outer, outline=GREEN if right else GREY, width=_FRAME_WIDTH if right else 1)
    sheet.paste(drawn, (x + _FRAME_WIDTH, y + _FRAME_WIDTH))
    # The word repeats what the colour says, for those who do not tell green from grey.
    text = f"{score:.3f}  right" if right else f"{score:.3f}"
    draw.text((x + _FRAME_WIDTH, outer[3] + 4), text, fill=GREEN if right else FAINT, font=font(12))
