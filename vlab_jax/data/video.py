"""Encoded media become frames: the pixels of a clip, upright and square, or JPEGs of it.

Videos are decoded by PyAV (`packets.py`), and photographs by Pillow, as CLIP's preprocessing has it. Decoding runs in
one thread: the pipeline's worker processes are the parallelism.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from jaxtyping import Float, Int, UInt8
from PIL import Image, UnidentifiedImageError

from vlab_jax.data import packets
from vlab_jax.data.media import DEFAULT_LIMITS, DecodeError, Encoded, MediaLimits, MediaReader
from vlab_jax.data.packets import Choose
from vlab_jax.data.sampling import frames_at, segment_times
from vlab_jax.errors import InputError

T = TypeVar("T")

_STILL_DURATION = 0.04  # how long a photograph is shown, in seconds
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG"  # how files begin


class Orientation(NamedTuple):
    """How a stored picture becomes upright: x and y change places first, then each may be flipped."""

    swapped: bool
    flip_x: bool
    flip_y: bool


def decode_clip(
    media: Encoded | Sequence[bytes],
    *,
    num_frames: int,
    size: int,
    start: float | int = 0.0,
    end: float | int = math.inf,
    rng: np.random.Generator | None = None,
    short: str = "repeat",
    limits: MediaLimits = DEFAULT_LIMITS,
) -> UInt8[np.ndarray, "t s s 3"]:
    """RGB frames of a clip, upright, after CLIP's preprocessing (`resize_and_crop`): one from each of equal segments.

    Args:
        media: an encoded video, or an image (a one-frame video): its bytes or an open file; or a list of JPEGs, frames
            evenly spread over the clip (the `frames` variant). A list is the whole clip: `start` and `end` are ignored.
        size: side of the square, in pixels.
        start, end: the interval, in seconds from the beginning of the media; the end is cut to that of the media.
        rng: makes the time random within each segment (training); without it, the centre (evaluation).
        short: what to do where the interval has fewer than `num_frames` frames: `repeat` them, or `fail`.
        limits: what decoding may take; for a list, each image.

    Raises:
        DecodeError: the media cannot be decoded within the limits, or the interval lies outside it or is too short.
        InputError: an argument that no media could satisfy.
    """
    if num_frames < 1:
        raise InputError(f"num_frames is {num_frames}; it must be at least 1")
    if size < 1:
        raise InputError(f"size is {size}; it must be at least 1 pixel")
    if short not in ("repeat", "fail"):
        raise InputError(f"short is {short!r}; it must be 'repeat' or 'fail'")

    def choose(times: Float[np.ndarray, " n"], stop: float) -> Int[np.ndarray, " t"]:
        interval = (start, end) if isinstance(media, Encoded) else (0.0, math.inf)
        first, last = shown_interval(times, stop, *interval)
        if short == "fail":
            count = int(np.searchsorted(times, last) - frames_at(np.array([first]), times)[0])
            if count < num_frames:
                raise DecodeError(f"the clip has {count} frames and {num_frames} were asked")
        return frames_at(segment_times(first, last, num_frames, rng), times)

    def take(frame: UInt8[np.ndarray, "h w 3"], aspect: float) -> UInt8[np.ndarray, "s s 3"]:
        width, height = shown_size(frame.shape[0], frame.shape[1], aspect)
        long = size * max(width, height) // min(width, height)  # a picture of one line would become very wide
        limits.check_picture(size, long, f"resized for a square of {size}, the media has a picture")
        return resize_and_crop(frame, size, aspect)

    if isinstance(media, Encoded):
        return np.stack(read_frames(media, start, end, choose, take, limits))
    return _decode_images(media, size, choose, limits)


def read_frames(
    media: Encoded,
    start: float | int,
    end: float | int,
    choose: Choose,
    take: Callable[[UInt8[np.ndarray, "h w 3"], float], T],
    limits: MediaLimits = DEFAULT_LIMITS,
) -> list[T]:
    """What `take` makes of each frame that `choose` picks from the interval [start, end), in seconds.

    Args:
        media: an encoded video, or an image (a one-frame video): its bytes or an open file.
        choose: gets the times (seconds, increasing) at which the frames of the interval start, and when the last one
            ends; returns which of them to take, in order. A frame may be picked more than once.
        take: gets an upright RGB frame, and the width of its pixels over their height. It is called once for each frame
            that is picked (again, where times turn out to be unreliable); then the frame is freed.

    Raises `DecodeError`.
    """
    with _only_decode_errors():
        if not 0 <= start < end:
            raise DecodeError(f"the interval [{start:g} s, {end:g} s) is empty or begins before the media")
        reader = MediaReader(media, limits)
        if (still := _decode_still(reader)) is not None:
            chosen = choose(np.zeros(1), _STILL_DURATION)
            return [take(still, 1.0)] * len(chosen)
        with packets.open_interval(reader, float(start), float(end)) as interval:

            def take_upright(frame: av.VideoFrame) -> T:
                orientation = _orientation(frame, reader)
                # By default each frame would start a pool of threads, which costs a small frame 50 times its work.
                rgb = frame.reformat(format="rgb24", threads=1).to_ndarray()
                aspect = float(interval.packets.stream.sample_aspect_ratio or 1)
                if not 0.25 <= aspect <= 4:  # not credible
                    aspect = 1.0
                return take(_upright(rgb, orientation), 1 / aspect if orientation.swapped else aspect)

            if interval.places is not None:
                with contextlib.suppress(packets.UnreliableTimes):
                    return packets.decode_frames(interval, choose, take_upright)
            return packets.decode_frames(packets.with_decoded_times(interval), choose, take_upright)


def store_frames(
    media: bytes,
    *,
    start: float | int,
    end: float | int,
    frame_rate: float | int,
    short_side: int,
    quality: int,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> list[bytes]:
    """A clip as JPEGs, upright, in square pixels and in display order (the `frames` variant of a data set).

    Videos have few key frames, so 8 frames of a minute cost the decoding of most of that minute, in every epoch; from a
    list of JPEGs, 8 are decoded. A clip of D seconds is divided into round(D x frame_rate) equal parts, at least one,
    and the frame at the centre of each is stored, so that a clip played backwards has the same list backwards (but for
    the middle one of an odd number, where that falls between two frames). Chroma has half the resolution, as in nearly
    all videos. An image that is a small enough, upright JPEG already is stored as it is.

    Args:
        media, start, end, limits: as in `decode_clip`; the limits bound the stored frames, too.
        frame_rate: frames a second, at most: with a constant rate, nothing is stored twice.
        short_side: pixels of a frame's short side, at most: frames are shrunk with CLIP's filter, and never enlarged.
        quality: of the JPEGs, 1 to 100.

    Raises `DecodeError`.
    """

    def choose(times: Float[np.ndarray, " n"], stop: float) -> Int[np.ndarray, " t"]:
        first, last = shown_interval(times, stop, start, end)
        shown = times[frames_at(np.array([first]), times)[0] : np.searchsorted(times, last)]
        fastest = 1 / float(np.diff(shown).min()) if len(shown) > 1 else 0.0
        count = max(1, round((last - first) * min(frame_rate, fastest)))
        limits.check_frames(count)
        return frames_at(segment_times(first, last, count), times)

    def encode_jpeg(frame: UInt8[np.ndarray, "h w 3"], pixel_aspect: float) -> bytes:
        short = min(short_side, *shown_size(*frame.shape[:2], pixel_aspect))
        buffer = io.BytesIO()
        image = Image.fromarray(np.ascontiguousarray(resize(frame, short, pixel_aspect)))
        image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0", optimize=True)
        return buffer.getvalue()

    frames = read_frames(media, start, end, choose, encode_jpeg, limits)
    size = sum(map(len, frames))  # a frame that is shown long is stored often
    limits.check("max_bytes", size, f"the clip's frames are JPEGs of {size:,} bytes")
    if media.startswith(_JPEG):
        with Image.open(io.BytesIO(media)) as image:
            if _exif_number(image) == 1 and min(image.size) <= short_side:
                return [media]
    return frames


def measure_duration(media: Encoded, limits: MediaLimits = DEFAULT_LIMITS) -> float:
    """How long the media lasts, in seconds, by reading every packet and decoding one frame. Raises `DecodeError`."""
    duration = 0.0

    def choose(times: Float[np.ndarray, " n"], stop: float) -> Int[np.ndarray, " t"]:
        nonlocal duration
        duration = stop - float(times[0])
        return np.zeros(1, np.int64)

    read_frames(media, 0.0, math.inf, choose, lambda frame, aspect: None, limits)
    return duration


def resize_and_crop(
    frame: UInt8[np.ndarray, "h w 3"], size: int, pixel_aspect: float = 1.0
) -> UInt8[np.ndarray, "s s 3"]:
    """The centre square of a frame, as CLIP's preprocessing takes it (openai/CLIP, `clip.py:_transform`).

    The short side becomes `size` with Pillow's antialiased bicubic filter, and the long side is rounded down; the
    crop's corner is rounded as torchvision's `CenterCrop` rounds it. A frame that has this size already is not
    resampled. `pixel_aspect` is the width of a pixel over its height.
    """
    frame = resize(frame, size, pixel_aspect)
    top = round((frame.shape[0] - size) / 2.0)
    left = round((frame.shape[1] - size) / 2.0)
    return np.ascontiguousarray(frame[top : top + size, left : left + size])


def resize(
    frame: UInt8[np.ndarray, "h w 3"], short_side: int, pixel_aspect: float = 1.0
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The whole frame in square pixels, resized as in `resize_and_crop`, to `short_side` pixels on its short side."""
    width, height = shown_size(frame.shape[0], frame.shape[1], pixel_aspect)
    short = min(width, height)
    resized = tuple(short_side if side == short else int(short_side * side / short) for side in (width, height))
    if resized == (frame.shape[1], frame.shape[0]):
        return frame
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize(resized, Image.Resampling.BICUBIC))


