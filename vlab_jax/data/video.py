"""Encoded media become frames, with PyAV and nothing else: the pixels of a clip, upright and square.

`packets.py` reads and decodes, `sampling.py` chooses; here a clip's interval, orientation, size and errors
are settled. Decoding runs in one thread: the pipeline's worker processes are the parallelism.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from jaxtyping import Float, Int, UInt8
from PIL import Image, UnidentifiedImageError

from vlab_jax.data.media import DEFAULT_LIMITS, DecodeError, Encoded, MediaLimits, Watch, as_file, head
from vlab_jax.data.packets import (
    Interval,
    UnreliableTimes,
    decode_all,
    decode_frames,
    no_frame,
    open_interval,
    with_decoded_times,
)
from vlab_jax.data.sampling import frames_at, segment_times
from vlab_jax.errors import InputError

# FOLDED vlab_jax/data/video.py: Photographs: decoded by Pillow, as CLIP's preprocessing has it, and stood upright
# by their EXIF data.

# How files of photographs begin.
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG"

# How EXIF's eight orientations are shown, as `upright` takes it, and the number of EXIF's field.
_EXIF_ORIENTATION = 0x0112
EXIF_ORIENTATIONS = {
    1: ((1, 0), (0, 1)),
    2: ((-1, 0), (0, 1)),
    3: ((-1, 0), (0, -1)),
    4: ((1, 0), (0, -1)),
    5: ((0, 1), (1, 0)),
    6: ((0, 1), (-1, 0)),
    7: ((0, -1), (-1, 0)),
    8: ((0, -1), (1, 0)),
}


def decode_still(media: Encoded, limits: MediaLimits) -> UInt8[np.ndarray, "h w 3"] | None:
    """A photograph, upright, by the decoder that CLIP's preprocessing has; None where the media is none.

    FFmpeg spreads a JPEG's colours over the pixels by another filter, which is off by up to 40 of 255 at edges.
    """
    begins = head(media, 12)
    if not (begins.startswith((_JPEG, _PNG)) or (begins.startswith(b"RIFF") and begins[8:12] == b"WEBP")):
        return None
    with _opened(media) as image:
        if getattr(image, "n_frames", 1) > 1 and not begins.startswith(_JPEG):  # animated
            return None
        limits.check_picture(*image.size)
        orientation = np.array(EXIF_ORIENTATIONS[exif_orientation(image) or 1])
        return np.ascontiguousarray(upright(np.asarray(image.convert("RGB")), orientation))


def upright(frame: UInt8[np.ndarray, "h w 3"], orientation: Int[np.ndarray, "2 2"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The frame turned and mirrored as its display matrix says.

    A pixel at (x, y) is shown at (x, y) @ `orientation`, whose entries are -1, 0 and 1: quarter turns and
    mirrors.
    """
    (a, b), (c, d) = orientation.tolist()
    if a == 0:  # x and y change places
        frame, flip_x, flip_y = frame.swapaxes(0, 1), c < 0, b < 0
    else:
        flip_x, flip_y = a < 0, d < 0
    return frame[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def is_upright_jpeg(media: Encoded, short_side: int) -> bool:
    """Whether the media is a JPEG that stands upright as stored, with a short side of at most so many pixels."""
    if head(media, len(_JPEG)) != _JPEG:
        return False
    with Image.open(as_file(media)) as image:
        return (exif_orientation(image) or 1) == 1 and min(image.size) <= short_side


def exif_orientation(image: Image.Image) -> int | None:
    """EXIF's number of an image's orientation, where it can be read."""
    with contextlib.suppress(Exception):  # whatever Pillow makes of damaged metadata
        number = image.getexif().get(_EXIF_ORIENTATION)
        return number if number in EXIF_ORIENTATIONS else None
    return None


def exif_rotation(media: Encoded) -> int:
    """The counterclockwise angle by which EXIF turns an image, in degrees; a mirror image counts as not turned."""
    with _opened(media) as image:
        return {3: 180, 6: -90, 8: 90}.get(exif_orientation(image) or 1, 0)


def _opened(media: Encoded) -> Image.Image:
    try:
        return Image.open(as_file(media))
    except UnidentifiedImageError as error:  # its message has an address of the memory in it
        raise DecodeError("the media begins like an image and cannot be read as one") from error


__all__ = [
    "DecodeError",
    "MediaInfo",
    "decode_clip",
    "is_upright_jpeg",
    "probe",
    "read_frames",
    "resize",
    "resize_and_crop",
    "shown_interval",
    "shown_size",
    "upright",
]

T = TypeVar("T")

_STILL_DURATION = 0.04  # how long a photograph is shown, in seconds


@dataclasses.dataclass(frozen=True)
class MediaInfo:
    """What a media file holds.

    `width` and `height` are in square pixels of the upright picture, `duration` is in seconds, `num_frames`
    is counted and not taken from a header, `frame_rate` is the mean rate in frames per second, and `rotation`
    is the counterclockwise angle in degrees by which the stored picture is turned to stand upright.
    """

    width: int
    height: int
    duration: float
    num_frames: int
    frame_rate: float
    rotation: int


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
    """`num_frames` RGB frames of a clip, upright, resized and cropped to `size` x `size`.

    Args:
        media: an encoded video, or an image (a one-frame video): its bytes or an open file; or a list of JPEGs:
            frames evenly spread over the clip (the `frames` variant). `start` and `end` do not apply to a list,
            which holds the clip alone.
        num_frames: frames to show: one of each of as many equal segments of the interval, chosen by time.
        size: side of the square, in pixels, after CLIP's preprocessing (`resize_and_crop`).
        start: beginning of the interval, in seconds from the beginning of the media.
        end: end of the interval, in seconds; it is cut to the end of the media.
        rng: makes the time random within each segment (training); without it, the centre (evaluation).
        short: what to do where the interval holds fewer distinct frames than asked: `repeat` them, or `fail`.
        limits: what decoding may take; of a list, each image.

    Raises:
        DecodeError: the media cannot be decoded, or not within the limits, or the interval lies outside it, or it is
            too short.
        InputError: an argument that no media could satisfy.
    """
    _check_arguments(num_frames, size, short)
    if not isinstance(media, Encoded):
        return _decode_images(media, num_frames, size, rng, short, limits)

    def choose(times: Float[np.ndarray, " n"], stop: float) -> Int[np.ndarray, " t"]:
        return _choose(times, stop, float(start), float(end), num_frames, rng, short)

    def take(frame: UInt8[np.ndarray, "h w 3"], aspect: float) -> UInt8[np.ndarray, "s s 3"]:
        width, height = shown_size(frame.shape[0], frame.shape[1], aspect)
        long = size * max(width, height) // min(width, height)  # a picture of one line would become very wide
        limits.check_picture(size, long, f"resized for a square of {size}, the media has a picture")
        return resize_and_crop(frame, size, aspect)

    return np.stack(read_frames(media, start, end, choose, take, limits))


def read_frames(
    media: Encoded,
    start: float | int,
    end: float | int,
    choose: Callable[[Float[np.ndarray, " n"], float], Int[np.ndarray, " t"]],
    take: Callable[[UInt8[np.ndarray, "h w 3"], float], T],
    limits: MediaLimits = DEFAULT_LIMITS,
) -> list[T]:
    """What `take` makes of each frame that `choose` picks of the interval [start, end), in seconds.

    Args:
        media: an encoded video, or an image, a one-frame video: its bytes or an open file.
        choose: gets the times (seconds, increasing) at which the frames of the interval start, and when the last
            one ends; returns which of them to take, in order. A frame may be picked more than once.
        take: gets an upright RGB frame, and the width of its pixels over their height. Called once for each frame
            that is picked (again, where times turn out to be unreliable), and frames are let go of then.
        limits: what decoding may take.

    Raises `DecodeError`.
    """
    watch = Watch(limits)
    with _one_kind_of_error():
        if not 0 <= start < end:
            raise DecodeError(f"the interval [{start:g} s, {end:g} s) is empty or begins before the media")
        still = decode_still(media, limits)
        if still is not None:
            chosen = choose(np.zeros(1), _STILL_DURATION)
            return [take(still, 1.0)] * len(chosen)
        with open_interval(media, float(start), float(end), watch) as interval:
            if interval.places is not None:
                with contextlib.suppress(UnreliableTimes):
                    return _read_video(interval, media, choose, take)
            return _read_video(with_decoded_times(interval), media, choose, take)


def probe(media: Encoded, limits: MediaLimits = DEFAULT_LIMITS) -> MediaInfo:
    """What the media holds, by reading every packet and decoding one frame. Raises `DecodeError`."""
    watch = Watch(limits)
    with _one_kind_of_error():
        still = decode_still(media, limits)
        if still is not None:
            height, width = still.shape[:2]
            return MediaInfo(width, height, _STILL_DURATION, 1, 1 / _STILL_DURATION, exif_rotation(media))
        return _probe_video(media, watch)


def _probe_video(media: Encoded, watch: Watch) -> MediaInfo:
    with open_interval(media, 0.0, math.inf, watch) as interval:
        if interval.places is None:
            interval = with_decoded_times(interval)
        frame = next(decode_all(interval), None)
        if frame is None:
            raise DecodeError(no_frame(watch))
        orientation = _orientation(frame, media)
        height, width = (frame.height, frame.width)[:: 1 if orientation[0, 0] else -1]
        width, height = shown_size(height, width, _pixel_aspect(interval.stream, orientation))
        count, duration = len(interval.times), interval.stop - float(interval.times[0])
        return MediaInfo(width, height, duration, count, count / duration, round(frame.rotation))


def resize_and_crop(
    frame: UInt8[np.ndarray, "h w 3"], size: int, pixel_aspect: float = 1.0
) -> UInt8[np.ndarray, "s s 3"]:
    """The centre square of a frame, as CLIP's preprocessing takes it (openai/CLIP, `clip.py:_transform`).

    The short side becomes `size` with Pillow's antialiased bicubic filter and the long side is rounded down;
    the crop's corner is rounded as torchvision's `CenterCrop` rounds it. A frame that has its size already is
    not resampled. `pixel_aspect` is the width of a pixel over its height.
    """
    frame = resize(frame, size, pixel_aspect)
    top = round((frame.shape[0] - size) / 2.0)
    left = round((frame.shape[1] - size) / 2.0)
    return np.ascontiguousarray(frame[top : top + size, left : left + size])


def resize(
    frame: UInt8[np.ndarray, "h w 3"], short_side: int, pixel_aspect: float = 1.0
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The whole frame in square pixels, as `resize_and_crop` resizes it: the short side has `short_side` of them."""
    width, height = shown_size(frame.shape[0], frame.shape[1], pixel_aspect)
    short = min(width, height)
    resized = tuple(short_side if side == short else int(short_side * side / short) for side in (width, height))
    if resized == (frame.shape[1], frame.shape[0]):
        return frame
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize(resized, Image.Resampling.BICUBIC))


def shown_size(height: int, width: int, pixel_aspect: float) -> tuple[int, int]:
    """Width and height in square pixels; one of them is stretched, and neither is ever shrunk."""
    if pixel_aspect < 1:
        return width, round(height / pixel_aspect)
    return round(width * pixel_aspect), height


def shown_interval(
    times: Float[np.ndarray, " n"], stop: float, start: float | int, end: float | int
) -> tuple[float, float]:
    """The part of [start, end) that is shown, by frames that start at `times` and of which the last ends at `stop`.

    All of these are seconds. Raises `DecodeError` where that is nothing.
    """
    first, last = max(float(start), float(times[0])), min(float(end), stop)
    if first >= last:
        bound = f"ends at {stop:g} s" if start >= stop else f"begins at {times[0]:g} s"
        raise DecodeError(f"the interval [{start:g} s, {end:g} s) lies outside the media, which {bound}")
    return first, last


def _read_video(
    interval: Interval,
    media: Encoded,
    choose: Callable[[Float[np.ndarray, " n"], float], Int[np.ndarray, " t"]],
    take: Callable[[UInt8[np.ndarray, "h w 3"], float], T],
) -> list[T]:
    def take_upright(frame: av.VideoFrame) -> T:
        orientation = _orientation(frame, media)
        # One thread: by default each frame would start a pool of them, which costs a small frame 50 times its work.
        rgb = frame.reformat(format="rgb24", threads=1).to_ndarray()
        return take(upright(rgb, orientation), _pixel_aspect(interval.stream, orientation))

    chosen = choose(interval.times, interval.stop).tolist()
    frames = decode_frames(interval, chosen, take_upright)
    return [frames[number] for number in chosen]


def _decode_images(
    images: Sequence[bytes],
    num_frames: int,
    size: int,
    rng: np.random.Generator | None,
    short: str,
    limits: MediaLimits,
) -> UInt8[np.ndarray, "t s s 3"]:
    """Frames of a clip that is stored as a list of images; a damaged one shows the nearest earlier."""
    if not len(images):
        raise DecodeError("it has no frames: its media could not be decoded when the data set was built")
    times = np.arange(len(images), dtype=np.float64)
    chosen = _choose(times, float(len(images)), 0.0, math.inf, num_frames, rng, short).tolist()
    squares = {}
    for number in sorted(set(chosen)):
        earlier_first = [*range(number, -1, -1), *range(number + 1, len(images))]
        squares[number] = _first_decodable([images[i] for i in earlier_first], size, limits)
    return np.stack([squares[number] for number in chosen])


def _first_decodable(images: Sequence[bytes], size: int, limits: MediaLimits) -> UInt8[np.ndarray, "s s 3"]:
    for image in images:
        with contextlib.suppress(DecodeError), _one_kind_of_error():
            return decode_clip(image, num_frames=1, size=size, limits=limits)[0]
    raise DecodeError(f"none of the {len(images)} frames of the media can be decoded")


def _choose(
    times: Float[np.ndarray, " n"],
    stop: float,
    start: float,
    end: float,
    num_frames: int,
    rng: np.random.Generator | None,
    short: str,
) -> Int[np.ndarray, " t"]:
    """The places of the frames to show, out of frames that start at `times` and end at `stop`."""
    first, last = shown_interval(times, stop, start, end)
    if short == "fail":
        held = int(np.searchsorted(times, last) - frames_at(np.array([first]), times)[0])
        if held < num_frames:
            raise DecodeError(f"the clip has {held} frames and {num_frames} were asked")
    return frames_at(segment_times(first, last, num_frames, rng), times)


def _orientation(frame: av.VideoFrame, media: Encoded) -> Int[np.ndarray, "2 2"]:
    """The frame's display matrix (libavutil/display.h) rounded to quarter turns and mirrors."""
    try:
        matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    except ValueError:
        # PyAV 18.1 cannot list side data with EXIF in it (its pull request 2392), which photos have.
        number = None
        with contextlib.suppress(Exception):  # an image that Pillow cannot read
            number = exif_orientation(Image.open(as_file(media)))
        number = number or {0: 1, 1: 8, 2: 3, 3: 6}[round(frame.rotation / 90) % 4]
        return np.array(EXIF_ORIENTATIONS[number])
    if matrix is None:
        return np.eye(2, dtype=np.int64)
    (a, b), (c, d) = np.frombuffer(matrix, dtype=np.int32).reshape(3, 3)[:2, :2].astype(np.int64).tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return np.diag([-1 if a < 0 else 1, -1 if d < 0 else 1])
    return np.array([[0, -1 if b < 0 else 1], [-1 if c < 0 else 1, 0]])


def _pixel_aspect(stream: av.VideoStream, orientation: Int[np.ndarray, "2 2"]) -> float:
    """Width over height of one pixel of the upright frame; 1 where the file says nothing credible."""
    aspect = float(stream.sample_aspect_ratio or 1)
    if not 0.25 <= aspect <= 4:
        return 1.0
    return aspect if orientation[0, 0] else 1 / aspect


@contextlib.contextmanager
def _one_kind_of_error() -> Iterator[None]:
    """Whatever damaged bytes make PyAV raise becomes a `DecodeError`."""
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


def _check_arguments(num_frames: int, size: int, short: str) -> None:
    if num_frames < 1:
        raise InputError(f"num_frames is {num_frames}; it must be at least 1")
    if size < 1:
        raise InputError(f"size is {size}; it must be at least 1 pixel")
    if short not in ("repeat", "fail"):
        raise InputError(f"short is {short!r}; it must be 'repeat' or 'fail'")
