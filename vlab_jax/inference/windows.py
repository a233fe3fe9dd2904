"""How a long video is cut into windows, and which windows of one file say the same: arithmetic on seconds."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

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
