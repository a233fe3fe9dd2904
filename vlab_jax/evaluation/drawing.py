"""What contact sheets are drawn with: fonts, wrapped text, strips of frames. Measures are in pixels."""

import os

import matplotlib
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFont

GREEN, RED, GREY, INK, FAINT, RULE = "#1a9641", "#c0392b", "#b8b8b8", "#222222", "#707070", "#e4e4e4"
MARGIN, GAP, LINE = 18, 16, 19
_FRAME_GAP, _MAX_FRAMES = 1, 8


def font(size: int) -> ImageFont.FreeTypeFont:
    """The font of contact sheets; DejaVu comes with matplotlib and covers more scripts than Pillow's own."""
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def strip(clip: UInt8[np.ndarray, "t s s 3"], size: int) -> Image.Image:
    """Up to 8 frames of a clip side by side, `size` wide; small frames keep hard pixels, large ones are smoothed."""
    chosen = np.linspace(0, len(clip) - 1, min(len(clip), _MAX_FRAMES)).round().astype(int)
    drawn = Image.new("RGB", (len(chosen) * (size + _FRAME_GAP) - _FRAME_GAP, size), "white")
    for place, index in enumerate(chosen):
        whole_multiple = size % clip.shape[1] == 0
        method = Image.Resampling.NEAREST if whole_multiple else Image.Resampling.LANCZOS
        drawn.paste(Image.fromarray(clip[index]).resize((size, size), method), (place * (size + _FRAME_GAP), 0))
    return drawn


def wrap(text: str, used: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Breaks a text into at most `most` lines that fit; a word wider than a line is broken between letters."""
    lines = [""]
    for word in text[: most * width].split():  # no letter that shows is narrower than a pixel
        if len(lines) > most:
            break
        joined = f"{lines[-1]} {word}".strip()
        if used.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if len(lines) > most:
                break
            if used.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while used.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: most - 1], last + "…"]
