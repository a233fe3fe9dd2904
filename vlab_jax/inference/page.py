"""A page of what was found, in one file: each hit with a strip of its frames, inside the page as JPEGs."""

import base64
import html
import io
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlab_jax.data import video
from vlab_jax.data.media import opened
from vlab_jax.data.sampling import frames_at, segment_times
from vlab_jax.inference.search_index import Hit

FRAMES, HEIGHT, _QUALITY = 5, 120, 80
_STILL = 0.05  # seconds: what is shorter is an image

_STYLE = """
body { font-family: system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
ol { padding-left: 1.5rem; }
li { margin: 1.2rem 0; }
p { margin: .2rem 0; overflow-wrap: anywhere; }
.strip { display: flex; gap: 2px; overflow-x: auto; }
.about { color: #707070; }
"""


def clock(seconds: float) -> str:
    """Seconds as `0:07.5`, `12:03.0` or `1:02:03.0`."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}:{minutes:02d}" if hours else str(minutes)) + f":{rest // 10:02d}.{rest % 10}"


def span(hit: Hit) -> str:
    """When a hit is: `0:10.0-0:20.0`; empty for an image."""
    return f"{clock(hit.start)}-{clock(hit.end)}" if hit.end - hit.start >= _STILL else ""


def write_page(path: pathlib.Path, query: str, hits: Sequence[Hit], folder: pathlib.Path) -> None:
    """Writes the page; a hit whose file is gone or changed is shown without frames, and the page says so.

    Args:
      query: what was asked, shown as the title.
      folder: what the hits' files are in; links lead there.

    Raises:
      OSError: the page cannot be written.
    """
    items = "\n".join(_item(hit, folder) for hit in hits)
    title = html.escape(query)
    path.write_text(
        f'<!doctype html>\n<html>\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{_STYLE}</style>\n'
        f"</head>\n<body>\n<h1>{title}</h1>\n<ol>\n{items}\n</ol>\n</body>\n</html>\n",
        encoding="utf-8",
    )


def frames_of(path: pathlib.Path, start: float, end: float, count: int = FRAMES) -> list[bytes]:
    """JPEGs of frames spread evenly over [start, end), whole and upright, 120 pixels high; an image is one.

    Raises:
      DecodeError, OSError: the file cannot be decoded, or is gone.
    """

    def choose(times: np.ndarray, stop: float) -> np.ndarray:
        shown = video.shown_interval(times, stop, start, end)
        return np.unique(frames_at(segment_times(*shown, count), times))

    with opened(path) as media:
        return video.read_frames(media, start, end, choose, _jpeg)


def _jpeg(frame: np.ndarray, aspect: float) -> bytes:
    width, height = video.shown_size(*frame.shape[:2], aspect)
    image = Image.fromarray(np.ascontiguousarray(frame))
    buffer = io.BytesIO()
    image.resize((min(max(round(width * HEIGHT / height), 1), 20 * HEIGHT), HEIGHT), Image.Resampling.LANCZOS).save(
        buffer, "JPEG", quality=_QUALITY
    )
    return buffer.getvalue()


def _item(hit: Hit, folder: pathlib.Path) -> str:
    path, when = folder / hit.file, span(hit)
    moment = f"#t={hit.start:.3f},{hit.end:.3f}" if when else ""
    link = html.escape(path.as_uri() + moment)
    heading = f'<p><a href="{link}">{html.escape(hit.file)}</a> <span class="about">{when} {hit.score:.3f}</span></p>'
    return f"<li>\n{heading}\n{_strip(hit, path)}\n</li>"


def _strip(hit: Hit, path: pathlib.Path) -> str:
    try:
        frames = frames_of(path, hit.start, hit.end)
    except (video.DecodeError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        return f'<p class="about">no frames: {html.escape(str(reason))}</p>'
    images = [f'<img height="{HEIGHT}" alt="" src="data:image/jpeg;base64,{_text(frame)}">' for frame in frames]
    return f'<div class="strip">{"".join(images)}</div>'


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
