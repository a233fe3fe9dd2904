"""Encoded media: the limits that decoding one clip keeps to, and how its bytes are opened (PyAV).

A small file can ask for a lot: a header that claims a picture of 60,000 x 60,000 pixels, a time stamp a thousand years
away, a stream that decodes a thousand times slower than it plays. Real media stay far below the default limits.

FFmpeg knows hundreds of formats, some of which name other files or addresses to read (playlists, session descriptions).
Only the formats and decoders listed here are used, whatever a file's name and its first bytes say.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import av

from vlab_jax.errors import InputError

FIELDS = "data.limits"

# The bytes of a file, or a file opened for reading bytes, at any position.
Encoded = bytes | io.BufferedReader


class DecodeError(ValueError):
    """Media that cannot be decoded; the message is one line."""


@dataclasses.dataclass(frozen=True)
class MediaLimits:
    """The most that one clip may take; media that would take more are refused with a `DecodeError` that says so."""

    max_pixels: int = 2 * 7680 * 4320  # of a frame, as stored and as resized: twice 8K, for photographs
    max_frames: int = 2_592_000  # of a clip: a day at 30 a second
    max_seconds: float | int = 90_000.0  # of a clip: a day and a bit
    # Of a file of a data set, and of a clip's stored frames: the largest record there can be.
    max_bytes: int = 2**31 - 1
    decode_seconds: float | int = 600.0  # CPU time for one clip

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise InputError(f"{FIELDS}.{field.name} is {getattr(self, field.name)}; it must be more than 0")

    @property
    def clock_seconds(self) -> float | int:
        """How long a worker process may be at one clip, in seconds: then it is ended, and the clip is undecodable."""
        return 2 * self.decode_seconds

    def check_picture(self, width: int, height: int, what: str = "the media has a picture") -> None:
        """Raises `DecodeError` where a picture has too many pixels."""
        self.check("max_pixels", width * height, f"{what} of {width:,} x {height:,} pixels")

    def check_frames(self, count: int) -> None:
        """Raises `DecodeError` where a clip has too many frames."""
        self.check("max_frames", count, f"the clip has {count:,} frames or more")

    def check(self, name: str, value: float | int, found: str) -> None:
        """Raises `DecodeError` where a value is above the limit of that name, or is not a number."""
        limit = getattr(self, name)
        if not value <= limit:
            raise DecodeError(f"{found}, and {FIELDS}.{name} allows {limit:,}")


DEFAULT_LIMITS = MediaLimits()


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the limits to a command line, as `--limits.max_pixels` and so on."""
    for field in dataclasses.fields(MediaLimits):
        options = {"type": type(field.default), "default": field.default, "help": "of one clip (default: %(default)s)"}
        parser.add_argument(f"--limits.{field.name}", **options)


def limit_fields(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `MediaLimits` from the values of these flags."""
    return {field.name: flags[f"limits.{field.name}"] for field in dataclasses.fields(MediaLimits)}


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Encoded]:
    """The file at a path; of a pipe, what comes out of it. Raises `OSError`."""
    with open(path, "rb") as file:
        yield file if file.seekable() else file.read()


class MediaReader:
    """The encoded media of one clip, and the limits of decoding it; for the thread that decodes."""

    def __init__(self, media: Encoded, limits: MediaLimits) -> None:
        self.limits = limits
        self.oversized = False  # whether the decoder refused a frame without saying its size
        # CPU time of this thread, so that a busy machine is not taken for a bad file.
        self._end = time.thread_time() + limits.decode_seconds
        self.in_memory = isinstance(media, bytes)
        self._file = io.BytesIO(media) if self.in_memory else media
        self.size = len(media) if self.in_memory else os.fstat(media.fileno()).st_size
        self.head = self.open().read(12)

    def check_time(self) -> None:
        """Raises `DecodeError` where the clip has taken too long."""
        if time.thread_time() > self._end:
            allowed = f"{FIELDS}.decode_seconds allows {self.limits.decode_seconds:g}"
            raise DecodeError(f"the media takes longer to decode than it may: {allowed} s of computing")

    def open(self) -> "_Cursor":
        """A file at its beginning. Several can be read in turns: each has a position of its own."""
        return _Cursor(self, self._file)


class _Cursor(io.IOBase):
    """A file that checks the time at each read: reading is all that a container's headers can ask for."""

    def __init__(self, media: MediaReader, file: io.BytesIO | io.BufferedReader) -> None:
        self._media, self._file, self._at = media, file, 0

    def read(self, count: int = -1) -> bytes:
        self._media.check_time()
        self._file.seek(self._at)
        data = self._file.read(count)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._media.size}[whence], 0)
        return self._at

    def readable(self) -> bool:
        return True

    seekable = readable


