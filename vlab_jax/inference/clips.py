"""Clips are decoded ahead of the model: here where they are few, by worker processes where they are many."""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vlab_jax.data import sampling, video
from vlab_jax.data.crash_guard import default_workers, map_in_order
from vlab_jax.data.media import DEFAULT_LIMITS, opened
from vlab_jax.datasets.media_index import IMAGES, VIDEOS
from vlab_jax.errors import InputError

# FOLDED vlab_jax/inference/clips.py: The files that a name stands for: itself, or the videos and images in a
# folder and the folders in it.

EXTENSIONS = frozenset(f".{extension}" for extension in f"{VIDEOS}|{IMAGES}".split("|"))


def media_files(name: str) -> list[str]:
    """The file, or a folder's media files, in the order of their paths; hidden files and folders are passed by.

    Raises:
      InputError: it is a folder without any, or one that cannot be read.
    """
    if not os.path.isdir(name):
        return [name]
    found = list(_walk(name))
    if not found:
        raise InputError(f"{name} holds no video and no image (known by names such as clip.mp4)")
    return found


def readable(name: str) -> str:
    """A name as any terminal takes it, also one that is not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _walk(folder: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error

    for where, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and pathlib.PurePath(name).suffix.lower() in EXTENSIONS:
                yield os.path.join(where, name)


# FOLDED vlab_jax/inference/clips.py: What a video is, for a user, and how it becomes the frames that a model looks
# at.  Nothing here imports JAX: worker processes that decode start within a second.  Dimensions: `T` frames, `S`
# pixels.

Media = str | os.PathLike | bytes | np.ndarray


@dataclasses.dataclass(frozen=True)
class Clip:
    """A part of a video: [start, end), in seconds from its beginning.

    Attributes:
      media: the video. A path or a `file://` URL of a video or an image; the bytes of one; or its frames, RGB, uint8
        `[T, H, W, 3]` (one image: `[H, W, 3]`), evenly spread over the clip, which are all of it.
      end: `math.inf` where the clip ends with the video.

    Raises:
      InputError: `media` is no such array, or there is nothing between `start` and `end`.
    """

    media: Media
    start: float | int = 0.0
    end: float | int = math.inf

    def __post_init__(self) -> None:
        if isinstance(self.media, np.ndarray):
            _check_frames(self.media)
            if (self.start, self.end) != (0.0, math.inf):
                raise InputError(f"{self.name}: frames have no times; cut the array instead of giving start and end")
        if not 0 <= self.start < self.end:
            raise InputError(
                f"{self.name}: the interval [{self.start:g} s, {self.end:g} s) is empty or begins before 0"
            )

    @property
    def name(self) -> str:
        """What results and messages call it."""
        if isinstance(self.media, np.ndarray):
            return f"<frames {' x '.join(map(str, self.media.shape))}>"
        if isinstance(self.media, bytes):
            return f"<{len(self.media)} bytes>"
        return os.fspath(self.media)


@dataclasses.dataclass(frozen=True)
class FrameShape:
    """How a model looks at a clip: `num_frames` frames, squares of `size` pixels."""

    num_frames: int
    size: int


def is_video(given: Any) -> bool:
    """Whether it is meant as one video: whatever is not several of them, as lists and iterators are."""
    return isinstance(given, Clip | Media) or hasattr(given, "__array__") or not isinstance(given, Iterable)


def as_clip(given: Any) -> Clip:
    """A video as users give it: a `Clip`, or what can be the media of one.

    Raises:
      InputError: it is nothing of this; as `Clip`.
    """
    if isinstance(given, Clip):
        return given
    if not isinstance(given, Media) and hasattr(given, "__array__"):
        given = np.asarray(given)  # of JAX, for one
    if not isinstance(given, Media):
        kind = type(given).__name__
        raise InputError(f"a video is a path, a file:// URL, bytes, or frames as a NumPy array, not of type {kind}")
    return Clip(given)


def show(clip: Clip, frames: FrameShape) -> UInt8[np.ndarray, "t s s 3"]:
    """The frames of a clip, upright, resized and cropped, as training's evaluation shows them.

    Raises:
      InputError: there is no such file, it cannot be decoded, or it has nothing in the interval.
    """
    if isinstance(clip.media, np.ndarray):
        return _chosen(clip.media if clip.media.ndim == 4 else clip.media[None], frames)
    given = {"num_frames": frames.num_frames, "size": frames.size, "start": clip.start, "end": clip.end}
    try:
        if isinstance(clip.media, bytes):
            return video.decode_clip(clip.media, **given)
        with opened(local_path(clip.media)) as media:
            return video.decode_clip(media, **given)
    except video.DecodeError as error:
        raise InputError(f"{clip.name}: {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"{clip.name}: there is no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{clip.name}: this is a folder; name the files in it") from error
    except OSError as error:
        raise InputError(f"{clip.name}: it cannot be read ({error.strerror or error})") from error


def local_path(media: str | os.PathLike) -> pathlib.Path:
    """The path that a path or a `file://` URL says.

    Raises:
      InputError: it is a URL of another kind.
    """
    text = os.fspath(media)
    if not isinstance(text, str):
        return pathlib.Path(os.fsdecode(text))
    scheme, separator, _ = text.partition("://")
    if not separator or not scheme.isalnum():
        return pathlib.Path(text).expanduser()
    url = urllib.parse.urlsplit(text)
    if scheme.lower() != "file":
        raise InputError(f"{text}: nothing is fetched from the network; download it, and name the file")
    if url.netloc not in ("", "localhost"):
        raise InputError(f"{text}: a file URL has three slashes before its path, as in file:///videos/clip.mp4")
    return pathlib.Path(urllib.parse.unquote(url.path))


def _check_frames(frames: np.ndarray) -> None:
    if frames.ndim not in (3, 4) or frames.shape[-1] != 3 or frames.size == 0:
        hint = "; several videos are given as a list" if frames.ndim == 5 else ""
        raise InputError(f"frames are [T, H, W, 3], or [H, W, 3] of one image, not {list(frames.shape)}{hint}")
    if frames.dtype != np.uint8:
        raise InputError(f"frames are uint8, 0 to 255, not {frames.dtype}; convert them")


def _chosen(frames: UInt8[np.ndarray, "n h w 3"], shape: FrameShape) -> UInt8[np.ndarray, "t s s 3"]:
    """The frames at the centres of equal segments, as `data.video.decode_clip` chooses them of a constant rate."""
    times = sampling.segment_times(0, len(frames), shape.num_frames)
    places = sampling.frames_at(times, np.arange(len(frames), dtype=np.float64))
    squares = {place: video.resize_and_crop(frames[place], shape.size) for place in set(places.tolist())}
    return np.stack([squares[place] for place in places.tolist()])


FEW = 32  # clips that are decoded sooner than worker processes start


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedClip:
    """A video that was read.

    Attributes:
      name: what it is called.
      frames: uint8 `[T, S, S, 3]`; None where it cannot be decoded.
      error: why it cannot, in one line that names it; else empty.
    """

    name: str
    frames: np.ndarray | None
    error: str = ""


def read_clips(videos: Iterable[Any], frames: FrameShape, workers: int) -> Iterator[DecodedClip]:
    """The frames of videos, in order; the videos are taken as they are needed.

    Args:
      videos: what `as_clip` takes.
      workers: processes that decode where there are more than `FEW` videos; -1: two fewer than there are cores, 0:
        none.

    Raises:
      RunStopped: processes cannot be started.
    """
    videos = iter(videos)
    first = list(itertools.islice(videos, FEW + 1))
    # Frames are in this process already.
    here = len(first) <= FEW or isinstance(first[0], np.ndarray)
    processes = 0 if here else default_workers(workers)
    function, limit = functools.partial(read_clip, frames), DEFAULT_LIMITS.clock_seconds
    with contextlib.closing(map_in_order(function, itertools.chain(first, videos), processes, _lost, limit)) as reads:
        yield from reads


def read_clip(frames: FrameShape, given: Any) -> DecodedClip:
    """Decodes a video; what is wrong with it becomes an `error`."""
    name = ""
    try:
        clip = as_clip(given)
        name = clip.name
        return DecodedClip(name, show(clip, frames))
    except InputError as error:
        return DecodedClip(name or f"<{type(given).__name__}>", None, str(error))


def _lost(given: Any) -> DecodedClip:
    name = as_clip(given).name
    return DecodedClip(name, None, f"{name}: the decoder crashed on it, or did not come back")
