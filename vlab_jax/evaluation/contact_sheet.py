"""The retrieval contact sheet: queries, and the clips found for them as strips of frames."""

import os
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

_GREEN, _GREY, _INK, _FAINT = "#1a9641", "#b8b8b8", "#222222", "#707070"

# Measures in pixels.
_MARGIN, _GAP, _FRAME_GAP, _FRAME_WIDTH = 18, 16, 1, 3
_TEXT_WIDTH, _LINE, _MAX_LINES, _MAX_FRAMES = 270, 19, 8, 8


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
    strips = [[_strip(clip, frame_size) for clip in row] for row in clips]
    texts = [_wrap(query, _font(14), _TEXT_WIDTH) for query in queries]
    notes = [""] * len(queries) if ranks is None else [f"right clip: rank {rank}" for rank in ranks]
    column = max(strip.width for row in strips for strip in row) + 2 * _FRAME_WIDTH + _GAP
    clip_height = frame_size + 2 * _FRAME_WIDTH + 22
    heights = [
        max(clip_height, _LINE * (len(text) + bool(note))) + _GAP for text, note in zip(texts, notes, strict=True)
    ]
    width = 2 * _MARGIN + _TEXT_WIDTH + _GAP + column * scores.shape[1] - _GAP
    sheet = Image.new("RGB", (width, 2 * _MARGIN + _LINE + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    left = _MARGIN + _TEXT_WIDTH + _GAP
    _draw_header(draw, [left + column * place for place in range(scores.shape[1])])
    top = _MARGIN + _LINE + 6
    for row, height in enumerate(heights):
        draw.line((_MARGIN, top - 6, width - _MARGIN, top - 6), fill="#e4e4e4")
        _draw_query(draw, (_MARGIN, top), texts[row], notes[row])
        for place, strip in enumerate(strips[row]):
            corner = (left + column * place, top)
            _draw_clip(sheet, corner, strip, bool(correct[row, place]), float(scores[row, place]))
        top += height
    sheet.save(path)
    return pathlib.Path(path)


def _font(size: int) -> ImageFont.FreeTypeFont:
    # DejaVu comes with matplotlib and covers more scripts than Pillow's own font.
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _strip(clip: np.ndarray, size: int) -> Image.Image:
    """Up to 8 frames of a clip side by side; small frames keep hard pixels, large ones are smoothed."""
    chosen = np.linspace(0, len(clip) - 1, min(len(clip), _MAX_FRAMES)).round().astype(int)
    strip = Image.new("RGB", (len(chosen) * (size + _FRAME_GAP) - _FRAME_GAP, size), "white")
    for place, index in enumerate(chosen):
        whole_multiple = size % clip.shape[1] == 0
        method = Image.Resampling.NEAREST if whole_multiple else Image.Resampling.LANCZOS
        strip.paste(Image.fromarray(clip[index]).resize((size, size), method), (place * (size + _FRAME_GAP), 0))
    return strip


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks a text into lines that fit; a word wider than a line is broken between letters."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) <= _MAX_LINES:
        return lines
    last = lines[_MAX_LINES - 1]
    while font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: _MAX_LINES - 1], last + "…"]


def _draw_header(draw: ImageDraw.ImageDraw, columns: Sequence[int]) -> None:
    draw.text((_MARGIN, _MARGIN - 6), "query", fill=_FAINT, font=_font(12))
    for place, x in enumerate(columns, start=1):
        draw.text((x, _MARGIN - 6), f"rank {place}", fill=_FAINT, font=_font(12))


def _draw_query(draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], note: str) -> None:
    x, y = corner
    for number, line in enumerate(lines):
        draw.text((x, y + number * _LINE), line, fill=_INK, font=_font(14))
    draw.text((x, y + len(lines) * _LINE + 1), note, fill=_FAINT, font=_font(12))


def _draw_clip(sheet: Image.Image, corner: tuple[int, int], strip: Image.Image, right: bool, score: float) -> None:
    x, y = corner
    draw = ImageDraw.Draw(sheet)
    outer = (x, y, x + strip.width + 2 * _FRAME_WIDTH - 1, y + strip.height + 2 * _FRAME_WIDTH - 1)
    draw.rectangle(outer, outline=_GREEN if right else _GREY, width=_FRAME_WIDTH if right else 1)
    sheet.paste(strip, (x + _FRAME_WIDTH, y + _FRAME_WIDTH))
    # The word repeats what the colour says, for those who do not tell green from grey.
    text = f"{score:.3f}  right" if right else f"{score:.3f}"
    draw.text((x + _FRAME_WIDTH, outer[3] + 4), text, fill=_GREEN if right else _FAINT, font=_font(12))
