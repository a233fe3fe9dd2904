"""Media as browsers can show them: a file itself, a clip or a JPEG made of it, and a page with frames of search hits.

A browser plays a file by what is in it, not by its name: an mp4 can hold a codec that no browser decodes. Clips are
made by the decoder that shows the model its frames; they have no sound.
"""

import base64
import collections
import dataclasses
import functools
import hashlib
import html
import io
import math
import pathlib
import threading
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from vlab_jax.data import video
from vlab_jax.data.media import DEFAULT_LIMITS, MediaReader, open_media, opened
from vlab_jax.data.sampling import frames_at, segment_times
from vlab_jax.datasets.media_index import IMAGES
from vlab_jax.inference.search_index import Hit

MAX_WIDTH, MAX_HEIGHT, FRAME_RATE, MAX_SECONDS = 640, 320, 15, 30.0  # of clips that are made
MAX_MOMENTS = 200

_CODECS = {"video/mp4": ("h264", "av1", "vp9"), "video/webm": ("vp8", "vp9", "av1")}
_STRIP_FRAMES, _STRIP_HEIGHT = 5, 120
_STYLE = """
body { font-family: system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h1, p { overflow-wrap: anywhere; } p { margin: .2rem 0; } li { margin: 1.2rem 0; }
.strip { display: flex; gap: 2px; overflow-x: auto; } .about { color: #707070; }
"""


@dataclasses.dataclass(frozen=True)
class Moment:
    """[start, end) of a file, in seconds; `name` is what the user calls the file, and `note` says more."""

    path: pathlib.Path
    name: str
    start: float = 0.0
    end: float = math.inf
    note: str = ""

    @property
    def is_image(self) -> bool:
        """By the file's name."""
        return self.path.suffix.lower()[1:] in IMAGES.split("|")

    @functools.cached_property
    def browser_type(self) -> str:
        """The file's MIME type if browsers play it as it is; otherwise empty."""
        return "" if self.is_image else _browser_type(self.path)