def shown_size(height: int, width: int, pixel_aspect: float) -> tuple[int, int]:
    """Width and height in square pixels: one of them is stretched, neither is shrunk."""
    if pixel_aspect < 1:
        return width, round(height / pixel_aspect)
    return round(width * pixel_aspect), height


def shown_interval(
    times: Float[np.ndarray, " n"], stop: float, start: float | int, end: float | int
) -> tuple[float, float]:
    """The part of [start, end) that frames show which start at `times` and of which the last ends at `stop` (seconds).

    Raises `DecodeError` where no frame is shown.
    """
    first, last = max(float(start), float(times[0])), min(float(end), stop)
    if first >= last:
        bound = f"ends at {stop:g} s" if start >= stop else f"begins at {times[0]:g} s"
        raise DecodeError(f"the interval [{start:g} s, {end:g} s) lies outside the media, which {bound}")
    return first, last


def _decode_images(
    images: Sequence[bytes], size: int, choose: Choose, limits: MediaLimits
) -> UInt8[np.ndarray, "t s s 3"]:
    """Frames of a clip that is stored as a list of images; a damaged one is replaced by the nearest earlier one."""
    if not len(images):
        raise DecodeError("it has no frames: its media could not be decoded when the data set was built")
    chosen = choose(np.arange(len(images), dtype=np.float64), float(len(images))).tolist()
    squares = {}
    for number in set(chosen):
        for nearest in (*range(number, -1, -1), *range(number + 1, len(images))):
            with contextlib.suppress(DecodeError):
                squares[number] = decode_clip(images[nearest], num_frames=1, size=size, limits=limits)[0]
                break
        else:
            raise DecodeError(f"none of the {len(images)} frames of the media can be decoded")
    return np.stack([squares[number] for number in chosen])


