"""Batches are made in pieces: each of some clips in a row, so that all workers take part in a batch, within a bound."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from vlab_jax.errors import InputError

# FOLDED vlab_jax/data/pieces.py: How many clips are decoded ahead of the training step: as many as a bound on
# memory allows.  Worker processes hand pieces of a batch over in shared memory, and the main process joins them.
# The size of a piece and the number of workers follow from the bound, so that all pieces that exist at once fit
# into it.

PREFETCH_GIGABYTES = 8.0
SHARED_MEMORY = "/dev/shm"
# Pieces that exist at once for each worker, with Grain's buffer of one (`mp_prefetch` of Grain 0.2.18): one is decoded,
# one waits for room in the worker's queue, one is in the queue, and in the main process one waits for room in the
# buffer that a thread fills from the queue, and one is in that buffer. All but the first are in shared memory.
PIECES_PER_WORKER = 5
# One is copied into its batch, and the memory of the one before is being freed, by a thread of Grain's.
PIECES_IN_MAIN = 2
THREADS, PIECES_OF_THREADS = 2, 4  # without worker processes: two are decoded or wait, one is copied, one is freed
_TEXT_BYTES = 4096  # of a clip besides its frames: tokens, and rounding to pages


class PrefetchMemory(NamedTuple):
    """What an iterator over batches may hold ahead.

    Attributes:
      gigabytes: GiB of host memory, for all processes of a run on this host (`data.prefetch_gigabytes`).
      shared: bytes that are free in shared memory; None: not known, as where there is no `/dev/shm`.
      shares: iterators that share these, of all processes on this host.
    """

    gigabytes: float = 8.0
    shared: int | None = None
    shares: int = 1


DEFAULT_MEMORY = PrefetchMemory()


class Prefetch(NamedTuple):
    """How batches are made ahead.

    Attributes:
      workers: processes that decode; 0: threads of this one.
      piece: clips that a worker hands over at once.
      ahead: whether the next batch is joined while one is in use.
      note: what is less than asked for and why, in one line; empty: nothing.
    """

    workers: int
    piece: int
    ahead: bool = True
    note: str = ""


def free_shared_memory() -> int | None:
    """Bytes that are free in `/dev/shm`; None where there is none."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def plan_prefetch(memory: PrefetchMemory, *, batch: int, frame_bytes: int, workers: int) -> Prefetch:
    """The pieces that batches are made of, and the workers that make them, within a bound on memory.

    Pieces are so small that all workers take part in the first batch, and that no more than about three batches exist
    at once. Where the bound is too small for all workers, there are fewer.

    Args:
      batch: clips of a batch of this process.
      frame_bytes: of a clip's frames.
      workers: processes that may decode; 0: threads of this process, which need no shared memory and hold the least
        there can be where the bound is smaller.

    Raises:
      InputError: not even one worker with pieces of one clip fits.
    """
    clip = frame_bytes + _TEXT_BYTES
    asked = int(memory.gigabytes * 2**30) // memory.shares
    ahead = batch * clip <= asked // 2
    room = (asked - ahead * batch * clip) // clip
    if not workers:
        return Prefetch(0, max(1, min(room // PIECES_OF_THREADS, batch // PIECES_OF_THREADS)), ahead)
    free = room if memory.shared is None else min(room, memory.shared // memory.shares // clip)
    if free < pieces_at_once(1):
        raise InputError(_refusal(memory, clip, free < room))
    fitting, piece = _fit(free, batch, workers)
    note = ""
    if (fitting, piece) != _fit(room, batch, workers):
        note = (
            f"{SHARED_MEMORY} has {_mebibytes(memory.shared)} MiB free, less than data.prefetch_gigabytes="
            f"{memory.gigabytes:g}: {fitting} of {workers} worker processes decode, in pieces of {piece}; a larger one "
            "(in a container: --shm-size) may be faster"
        )
    elif fitting < workers:
        note = (
            f"data.prefetch_gigabytes={memory.gigabytes:g} is enough for {fitting} of {workers} worker processes; "
            "where memory allows more, raise it"
        )
    return Prefetch(fitting, piece, ahead, note)


def pieces_at_once(workers: int) -> int:
    """How many pieces exist at once with so many worker processes."""
    return PIECES_PER_WORKER * workers + PIECES_IN_MAIN


def _fit(clips: int, batch: int, workers: int) -> tuple[int, int]:
    """As many workers as so many clips allow, and the size of a piece."""
    fitting = min(workers, max(1, (clips - PIECES_IN_MAIN) // PIECES_PER_WORKER))
    return fitting, min(clips // pieces_at_once(fitting), max(1, batch // (2 * fitting)))


def _refusal(memory: PrefetchMemory, clip: int, is_shared: bool) -> str:
    least = pieces_at_once(1) * clip * memory.shares
    if is_shared:
        return (
            f"{SHARED_MEMORY}, through which worker processes hand clips over, has {_mebibytes(memory.shared)} MiB "
            f"free and must have {_mebibytes(least, up=True)} MiB: make it larger (in a container: --shm-size=8g), or "
            "decode in threads with --config.data.workers=0"
        )
    return (
        f"data.prefetch_gigabytes={memory.gigabytes:g} is too little for clips of {_mebibytes(clip, up=True)} MiB: set "
        f"at least --config.data.prefetch_gigabytes={-(-least // 2**26) / 16:g}, or decode in threads with "
        "--config.data.workers=0"
    )


def _mebibytes(size: int, up: bool = False) -> int:
    return -(-size // 2**20) if up else size // 2**20


Batch = dict[str, Any]


class Pieces(grain.MapDataset):
    """Every batch of some clips, piece by piece. The last piece of a batch may have fewer clips.

    Args:
      clips: the elements, each a dictionary.
      batch: clips of a batch.
      piece: clips of a piece, at most.
      first, every: the batches: this one, and each so many later.
    """

    def __init__(self, clips: grain.MapDataset, batch: int, piece: int, first: int = 0, every: int = 1) -> None:
        super().__init__(clips)
        self._batch, self._piece, self._first, self._every = batch, piece, first, every
        self.of_batch = -(-batch // piece)  # pieces

    def __len__(self) -> int:
        clips = len(self._parent)
        batches = range(self._first, -(-clips // self._batch), self._every)
        if not batches or (batches[-1] + 1) * self._batch <= clips:
            return len(batches) * self.of_batch
        rest = clips - batches[-1] * self._batch
        return (len(batches) - 1) * self.of_batch - (-rest // self._piece)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, place = divmod(index, self.of_batch)
        begin = (self._first + batch * self._every) * self._batch
        start = begin + place * self._piece
        stop = min(start + self._piece, begin + self._batch, len(self._parent))
        return stack([self._parent[clip] for clip in range(start, stop)])


def stack(elements: Sequence[Mapping[str, Any]]) -> Batch:
    """Elements to a batch: arrays are stacked, lists (of failures, of ids) are joined."""
    lists = [key for key in elements[0] if isinstance(elements[0][key], list)]
    batch = {key: np.stack([e[key] for e in elements]) for key in elements[0] if key not in lists}
    return batch | {key: [each for e in elements for each in e[key]] for key in lists}


def join(pieces: Iterator[Batch], size: int, check: Callable[[], None] = lambda: None) -> Batch:
    """Takes the pieces of a batch, and copies each as it comes, so that no more than one of them is held.

    Args:
      size: clips of the batch. Where the pieces end before, as in the last batch of an evaluation, it is filled up with
        clips that are not `valid`.
      check: called before each piece is taken; what it raises is raised.

    Raises:
      StopIteration: there is no piece.
    """
    batch: Batch = {}
    done = 0
    while done < size:
        check()
        try:
            piece = next(pieces)
        except StopIteration:
            if not done:
                raise
            _pad(batch, done)
            return batch
        done += _append(batch, piece, done, size)
        del piece  # before the next is waited for: it may lie in shared memory
    return batch


def _append(batch: Batch, piece: Batch, done: int, size: int) -> int:
    """Copies a piece to its place in a batch; how many clips it has."""
    count = next(len(value) for value in piece.values() if not isinstance(value, list))
    for key, value in piece.items():
        if isinstance(value, list):
            batch.setdefault(key, []).extend(value)
            continue
        if key not in batch:
            batch[key] = np.empty((size, *value.shape[1:]), value.dtype)
        batch[key][done : done + count] = value
    return count


def _pad(batch: Batch, done: int) -> None:
    for value in batch.values():
        if not isinstance(value, list):
            value[done:] = value[done - 1]
    batch["valid"][done:], batch["index"][done:] = False, -1
