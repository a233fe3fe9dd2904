"""What encoded media are read from: their bytes, or an open file, of which no more is in memory than is being read.

An opened file may be read by several readers, each at a place of its own: they do not rely on the file's position.
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

# FOLDED vlab_jax/data/media.py: What decoding one clip may take, so that no file, whatever it holds, can fill the
# memory or occupy a worker for good.  A small file can ask for a lot: a header that claims a picture of 60,000 x
# 60,000 pixels, a time stamp a thousand years away, a stream that decodes a thousand times slower than it plays.
# Real media stay far below the defaults.

FIELDS = "data.limits"


class DecodeError(ValueError):
    """Media that cannot be decoded as asked, said in one line."""


@dataclasses.dataclass(frozen=True)
class MediaLimits:
    """The most that one clip may take; media that would take more are refused with a `DecodeError` that says so.

    Attributes:
      max_pixels: of a frame, as stored and as resized; the default is twice that of 8K (7680 x 4320), for photographs.
      max_frames: of a clip; in seconds of 30 frames, the default is a day.
      max_seconds: that a clip lasts; the default is a day and a bit.
      max_bytes: of a file that a data set is built of, and of a clip's stored frames; no record can be larger than the
        default.
      decode_seconds: of computing for one clip. A worker process that does not come back within twice that time, by the
        clock, is ended, and the clip counts as one that cannot be decoded.
    """

    max_pixels: int = 2 * 7680 * 4320
    max_frames: int = 2_592_000
    max_seconds: float | int = 90_000.0
    max_bytes: int = 2**31 - 1
    decode_seconds: float | int = 600.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise InputError(f"{FIELDS}.{field.name} is {getattr(self, field.name)}; it must be more than 0")

    @classmethod
    def from_fields(cls, fields: Any) -> "MediaLimits":
        """The limits that the group `data.limits` of a config says, or a dictionary of the same names."""
        return cls(**dict(fields))

    @property
    def clock_seconds(self) -> float | int:
        """After how long a worker process that is still at one clip is ended, in seconds."""
        return 2 * self.decode_seconds

    def check_bytes(self, count: int, what: str) -> None:
        """Raises `DecodeError` where something of so many bytes is too large."""
        self._check("max_bytes", count, f"{what} of {count:,} bytes")

    def check_picture(self, width: int, height: int, what: str = "the media has a picture") -> None:
        """Raises `DecodeError` where a picture has too many pixels."""
        self._check("max_pixels", width * height, f"{what} of {width:,} x {height:,} pixels")

    def check_frames(self, count: int) -> None:
        """Raises `DecodeError` where a clip has too many frames."""
        self._check("max_frames", count, f"the clip has {count:,} frames or more")

    def check_duration(self, seconds: float | int) -> None:
        """Raises `DecodeError` where a clip lasts too long, or not a number of seconds."""
        self._check("max_seconds", seconds, f"by its time stamps the clip lasts {seconds:,.0f} s")

    def _check(self, name: str, value: float | int, found: str) -> None:
        limit = getattr(self, name)
        if not value <= limit:
            raise DecodeError(f"{found}, and {FIELDS}.{name} allows {limit:,}")


DEFAULT_LIMITS = MediaLimits()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The limits as flags of a command line: `--limits.max_pixels` and so on."""
    for field in dataclasses.fields(MediaLimits):
        kind = int if isinstance(field.default, int) else float
        parser.add_argument(
            f"--limits.{field.name}", type=kind, default=field.default, help="of one clip (default: %(default)s)"
        )


def given_limits(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `MediaLimits` that such flags say."""
    return {field.name: given[f"limits.{field.name}"] for field in dataclasses.fields(MediaLimits)}


class Watch:
    """Holds the decoding of one clip to its limits; for the thread that decodes.

    Attributes:
      oversized: whether the decoder refused a frame of a size that it did not tell.
    """

    def __init__(self, limits: MediaLimits) -> None:
        self.limits = limits
        self.oversized = False
        # Time that this thread computes, so that a busy machine is not taken for a bad file.
        self._end = time.thread_time() + limits.decode_seconds

    def check_time(self) -> None:
        """Raises `DecodeError` where the clip has taken too long."""
        if time.thread_time() > self._end:
            allowed = f"{FIELDS}.decode_seconds allows {self.limits.decode_seconds:g}"
            raise DecodeError(f"the media takes longer to decode than it may: {allowed} s of computing")


# The bytes of a file, or a file opened for reading bytes, at any place.
Encoded = bytes | io.BufferedReader


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Encoded]:
    """The file at a path, or what comes out of it where it is a pipe. Raises `OSError`."""
    with open(path, "rb") as file:
        yield file if file.seekable() else file.read()


def size(media: Encoded) -> int:
    """How many bytes it has."""
    return len(media) if isinstance(media, bytes) else os.fstat(media.fileno()).st_size


def head(media: Encoded, count: int) -> bytes:
    """The first bytes."""
    return as_file(media).read(count)


def as_file(media: Encoded) -> io.BytesIO | io.BufferedReader:
    """A file at its beginning."""
    if isinstance(media, bytes):
        return io.BytesIO(media)
    media.seek(0)
    return media


class WatchedReader:
    """Reads within the time that the clip has: reading is all that a container's headers can ask for."""

    def __init__(self, media: Encoded, watch: Watch) -> None:
        self._file, self._size, self._watch, self._at = as_file(media), size(media), watch, 0

    def read(self, count: int = -1) -> bytes:
        self._watch.check_time()
        self._file.seek(self._at)
        found = self._file.read(count)
        self._at += len(found)
        return found

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence], 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True


