"""A user's videos, whole or cut into windows, and the frames that a model sees of them.

Nothing here imports JAX, so that worker processes that decode start within a second.

Dimensions: `T` frames, `S` pixels.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import math
import os
import pathlib
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from vlab_jax.data import sampling, video
from vlab_jax.data.crash_guard import default_workers, map_in_order
from vlab_jax.data.media import DEFAULT_LIMITS, opened
from vlab_jax.datasets.media_index import IMAGES, VIDEOS
from vlab_jax.errors import InputError

MEDIA_EXTENSIONS = frozenset(f".{extension}" for extension in f"{VIDEOS}|{IMAGES}".split("|"))
MAX_IN_PROCESS = 32  # so many clips are decoded sooner than worker processes start
_CRASHED = "the decoder crashed on it, or did not finish in time"
_REASONS = {FileNotFoundError: "there is no such file", IsADirectoryError: "this is a folder; name the files in it"}
_WINDOWS_PER_TASK = 8
_TOLERANCE = 1e-6  # seconds: a gap shorter than this is a rounding error

Media = str | os.PathLike | bytes | np.ndarray


@dataclasses.dataclass(frozen=True)
class Clip:
    """A part of a video: [start, end), in seconds from its beginning.

    `media` is a path or a `file://` URL of a video or an image; the bytes of one; or its frames, RGB, uint8
    `[T, H, W, 3]` (one image: `[H, W, 3]`), evenly spread over the clip, which are all of it.

    Raises InputError where `media` is an array of another shape or type, or nothing lies between `start` and `end`.
    """

    media: Media
    start: float | int = 0.0
    end: float | int = math.inf

    def __post_init__(self) -> None:
        if isinstance(self.media, np.ndarray):
            _check_array(self.media)
            if (self.start, self.end) != (0.0, math.inf):
                raise InputError(f"{self.name}: frames have no times; cut the array instead of giving start and end")
        if not 0 <= self.start < self.end:
            raise InputError(
                f"{self.name}: the interval [{self.start:g} s, {self.end:g} s) is empty or begins before 0"
            )

    @property
    def name(self) -> str:
        """What results and messages call the video."""
        if isinstance(self.media, np.ndarray):
            return f"<frames {' x '.join(map(str, self.media.shape))}>"
        if isinstance(self.media, bytes):
            return f"<{len(self.media)} bytes>"
        return os.fspath(self.media)


class FrameShape(NamedTuple):
    """A model sees `num_frames` frames of a clip, squares of `size` pixels."""

    num_frames: int
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedClip:
    """The name and the frames of a video, uint8 `[T, S, S, 3]`; or None, and a line that says why there are none."""

    name: str
    frames: np.ndarray | None
    error: str = ""


def is_video(value: Any) -> bool:
    """Whether a value stands for one video: all do but collections of them, such as lists and iterators."""
    return isinstance(value, Clip | Media) or hasattr(value, "__array__") or not isinstance(value, Iterable)


def as_clip(value: Any) -> Clip:
    """The clip that a value stands for: a `Clip` itself, or the media of one. Raises InputError where it is neither."""
    if isinstance(value, Clip):
        return value
    if not isinstance(value, Media) and hasattr(value, "__array__"):
        value = np.asarray(value)  # an array of JAX, for example
    if not isinstance(value, Media):
        kind = type(value).__name__
        raise InputError(f"a video is a path, a file:// URL, bytes, or frames as a NumPy array, not of type {kind}")
    return Clip(value)


def load_frames(clip: Clip, shape: FrameShape) -> UInt8[np.ndarray, "t s s 3"]:
    """The frames of a clip, upright, resized and cropped, as evaluation in training sees them.

    Raises InputError where there is no such file, it cannot be decoded, or it has no frame in the interval.
    """
    if isinstance(clip.media, np.ndarray):
        return _sample_array(clip.media.reshape(-1, *clip.media.shape[-3:]), shape)
    try:
        is_file = not isinstance(clip.media, bytes)
        with opened(local_path(clip.media)) if is_file else contextlib.nullcontext(clip.media) as media:
            return video.decode_clip(media, **shape._asdict(), start=clip.start, end=clip.end)
    except video.DecodeError as error:
        raise InputError(f"{clip.name}: {error}") from error
    except OSError as error:
        reason = _REASONS.get(type(error)) or f"it cannot be read ({error.strerror or error})"
        raise InputError(f"{clip.name}: {reason}") from error


def local_path(media: str | os.PathLike) -> pathlib.Path:
    """The path of a file that is named by a path or a `file://` URL. Raises InputError for URLs of other kinds."""
    text = os.fspath(media)
    scheme, separator, _ = text.partition("://")
    if not separator or not scheme.isalnum():
        return pathlib.Path(text).expanduser()
    url = urllib.parse.urlsplit(text)
    if scheme.lower() != "file":
        raise InputError(f"{text}: nothing is fetched from the network; download it, and name the file")
    if url.netloc not in ("", "localhost"):
        raise InputError(f"{text}: a file URL has three slashes before its path, as in file:///videos/clip.mp4")
    return pathlib.Path(urllib.parse.unquote(url.path))


def _check_array(frames: np.ndarray) -> None:
    if frames.ndim not in (3, 4) or frames.shape[-1] != 3 or frames.size == 0:
        hint = "; several videos are given as a list" if frames.ndim == 5 else ""
        raise InputError(f"frames are [T, H, W, 3], or [H, W, 3] of one image, not {list(frames.shape)}{hint}")
    if frames.dtype != np.uint8:
        raise InputError(f"frames are uint8, 0 to 255, not {frames.dtype}; convert them")


def _sample_array(frames: UInt8[np.ndarray, "n h w 3"], shape: FrameShape) -> UInt8[np.ndarray, "t s s 3"]:
    """The frames at the centres of equal segments, as `decode_clip` samples a video of constant frame rate."""
    times = sampling.segment_times(0, len(frames), shape.num_frames)
    chosen = sampling.frames_at(times, np.arange(len(frames), dtype=np.float64))
    numbers, places = np.unique(chosen, return_inverse=True)
    return np.stack([video.resize_and_crop(frames[number], shape.size) for number in numbers])[places]


def load_clips(videos: Iterable[Any], shape: FrameShape, workers: int) -> Iterator[DecodedClip]:
    """The frames of videos (values that `as_clip` accepts), in order; they are taken as they are needed.

    More than `MAX_IN_PROCESS` of them are decoded by `workers` processes (-1: two fewer than there are cores, 0: by
    this one). Raises RunStopped where these cannot be started.
    """
    videos = iter(videos)
    first = list(itertools.islice(videos, MAX_IN_PROCESS + 1))
    # Arrays would have to be copied to the workers.
    in_process = len(first) <= MAX_IN_PROCESS or isinstance(first[0], np.ndarray)
    processes = 0 if in_process else default_workers(workers)
    load, limit = functools.partial(_load_clip, shape), DEFAULT_LIMITS.clock_seconds
    yield from map_in_order(load, itertools.chain(first, videos), processes, _crashed_clip, limit)


def _load_clip(shape: FrameShape, value: Any) -> DecodedClip:
    name = f"<{type(value).__name__}>"
    try:
        clip = as_clip(value)
        name = clip.name
        return DecodedClip(name, load_frames(clip, shape))
    except InputError as error:
        return DecodedClip(name, None, str(error))


def _crashed_clip(value: Any) -> DecodedClip:
    name = as_clip(value).name
    return DecodedClip(name, None, f"{name}: {_CRASHED}")


def media_files(name: str) -> list[str]:
    """The file itself, or the videos and images below a folder in the order of their paths, without hidden ones.

    Raises InputError where the folder holds no media, or cannot be read.
    """
    if not os.path.isdir(name):
        return [name]
    found = []
    for where, folders, files in os.walk(name, onerror=_refuse_folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        shown = sorted(each for each in files if not each.startswith(".") and is_media_name(each))
        found += [os.path.join(where, each) for each in shown]
    if not found:
        raise InputError(f"{name} holds no video and no image (known by names such as clip.mp4)")
    return found


def _refuse_folder(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error


def is_media_name(name: str) -> bool:
    """Whether a file's name has the extension of a video or an image."""
    return pathlib.PurePath(name).suffix.lower() in MEDIA_EXTENSIONS