class Moments:
    """The latest moments that were shown. What is made of them lies in `folder`, which is empty at first."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder, self._making = folder, threading.Lock()
        self._shown: collections.OrderedDict[str, Moment] = collections.OrderedDict()

    def add(self, moment: Moment) -> str:
        """A token for the moment, which tells nothing about the disk. Raises OSError where the file is gone."""
        version = (str(moment.path), moment.start, moment.end, moment.path.stat().st_mtime_ns)
        token = hashlib.sha256(repr(version).encode()).hexdigest()
        self._shown[token] = moment
        self._shown.move_to_end(token)
        while len(self._shown) > MAX_MOMENTS:
            oldest, _ = self._shown.popitem(last=False)
            (self._folder / oldest).unlink(missing_ok=True)
        return token

    def file(self, token: str) -> tuple[pathlib.Path, str]:
        """A file that browsers can show, and its MIME type.

        Raises KeyError where no such moment was shown, or too many since; and as `write_clip`.
        """
        moment = self._shown[token]
        if moment.browser_type:
            return moment.path, moment.browser_type
        path = self._folder / token
        with self._making:  # one at a time, because each holds its frames in memory
            if not path.exists():
                draft = path.with_suffix(".draft")
                if moment.is_image:
                    write_picture(draft, moment.path)
                else:
                    write_clip(draft, moment.path, moment.start, moment.end)
                draft.rename(path)
        return path, "image/jpeg" if moment.is_image else "video/mp4"


def _browser_type(path: pathlib.Path) -> str:
    try:
        with opened(path) as file, open_media(MediaReader(file, DEFAULT_LIMITS)) as (container, stream):
            mime = "video/mp4" if "mp4" in container.format.name.split(",") else "video/webm"
            codec, pixels = stream.codec_context.codec.canonical_name, stream.codec_context.pix_fmt
            is_webm_by_name = path.suffix.lower() == ".webm"  # FFmpeg has one format for mkv and webm
            is_played = codec in _CODECS[mime] and pixels in ("yuv420p", "yuvj420p")
            return mime if is_played and (mime == "video/mp4" or is_webm_by_name) else ""
    except (av.error.FFmpegError, OSError, ValueError, LookupError):  # DecodeError is a ValueError
        return ""


def write_clip(target: pathlib.Path, source: pathlib.Path, start: float, end: float) -> None:
    """Writes [start, end) of a video as an mp4: H.264, at most 30 seconds, 15 frames a second, 640 x 320 pixels.

    Raises DecodeError or OSError where the source cannot be decoded, or is gone.
    """
    stop = min(end, start + MAX_SECONDS)

    def choose(times: np.ndarray, last: float) -> np.ndarray:
        first, until = video.shown_interval(times, last, start, stop)
        return frames_at(first + np.arange(max(math.ceil((until - first) * FRAME_RATE - 1e-6), 1)) / FRAME_RATE, times)

    def shrink(frame: np.ndarray, aspect: float) -> av.VideoFrame:
        image = _fit(frame, aspect, MAX_WIDTH, MAX_HEIGHT)
        return av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24").reformat(format="yuv420p", threads=1)

    with opened(source) as media:
        frames = video.read_frames(media, start, stop, choose, shrink)
    with av.open(str(target), "w", format="mp4", options={"movflags": "+faststart"}) as output:
        stream = output.add_stream("libx264", rate=FRAME_RATE, options={"preset": "veryfast", "crf": "26"})
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        for number, frame in enumerate(frames):
            frame = frame.reformat(width=stream.width, height=stream.height)  # some files change their size
            frame.pts, frame.time_base = number, Fraction(1, FRAME_RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def write_picture(target: pathlib.Path, source: pathlib.Path) -> None:
    """Writes an image as a JPEG of at most 1280 x 640 pixels. Raises as `write_clip`."""

    def encode(frame: np.ndarray, aspect: float) -> bytes:
        return _jpeg(_fit(frame, aspect, 2 * MAX_WIDTH, 2 * MAX_HEIGHT))

    with opened(source) as media:
        [picture] = video.read_frames(media, 0.0, math.inf, lambda times, last: np.zeros(1, np.int64), encode)
    target.write_bytes(picture)


def _fit(frame: np.ndarray, aspect: float, max_width: int, max_height: int) -> Image.Image:
    """The frame in square pixels, shrunk where it is larger; with even sides, as 4:2:0 colours need them."""
    width, height = video.shown_size(*frame.shape[:2], aspect)
    scale = min(1.0, max_width / width, max_height / height)
    even = [max(round(side * scale / 2) * 2, 2) for side in (width, height)]
    return Image.fromarray(np.ascontiguousarray(frame)).resize(even)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_hits(path: pathlib.Path, query: str, hits: Sequence[Hit], folder: pathlib.Path) -> None:
    """Writes one HTML file: each hit with a link to its file in `folder`, and a strip of its frames, as JPEGs within.

    If the file of a hit is gone, the page shows the reason instead of frames. Raises OSError.
    """
    items = "\n".join(_hit_item(hit, folder / hit.file) for hit in hits)
    title = html.escape(query)
    path.write_text(
        f'<!doctype html>\n<html>\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{_STYLE}</style>\n'
        f"</head>\n<body>\n<h1>{title}</h1>\n<ol>\n{items}\n</ol>\n</body>\n</html>\n",
        encoding="utf-8",
    )


def _hit_item(hit: Hit, path: pathlib.Path) -> str:
    def choose(times: np.ndarray, stop: float) -> np.ndarray:
        shown = video.shown_interval(times, stop, hit.start, hit.end)
        return np.unique(frames_at(segment_times(*shown, _STRIP_FRAMES), times))  # an image is one frame

    def encode(frame: np.ndarray, aspect: float) -> str:
        data = base64.b64encode(_jpeg(_fit(frame, aspect, 20 * _STRIP_HEIGHT, _STRIP_HEIGHT))).decode()
        return f'<img height="{_STRIP_HEIGHT}" alt="" src="data:image/jpeg;base64,{data}">'

    try:
        with opened(path) as media:
            images = video.read_frames(media, hit.start, hit.end, choose, encode)
        strip = f'<div class="strip">{"".join(images)}</div>'
    except (video.DecodeError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        strip = f'<p class="about">no frames: {html.escape(str(reason))}</p>'
    link = html.escape(path.as_uri() + (f"#t={hit.start:.3f},{hit.end:.3f}" if hit.span else ""))
    about = f'<span class="about">{hit.span} {hit.score:.3f}</span>'
    return f'<li>\n<p><a href="{link}">{html.escape(hit.file)}</a> {about}</p>\n{strip}\n</li>'