# FOLDED vlab_jax/data/media.py: Media files are opened (PyAV): which kinds are, and that nothing but their own
# bytes is read.  FFmpeg knows hundreds of formats. Some name other files or addresses for it to read (playlists,
# lists of parts, session descriptions), and most are of no use here and rarely looked at by anyone. Only the
# formats and decoders listed here are used, whatever a file's name says and whatever its first bytes claim.

# As FFmpeg calls its demuxers: containers, raw streams, images.
FORMATS = (
    *("mov", "matroska", "avi", "mpeg", "mpegvideo", "mpegts", "asf", "flv", "ogg", "rm", "mxf", "dv", "nut", "ivf"),
    *("h264", "hevc", "m4v", "obu", "mjpeg"),
    *("gif", "apng", "webp", "webp_anim", "jpeg_pipe", "png_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe"),
)
# As FFmpeg calls its decoders.
DECODERS = (
    *("h264", "hevc", "vvc", "av1", "libdav1d", "vp3", "theora", "vp6", "vp6a", "vp6f", "vp8", "vp9"),
    *("mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4", "h263", "h263i", "h263p", "flv"),
    *("wmv1", "wmv2", "wmv3", "vc1", "rv10", "rv20", "rv30", "rv40", "svq1", "svq3", "cinepak", "indeo3", "indeo5"),
    *("msvideo1", "msrle", "rawvideo", "mjpeg", "dvvideo", "dnxhd", "prores", "ffv1", "huffyuv", "ffvhuff", "utvideo"),
    *("gif", "apng", "png", "webp", "libwebp", "libwebp_anim", "bmp", "tiff", "jpeg2000", "qtrle", "rpza"),
)
_READ_HERE = "mp4, mov, mkv, webm, avi, mpg, ts, wmv, flv, ogv, rm, mxf, gif, and images"


@contextlib.contextmanager
def open_media(media: Encoded, watch: Watch) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The opened media and its video stream, whose decoder refuses frames that are larger than they may be.

    Raises `DecodeError`, and whatever PyAV raises, on media that cannot be opened.
    """
    if not size(media):
        raise DecodeError("the media is empty (0 bytes)")
    if isinstance(media, bytes):
        watch.limits.check_bytes(len(media), "the media is a file")
    with _opened(media, watch) as container:
        stream = _video_stream(container)
        context = stream.codec_context
        if context is None:
            raise DecodeError("there is no decoder for the media's video stream")
        if context.name not in DECODERS:
            raise DecodeError(f"the media's video is coded as {context.name}, which is not read here; convert it")
        watch.limits.check_picture(context.width, context.height)
        context.options = _decoder_options(watch)
        context.thread_count = 1
        yield container, stream


def _opened(media: Encoded, watch: Watch) -> av.container.InputContainer:
    options = {
        # A playlist must not make us read other files: with no protocol allowed, only these bytes can be read.
        "protocol_whitelist": "none",
        "format_whitelist": ",".join(FORMATS),
        "codec_whitelist": ",".join(DECODERS),
    }
    try:
        return av.open(
            WatchedReader(media, watch),
            metadata_errors="ignore",
            container_options=options,
            options=_decoder_options(watch),  # opening may decode a frame
        )
    except av.error.ArgumentError as error:
        raise DecodeError(
            f"the media is damaged, or of a format that is not read here; read are {_READ_HERE}"
        ) from error


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    videos = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not videos:
        held = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
        raise DecodeError(f"the media has no video stream: a {container.format.name} file with {held}")
    best = container.streams.best("video")
    return best if best in videos else videos[0]


def _decoder_options(watch: Watch) -> dict[str, str]:
    # Decoders count the edges that they add to a frame, too.
    return {"max_pixels": str(min(watch.limits.max_pixels * 5 // 4 + 2**17, 2**31 - 1))}
