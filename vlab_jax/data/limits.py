"""What decoding one clip may take, so that no file, whatever it holds, can fill the memory or occupy a worker for good.

A small file can ask for a lot: a header that claims a picture of 60,000 x 60,000 pixels, a time stamp a thousand years
away, a stream that decodes a thousand times slower than it plays. Real media stay far below the defaults.
"""

import argparse
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from vlab_jax.errors import InputError

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
