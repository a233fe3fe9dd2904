"""The report of an evaluation: what was found, what was written, as sheets of frames and texts beside the figures."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from vlab_jax.data import pipeline, schema
from vlab_jax.evaluation import report, retrieval
from vlab_jax.evaluation.encoder import Retrieval
from vlab_jax.evaluation.registry import Outcome

# FOLDED vlab_jax/evaluation/sheets.py: What contact sheets are drawn with: fonts, wrapped text, strips of frames.
# Measures are in pixels.

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


# FOLDED vlab_jax/evaluation/sheets.py: The retrieval contact sheet: queries, and the clips found for them as
# strips of frames.

# Measures in pixels.
_FRAME_WIDTH, _QUERY_WIDTH, _QUERY_LINES = 3, 270, 8


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
    texts = [wrap(query, font(14), _QUERY_WIDTH, _QUERY_LINES) for query in queries]
    notes = [""] * len(queries) if ranks is None else [f"right clip: rank {rank}" for rank in ranks]
    column = max(drawn.width for row in strips for drawn in row) + 2 * _FRAME_WIDTH + GAP
    clip_height = frame_size + 2 * _FRAME_WIDTH + 22
    heights = [max(clip_height, LINE * (len(text) + bool(note))) + GAP for text, note in zip(texts, notes, strict=True)]
    width = 2 * MARGIN + _QUERY_WIDTH + GAP + column * scores.shape[1] - GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + LINE + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    left = MARGIN + _QUERY_WIDTH + GAP
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


# FOLDED vlab_jax/evaluation/sheets.py: The sample sheet: clips as strips of frames, each with what the model
# wrote about it and what is right.

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


def write_report(
    folder: pathlib.Path,
    metrics_file: pathlib.Path,
    results: report.Results,
    outcome: Outcome,
    source: Sequence,
    frames: pipeline.FrameOptions,
    *,
    queries: int,
    title: str,
) -> None:
    """Writes the page with plots and sheets of what retrieval found and of captions and answers; prints the table.

    Args:
      outcome: of `source`.
      queries: rows of each sheet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sheets = {}
    if outcome.retrieval is not None:
        sheets["Retrieval"] = folder / "retrieval.png"
        draw_retrieval_sheet(sheets["Retrieval"], outcome.retrieval, source, frames, queries)
    if samples := choose_samples(outcome, source, frames, queries):
        sheets["Captions and answers"] = folder / "samples.png"
        sample_sheet(sheets["Captions and answers"], samples)
    page = report.write_report(folder, metrics_file, results, sheets=sheets, title=title)
    print(retrieval.format_table(results))
    print(f"report: {page}")


def draw_retrieval_sheet(
    path: Any, found: Retrieval, source: Sequence, frames: pipeline.FrameOptions, queries: int
) -> None:
    """Draws evenly chosen queries of an evaluation, each with its five best clips."""
    captions, clips = found.similarity.shape
    chosen = _evenly(captions, queries)
    best = np.argsort(-found.similarity[chosen], axis=1, kind="stable")[:, : min(5, clips)]  # [Q, 5]
    scores = np.take_along_axis(found.similarity[chosen], best, axis=1)
    own = found.clip_of_caption[chosen]
    positives = own[:, None] == np.arange(clips)
    retrieval_contact_sheet(
        path,
        [found.captions[i] for i in chosen],
        [[frames.decode(_clip(source, found.indices[column]), None) for column in row] for row in best],
        best == own[:, None],
        scores,
        ranks=retrieval.ranks(found.similarity[chosen], positives),
    )


def choose_samples(outcome: Outcome, source: Sequence, frames: pipeline.FrameOptions, count: int) -> list[Sample]:
    """Evenly chosen clips of those that the model has written about, with its texts."""
    captions = outcome.captions.captions if outcome.captions else {}
    answers: dict[int, list[tuple[str, str, str, bool]]] = collections.defaultdict(list)
    if outcome.answers:
        _, answered, headline, judged = outcome.answers
        for each, answer, right in zip(answered, headline, judged, strict=True):
            answers[each.index].append((each.question.question, answer, each.question.answer, right))
    written = sorted({*captions, *answers})
    samples = []
    for index in [written[place] for place in _evenly(len(written), count)] if written else []:
        clip = _clip(source, index)
        shown = frames.decode(clip, None)
        samples.append(Sample(clip.id, shown, clip.captions, captions.get(index), tuple(answers[index])))
    return samples


def _evenly(length: int, count: int) -> np.ndarray:
    return np.linspace(0, length - 1, min(count, length)).round().astype(int)


def _clip(source: Sequence, index: int | np.integer) -> schema.ClipRecord:
    return schema.from_example(source[int(index)])