class Window(NamedTuple):
    """A part of a file, [start, end), in seconds from the beginning of the media."""

    start: float
    end: float


def cut_into_windows(begin: float | int, end: float | int, window: float | int, stride: float | int) -> list[Window]:
    """Windows that cover [begin, end), each `stride` after the one before; in seconds.

    All are `window` long but the last. A rest behind the last whole window is a window of its own if it is at least
    half as long as a whole one; else the last whole window is extended to the end. So a window has half to one and a
    half times the length `window`, unless the video itself is shorter: then it is one window.
    """
    check_windows(window, stride)
    length = end - begin
    whole = max(math.floor((length - window) / stride + _TOLERANCE) + 1, 1)
    windows = [Window(begin + i * stride, begin + i * stride + window) for i in range(whole)]
    rest = length - whole * stride  # the length of a window that starts where the next one would
    uncovered = end - windows[-1].end > _TOLERANCE
    if uncovered and rest >= window / 2:
        return [*windows, Window(begin + whole * stride, end)]
    return [*windows[:-1], Window(windows[-1].start, end)]


def check_windows(window: float | int, stride: float | int) -> None:
    """Raises InputError where `window` or `stride` is not positive and finite, or windows would leave gaps."""
    for name, value in (("window", window), ("stride", stride)):
        if not 0 < value < math.inf:
            raise InputError(f"--{name}={value:g} must be a positive number of seconds")
    if stride > window:
        raise InputError(f"--stride={stride:g} is longer than --window={window:g}: the seconds between would be lost")


