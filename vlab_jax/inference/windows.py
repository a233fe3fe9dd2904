"""How a long video is cut into windows, and which windows of one file say the same: arithmetic on seconds."""

import collections
import dataclasses
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vlab_jax.data import video
from vlab_jax.data.crash_guard import map_in_order
from vlab_jax.data.media import DEFAULT_LIMITS, Encoded
from vlab_jax.errors import InputError

# Two windows that share less than this do not overlap: what rounding leaves.
_TOUCHING = 1e-6

T = TypeVar("T")


class Window(NamedTuple):
    """A part of a file, [start, end), in seconds from the beginning of the media."""

    start: float
    end: float


def split(begin: float | int, end: float | int, window: float | int, stride: float | int) -> list[Window]:
    """Windows that cover [begin, end), each `stride` after the one before; seconds.

    All are `window` long but the last. What is left behind the last whole window becomes a window of its own where that
    is at least half as long as a whole one; else the last whole window is extended to the end. So a window is half to
    one and a half times as long as asked, unless the video itself is shorter: that is one window.

    Raises:
      InputError: `window` or `stride` is not positive and finite, or windows would leave gaps.
    """
    check(window, stride)
    length = end - begin
    whole = max(math.floor((length - window) / stride + _TOUCHING) + 1, 1)
    windows = [Window(begin + i * stride, begin + i * stride + window) for i in range(whole)]
    rest = length - whole * stride  # of a window that starts where the next would
    uncovered = end - windows[-1].end > _TOUCHING
    if uncovered and rest >= window / 2:
        return [*windows, Window(begin + whole * stride, end)]
    return [*windows[:-1], Window(windows[-1].start, end)]


def check(window: float | int, stride: float | int) -> None:
    """Raises InputError where no video can be cut so."""
    for name, value in (("window", window), ("stride", stride)):
        if not 0 < value < math.inf:
            raise InputError(f"--{name}={value:g} must be a positive number of seconds")
    if stride > window:
        raise InputError(f"--stride={stride:g} is longer than --window={window:g}: what lies between would be lost")


def overlap(one: Window, other: Window) -> bool:
    """Whether two windows show the same moment."""
    return min(one.end, other.end) - max(one.start, other.start) > _TOUCHING


def best_apart(hits: Iterable[T], place: Callable[[T], tuple[str, Window]]) -> list[T]:
    """Non-maximum suppression: those hits, best first, that overlap no better one of the same file.

    Args:
      hits: best first.
      place: a hit's file and window.
    """
    kept: list[T] = []
    taken: dict[str, list[Window]] = {}
    for hit in hits:
        file, window = place(hit)
        if not any(overlap(window, other) for other in taken.get(file, ())):
            kept.append(hit)
            taken.setdefault(file, []).append(window)
    return kept


# FOLDED vlab_jax/inference/windows.py: The windows of media files, decoded by worker processes: what one task
# of a worker is, and what comes of it.  A task is some windows of one file: the first of a file opens it, and says
# which windows there are; the others follow from that. So a video of hours is decoded by all workers, a few windows
# in memory at a time. Each task opens the file anew, and reads what its windows need.

_WINDOWS_A_TASK = 8


@dataclasses.dataclass(frozen=True)
class Cut:
    """How files are cut and decoded: seconds, frames of a window, pixels of a frame's side."""

    window: float
    stride: float
    num_frames: int
    size: int


@dataclasses.dataclass(frozen=True)
class Task:
    """Some windows of a file: none named means that the file is to be opened.

    `content` is the hash that the file is known by, if any: nothing is decoded where it still has it.
    """

    file: str
    path: str
    cut: Cut
    content: str = ""
    windows: tuple[Window, ...] = ()
    last: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedWindows:
    """What has come of a task.

    Attributes:
      windows: those that could be decoded; frames: theirs, uint8 `[T, S, S, 3]` each.
      rest: windows that are left to other tasks.
      content: a hash of the bytes, where the task opened the file.
      same: the file has the hash that it is known by; nothing was decoded.
      error: why the file, or else a window of it, cannot be decoded; else empty.
    """

    task: Task
    windows: tuple[Window, ...] = ()
    frames: tuple[Any, ...] = ()
    rest: tuple[Window, ...] = ()
    content: str = ""
    same: bool = False
    error: str = ""

    @property
    def tasks(self) -> int:
        """How many tasks the file takes, where this one opened it."""
        return 1 + math.ceil(len(self.rest) / _WINDOWS_A_TASK)


def read_windows(tasks: Iterable[Task], workers: int) -> Iterator[DecodedWindows]:
    """What comes of tasks, and of those that follow from them; of each file in the order of its windows.

    Args:
      tasks: each opens a file.
      workers: processes; with 0, this one decodes, and a decoder that crashes ends it.
    """
    queue = _Queue(tasks)
    for read in map_in_order(do, queue, workers, _lost, DEFAULT_LIMITS.clock_seconds):
        rest = [read.rest[i : i + _WINDOWS_A_TASK] for i in range(0, len(read.rest), _WINDOWS_A_TASK)]
        queue.first(
            dataclasses.replace(read.task, windows=windows, last=number == len(rest))
            for number, windows in enumerate(rest, start=1)
        )
        yield read


def do(task: Task) -> DecodedWindows:
    """Opens the file where the task names no windows, and decodes windows."""
    try:
        with open(task.path, "rb") as media:
            return _decoded(task, media, task.windows) if task.windows else _opened(task, media)
    except (video.DecodeError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return DecodedWindows(task, error=" ".join(str(reason or error).split()))


def _opened(task: Task, media: io.BufferedReader) -> DecodedWindows:
    """What a file's first task gives; raises `DecodeError` and `OSError`."""
    content = hashlib.file_digest(media, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    if content == task.content:
        return DecodedWindows(task, content=content, same=True)
    windows = tuple(split(*_span(media), task.cut.window, task.cut.stride))
    first, rest = windows[:_WINDOWS_A_TASK], windows[_WINDOWS_A_TASK:]
    return dataclasses.replace(_decoded(task, media, first), rest=rest, content=content)


class _Queue:
    """Tasks in order, before which others can be put, even when it has been found empty."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = iter(tasks)
        self._first: collections.deque[Task] = collections.deque()

    def first(self, tasks: Iterable[Task]) -> None:
        self._first.extend(tasks)

    def __iter__(self) -> Iterator[Task]:
        return self

    def __next__(self) -> Task:
        return self._first.popleft() if self._first else next(self._tasks)


def _decoded(task: Task, media: Encoded, windows: tuple[Window, ...]) -> DecodedWindows:
    shown, frames, error = [], [], ""
    for window in windows:
        try:
            frames.append(_frames(task.cut, media, window))
            shown.append(window)
        except video.DecodeError as reason:
            error = str(reason)
    return DecodedWindows(task, tuple(shown), tuple(frames), error=error)


def _frames(cut: Cut, media: Encoded, window: Window) -> np.ndarray:
    return video.decode_clip(media, num_frames=cut.num_frames, size=cut.size, start=window.start, end=window.end)


def _span(media: Encoded) -> tuple[float, float]:
    """When the first frame begins and when the last ends; a sound track may begin before, and end after."""
    found = []

    def choose(times: np.ndarray, stop: float) -> np.ndarray:
        found.append((float(times[0]), stop))
        return np.zeros(1, dtype=np.int64)

    video.read_frames(media, 0.0, math.inf, choose, lambda frame, aspect: None)
    return found[-1]


def _lost(task: Task) -> DecodedWindows:
    return DecodedWindows(task, error="the decoder crashed on it, or did not come back")
