"""What a browser can play of media files, and short clips of those that it cannot.

A file that browsers play is served as it is. Of others (by what is in them, not by their names: an mp4 can hold what no
browser decodes) a small H.264 clip of the moment is made, by the decoder that shows the model its frames; without
sound. An image of a kind that browsers lack becomes a JPEG.
"""

import collections
import contextlib
import dataclasses
import io
import itertools
import math
import os
import pathlib
import stat
import threading
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from vlab_jax.data import video
from vlab_jax.data.media import Encoded, opened
from vlab_jax.data.sampling import frames_at
from vlab_jax.errors import InputError

WIDTH, HEIGHT, RATE, MOST_SECONDS = 640, 320, 15, 30.0  # of clips that are made, at most
CACHE_BYTES = 256 * 2**20
_QUALITY = 85

_IMAGES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jfif"), "image/jpeg"),
    **{f".{kind}": f"image/{kind}" for kind in ("png", "webp", "bmp", "avif")},
}
_OTHER_IMAGES = (".tif", ".tiff")
_MP4, _WEBM = "video/mp4", "video/webm"
_PLAYED = {_MP4: ("h264", "av1", "vp9"), _WEBM: ("vp8", "vp9", "av1")}
_PIXELS = ("yuv420p", "yuvj420p")


@dataclasses.dataclass(frozen=True)
class Shown:
    """How a file is shown: as a `video` or an `image`, of a MIME type; `made`: a clip or a JPEG is made of it."""

    kind: str
    type: str
    made: bool


@dataclasses.dataclass(frozen=True)
class _Version:
    """A file as it is now."""

    path: str
    size: int
    time: int


class Playable:
    """Files as browsers can show them. Clips that were made are kept in a folder, the latest used, up to a size.

    Args:
      folder: exists, is empty, and is nobody else's.
      most: bytes of clips that are kept.
    """

    def __init__(self, folder: pathlib.Path, most: int = CACHE_BYTES) -> None:
        self._folder, self._most = folder, most
        self._making = threading.Lock()  # one at a time: each holds its frames in memory
        self._numbers = itertools.count()
        self._known: collections.OrderedDict[_Version, Shown] = collections.OrderedDict()
        self._made: collections.OrderedDict[tuple[_Version, float, float], pathlib.Path] = collections.OrderedDict()

    def how(self, path: pathlib.Path) -> Shown:
        """How a file is shown. Raises InputError where there is no such file."""
        version = _version(path)
        shown = self._known.get(version)
        if shown is None:
            shown = self._known[version] = _how(path)
            while len(self._known) > 10_000:
                with contextlib.suppress(KeyError):  # another thread was faster
                    self._known.popitem(last=False)
        return shown

    def file(self, path: pathlib.Path, start: float, end: float) -> tuple[pathlib.Path, str]:
        """A file that a browser shows, and its MIME type: the whole of `path`, or what is made of [start, end) of it.

        Raises:
          InputError: there is no such file, or nothing can be made of it.
        """
        shown = self.how(path)
        if not shown.made:
            return path, shown.type
        key = (_version(path), start, end)
        with self._making:
            if key not in self._made:
                self._made[key] = self._make(path, shown, start, end)
            self._made.move_to_end(key)
            self._drop()
            return self._made[key], shown.type

    def _make(self, path: pathlib.Path, shown: Shown, start: float, end: float) -> pathlib.Path:
        target = self._folder / f"{next(self._numbers)}{'.mp4' if shown.kind == 'video' else '.jpg'}"
        try:
            with opened(path) as media:
                if shown.kind == "video":
                    write_clip(target, media, start, end)
                else:
                    target.write_bytes(_jpeg(media))
        except (video.DecodeError, OSError) as error:
            target.unlink(missing_ok=True)
            raise InputError(f"{path.name}: {getattr(error, 'strerror', None) or error}") from error
        return target

    def _drop(self) -> None:
        while len(self._made) > 1 and sum(file.stat().st_size for file in self._made.values()) > self._most:
            self._made.popitem(last=False)[1].unlink()


def write_clip(target: pathlib.Path, media: Encoded, start: float, end: float) -> None:
    """Writes an mp4 of [start, end), at most `MOST_SECONDS` of it: H.264, 15 frames a second, at most 640 x 320.

    Raises:
      DecodeError: the media cannot be decoded.
    """
    stop = min(end, start + MOST_SECONDS)

    def choose(times: np.ndarray, last: float) -> np.ndarray:
        first, until = video.shown_interval(times, last, start, stop)
        return frames_at(first + np.arange(max(math.ceil((until - first) * RATE - 1e-6), 1)) / RATE, times)

    frames = video.read_frames(media, start, stop, choose, _small)
    with av.open(str(target), "w", format="mp4", options={"movflags": "+faststart"}) as output:
        stream = output.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "crf": "26"})
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        for number, frame in enumerate(frames):
            frame = frame.reformat(width=stream.width, height=stream.height)  # some files change their size
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def _how(path: pathlib.Path) -> Shown:
    suffix = path.suffix.lower()
    if suffix in _IMAGES:
        return Shown("image", _IMAGES[suffix], made=False)
    if suffix in _OTHER_IMAGES:
        return Shown("image", "image/jpeg", made=True)
    played = _played(path, suffix)
    return Shown("video", played or _MP4, made=not played)


def _played(path: pathlib.Path, suffix: str) -> str:
    """The MIME type of a video that browsers play; empty for others, also for those that cannot be opened."""
    try:
        with av.open(str(path)) as container:
            family = _MP4 if "mp4" in container.format.name.split(",") else _WEBM if suffix == ".webm" else ""
            coded = container.streams.video[0].codec_context
            return family if coded.name.startswith(_PLAYED.get(family, ())) and coded.pix_fmt in _PIXELS else ""
    except (av.error.FFmpegError, OSError, ValueError, LookupError):
        return ""


def _small(frame: np.ndarray, aspect: float) -> av.VideoFrame:
    width, height = video.shown_size(*frame.shape[:2], aspect)
    scale = min(1.0, WIDTH / width, HEIGHT / height)
    image = Image.fromarray(np.ascontiguousarray(frame)).resize((_even(width * scale), _even(height * scale)))
    return av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24").reformat(format="yuv420p", threads=1)


def _even(side: float) -> int:
    return max(round(side / 2) * 2, 2)


def _jpeg(media: Encoded) -> bytes:
    def choose(times: np.ndarray, last: float) -> np.ndarray:
        return np.zeros(1, np.int64)

    def take(frame: np.ndarray, aspect: float) -> bytes:
        buffer = io.BytesIO()
        image = Image.fromarray(np.ascontiguousarray(frame))
        image.thumbnail((2 * WIDTH, 2 * HEIGHT))
        image.save(buffer, "JPEG", quality=_QUALITY)
        return buffer.getvalue()

    return video.read_frames(media, 0.0, math.inf, choose, take)[0]


def _version(path: pathlib.Path) -> _Version:
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(f"{path.name} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path.name} is not a file")
    return _Version(str(path), found.st_size, found.st_mtime_ns)
