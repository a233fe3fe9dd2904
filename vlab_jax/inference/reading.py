"""Clips are decoded ahead of the model: here where they are few, by worker processes where they are many."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from vlab_jax.data.limits import DEFAULT_LIMITS
from vlab_jax.data.workers import default_workers, map_in_order
from vlab_jax.errors import InputError
from vlab_jax.inference.clip import FrameShape, as_clip, show

FEW = 32  # clips that are decoded sooner than worker processes start


@dataclasses.dataclass(frozen=True, eq=False)
class Read:
    """A video that was read.

    Attributes:
      name: what it is called.
      frames: uint8 `[T, S, S, 3]`; None where it cannot be decoded.
      error: why it cannot, in one line that names it; else empty.
    """

    name: str
    frames: np.ndarray | None
    error: str = ""


def read_clips(videos: Iterable[Any], frames: FrameShape, workers: int) -> Iterator[Read]:
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


def read_clip(frames: FrameShape, given: Any) -> Read:
    """Decodes a video; what is wrong with it becomes an `error`."""
    name = ""
    try:
        clip = as_clip(given)
        name = clip.name
        return Read(name, show(clip, frames))
    except InputError as error:
        return Read(name or f"<{type(given).__name__}>", None, str(error))


def _lost(given: Any) -> Read:
    name = as_clip(given).name
    return Read(name, None, f"{name}: the decoder crashed on it, or did not come back")