# FFmpeg's names of demuxers: containers, raw streams, images.
FORMATS = (
    *("mov", "matroska", "avi", "mpeg", "mpegvideo", "mpegts", "asf", "flv", "ogg", "rm", "mxf", "dv", "nut", "ivf"),
    *("h264", "hevc", "m4v", "obu", "mjpeg"),
    *("gif", "apng", "webp", "webp_anim", "jpeg_pipe", "png_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe"),
)
# FFmpeg's names of decoders.
DECODERS = (
    *("h264", "hevc", "vvc", "av1", "libdav1d", "vp3", "theora", "vp6", "vp6a", "vp6f", "vp8", "vp9"),
    *("mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4", "h263", "h263i", "h263p", "flv"),
    *("wmv1", "wmv2", "wmv3", "vc1", "rv10", "rv20", "rv30", "rv40", "svq1", "svq3", "cinepak", "indeo3", "indeo5"),
    *("msvideo1", "msrle", "rawvideo", "mjpeg", "dvvideo", "dnxhd", "prores", "ffv1", "huffyuv", "ffvhuff", "utvideo"),
    *("gif", "apng", "png", "webp", "libwebp", "libwebp_anim", "bmp", "tiff", "jpeg2000", "qtrle", "rpza"),
)
_READABLE = "mp4, mov, mkv, webm, avi, mpg, ts, wmv, flv, ogv, rm, mxf, gif, and images"


@contextlib.contextmanager
def open_media(media: MediaReader) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The opened media and its video stream, whose decoder refuses frames that are larger than they may be.

    Raises `DecodeError`, and whatever PyAV raises, on media that cannot be opened.
    """
    if not media.size:
        raise DecodeError("the media is empty (0 bytes)")
    if media.in_memory:
        media.limits.check("max_bytes", media.size, f"the media is a file of {media.size:,} bytes")
    options = {
        # A playlist must not make us read other files: with no protocol allowed, only these bytes can be read.
        "protocol_whitelist": "none",
        "format_whitelist": ",".join(FORMATS),
        "codec_whitelist": ",".join(DECODERS),
    }
    # Decoders count the edges that they add to a frame, too. Opening may decode a frame.
    pixels = {"max_pixels": str(min(media.limits.max_pixels * 5 // 4 + 2**17, 2**31 - 1))}
    try:
        opening = av.open(media.open(), metadata_errors="ignore", container_options=options, options=pixels)
    except av.error.ArgumentError as error:
        raise DecodeError(
            f"the media is damaged, or of a format that is not read here; read are {_READABLE}"
        ) from error
    with opening as container:
        stream = _video_stream(container)
        context = stream.codec_context
        if context is None:
            raise DecodeError("there is no decoder for the media's video stream")
        if context.name not in DECODERS:
            raise DecodeError(f"the media's video is coded as {context.name}, which is not read here; convert it")
        media.limits.check_picture(context.width, context.height)
        context.options = pixels
        context.thread_count = 1
        yield container, stream


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    videos = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not videos:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
        raise DecodeError(f"the media has no video stream: a {container.format.name} file with {kinds}")
    best = container.streams.best("video")
    return best if best in videos else videos[0]