@dataclasses.dataclass(frozen=True)
class WindowTask:
    """Windows of a file, for a worker to decode. The first task of a file has none: it finds out which there are.

    `file` is the caller's name of the file at `path`. If the file's hash is still `known_hash`, nothing is decoded.
    `share` is the task's part in the work on the file; 0: not known before the first task is done.
    """

    file: str
    path: str
    known_hash: str = ""
    windows: tuple[Window, ...] = ()
    share: float = 0.0
    is_last: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedWindows:
    """The result of a task: the windows that could be decoded, with uint8 `[T, S, S, 3]` of each.

    A first task also has the `rest` of the windows, for further tasks, and a hash of the file's `content`. `error` says
    why the file, or one of the windows, cannot be decoded.
    """

    task: WindowTask
    frames: tuple[tuple[Window, Any], ...] = ()
    rest: tuple[Window, ...] = ()
    content: str = ""
    error: str = ""


class _TaskQueue:
    """Tasks in order. Others can be put in front of them, even after the queue has been found empty."""

    def __init__(self, tasks: Iterable[WindowTask]) -> None:
        self._tasks = iter(tasks)
        self.front: collections.deque[WindowTask] = collections.deque()

    def __iter__(self) -> Iterator[WindowTask]:
        return self

    def __next__(self) -> WindowTask:
        return self.front.popleft() if self.front else next(self._tasks)


def decode_windows(
    tasks: Iterable[WindowTask], window: float | int, stride: float | int, shape: FrameShape, workers: int
) -> Iterator[DecodedWindows]:
    """The results of the first task of each file and of those that follow from it; windows of a file come in order.

    A first task decodes the first windows, and the others follow as tasks of their own. So all `workers` share a video
    of hours, and few of its windows are in memory. With 0 workers, a decoder that crashes ends this process.
    """
    queue = _TaskQueue(tasks)
    function = functools.partial(_run_window_task, window, stride, shape)
    for decoded in map_in_order(function, queue, workers, _crashed_windows, DEFAULT_LIMITS.clock_seconds):
        task, size = decoded.task, _WINDOWS_PER_TASK
        parts = [decoded.rest[first : first + size] for first in range(0, len(decoded.rest), size)]
        task = dataclasses.replace(task, share=task.share or 1 / (1 + len(parts)), is_last=task.is_last and not parts)
        queue.front.extend(dataclasses.replace(task, windows=part, is_last=part is parts[-1]) for part in parts)
        yield dataclasses.replace(decoded, task=task)


def _run_window_task(window: float | int, stride: float | int, shape: FrameShape, task: WindowTask) -> DecodedWindows:
    """Decodes the windows of a task. Each task opens the file anew, and reads only what its windows need."""
    try:
        with open(task.path, "rb") as media:
            windows, content = task.windows, ""
            if not windows:
                content = hashlib.file_digest(media, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
                if content == task.known_hash:
                    return DecodedWindows(task, content=content)
                windows = tuple(cut_into_windows(*_time_span(media), window, stride))
            frames, problem = [], ""
            for each in windows[:_WINDOWS_PER_TASK]:
                try:
                    frames.append((each, video.decode_clip(media, **shape._asdict(), **each._asdict())))
                except video.DecodeError as error:
                    problem = str(error)
            return DecodedWindows(task, tuple(frames), windows[_WINDOWS_PER_TASK:], content, problem)
    except (video.DecodeError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return DecodedWindows(task, error=" ".join(str(reason or error).split()))


def _time_span(media: io.BufferedReader) -> tuple[float, float]:
    """When the first frame begins and the last one ends; a sound track may begin before, and end after."""
    found = []

    def choose(times: np.ndarray, stop: float) -> np.ndarray:
        found.append((float(times[0]), stop))
        return np.zeros(1, dtype=np.int64)

    video.read_frames(media, 0.0, math.inf, choose, lambda frame, aspect: None)
    return found[-1]


def _crashed_windows(task: WindowTask) -> DecodedWindows:
    return DecodedWindows(task, error=_CRASHED)