def _decode_still(media: MediaReader) -> UInt8[np.ndarray, "h w 3"] | None:
    """A photograph, upright, by the decoder of CLIP's preprocessing; None where the media is no photograph.

    FFmpeg spreads a JPEG's colours over the pixels by another filter, which is off by up to 40 of 255 at edges.
    """
    head = media.head
    if not (head.startswith((_JPEG, _PNG)) or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")):
        return None
    try:
        opened = Image.open(media.open())
    except UnidentifiedImageError as error:  # its message has an address of the memory in it
        raise DecodeError("the media begins like an image and cannot be read as one") from error
    with opened as image:
        if getattr(image, "n_frames", 1) > 1 and not head.startswith(_JPEG):  # animated
            return None
        media.limits.check_picture(*image.size)
        orientation = _exif_orientation(_exif_number(image))
        return np.ascontiguousarray(_upright(np.asarray(image.convert("RGB")), orientation))


def _exif_number(image: Image.Image, default: int = 1) -> int:
    """EXIF's number of an image's orientation; `default` where it cannot be read."""
    with contextlib.suppress(Exception):  # whatever Pillow makes of damaged metadata
        number = image.getexif().get(0x0112)
        return number if number in range(1, 9) else default
    return default


def _exif_orientation(number: int) -> Orientation:
    return Orientation(number > 4, number in (2, 3, 6, 7), number in (3, 4, 7, 8))


def _upright(frame: UInt8[np.ndarray, "h w 3"], orientation: Orientation) -> UInt8[np.ndarray, "h2 w2 3"]:
    if orientation.swapped:
        frame = frame.swapaxes(0, 1)
    return frame[:: -1 if orientation.flip_y else 1, :: -1 if orientation.flip_x else 1]


def _orientation(frame: av.VideoFrame, media: MediaReader) -> Orientation:
    """The frame's display matrix (libavutil/display.h) rounded to quarter turns and mirrors."""
    try:
        matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    except ValueError:
        # PyAV 18.1 cannot list side data with EXIF in it (its pull request 2392), which photos have.
        number = {0: 1, 1: 8, 2: 3, 3: 6}[round(frame.rotation / 90) % 4]
        with contextlib.suppress(Exception):  # an image that Pillow cannot read
            number = _exif_number(Image.open(media.open()), number)
        return _exif_orientation(number)
    if matrix is None:
        return Orientation(False, False, False)
    # A pixel at (x, y) is shown at (x, y) @ ((a, b), (c, d)).
    (a, b), (c, d) = np.frombuffer(matrix, dtype=np.int32).reshape(3, 3)[:2, :2].astype(np.int64).tolist()
    swapped = abs(a) + abs(d) < abs(b) + abs(c)
    return Orientation(swapped, c < 0, b < 0) if swapped else Orientation(swapped, a < 0, d < 0)


@contextlib.contextmanager
def _only_decode_errors() -> Iterator[None]:
    """Turns whatever PyAV and Pillow raise on damaged bytes into a `DecodeError`."""
    try:
        yield
    except DecodeError:
        raise
    except (
        av.error.FFmpegError,
        OSError,
        ValueError,
        LookupError,
        ArithmeticError,
        RuntimeError,
        MemoryError,
        SyntaxError,  # Pillow's, of a damaged PNG
        Image.DecompressionBombError,
    ) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise DecodeError(f"the media cannot be decoded: {reason or type(error).__name__}") from error
