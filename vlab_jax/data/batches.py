"""Batches made ahead of time, by threads of this process or by worker processes, which are replaced where they end.

A batch is made in pieces, each of some consecutive clips, so that all workers share a batch within a memory bound: the
number of workers and the size of a piece follow from the bound (`plan_prefetch`). This process joins the pieces.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import UInt8

from vlab_jax.data import crash_guard, schema, video
from vlab_jax.data.crash_guard import InOrder, WorkerEnded, WorkerProcess
from vlab_jax.data.media import DEFAULT_LIMITS, MediaLimits
from vlab_jax.data.sources import Consumer, DamagedRecord, RetryingSource
from vlab_jax.errors import InputError, RunStopped

# Pieces of one worker process that are requested and not yet taken: one is made, and the others wait in this process.
PIECES_IN_FLIGHT = 3
# Pieces that exist at once for each worker: those, the clips of one before they are stacked, and one to spare.
PIECES_PER_WORKER = PIECES_IN_FLIGHT + 2
PIECES_IN_MAIN = 2  # one that is copied into its batch, and one to spare
THREADS, PIECES_OF_THREADS = 2, 4  # without worker processes
MOST_DEATHS = 3  # of worker processes over one piece of a batch
_TEXT_BYTES = 4096  # of a clip besides its frames: its tokens, and rounding to pages

Batch = dict[str, Any]
ClipKey = tuple[int, int]  # number of the source, index in it


class PrefetchMemory(NamedTuple):
    """GiB of this host's memory that iterators over batches may fill ahead, and how many iterators share them."""

    gigabytes: float = 8.0
    shares: int = 1


DEFAULT_MEMORY = PrefetchMemory()


class Prefetch(NamedTuple):
    """How batches are made ahead."""

    workers: int  # processes that decode; 0: threads of this one
    piece: int  # clips of a piece
    ahead: bool = True  # whether the next batch is joined while one is in use
    note: str = ""  # in one line, what is less than requested, and why

    @property
    def window(self) -> int:
        """How many pieces may be requested and not yet taken."""
        return PIECES_IN_FLIGHT * self.workers if self.workers else PIECES_OF_THREADS - 1


def plan_prefetch(memory: PrefetchMemory, *, batch: int, frame_bytes: int, workers: int) -> Prefetch:
    """The size of pieces and the number of workers that keep within a bound on memory.

    Pieces are so small that all workers take part in the first batch, and that no more than about three batches exist
    at once. Where the bound is too small for all workers, there are fewer. With 0 workers, threads of this process
    decode, and exceed a bound that is too small.

    Args:
      batch: clips of a batch of this process.
      frame_bytes: bytes of a clip's frames.

    Raises `InputError` where not even one worker with pieces of one clip fits.
    """
    clip = frame_bytes + _TEXT_BYTES
    allowed = int(memory.gigabytes * 2**30) // memory.shares
    ahead = batch * clip <= allowed // 2
    room = (allowed - ahead * batch * clip) // clip
    if not workers:
        return Prefetch(0, max(1, min(room // PIECES_OF_THREADS, batch // PIECES_OF_THREADS)), ahead)
    if room < pieces_at_once(1):
        least = pieces_at_once(1) * clip * memory.shares
        raise InputError(
            f"data.prefetch_gigabytes={memory.gigabytes:g} is too little for clips of {-(-clip // 2**20)} MiB: set "
            f"at least --config.data.prefetch_gigabytes={-(-least // 2**26) / 16:g}, or decode in threads with "
            "--config.data.workers=0"
        )
    fitting = min(workers, max(1, (room - PIECES_IN_MAIN) // PIECES_PER_WORKER))
    piece = min(room // pieces_at_once(fitting), max(1, batch // (2 * fitting)))
    note = ""
    if fitting < workers:
        note = (
            f"data.prefetch_gigabytes={memory.gigabytes:g} is enough for {fitting} of {workers} worker processes; "
            "where memory allows more, raise it"
        )
    return Prefetch(fitting, piece, ahead, note)


def pieces_at_once(workers: int) -> int:
    """How many pieces exist at once with this number of worker processes."""
    return PIECES_PER_WORKER * workers + PIECES_IN_MAIN


class Unreadable(Exception):
    """A clip that cannot be decoded, or whose record is damaged; it says which and why."""


@dataclasses.dataclass(frozen=True)
class FrameOptions:
    """How a clip becomes frames; see `video.decode_clip`."""

    num_frames: int
    size: int
    short: str = "repeat"
    limits: MediaLimits = DEFAULT_LIMITS

    @property
    def nbytes(self) -> int:
        """Bytes of a clip's frames."""
        return self.num_frames * self.size**2 * 3

    def decode(self, clip: schema.ClipRecord, rng: np.random.Generator | None) -> UInt8[np.ndarray, "t s s 3"]:
        """The RGB frames of a clip."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(FrameOptions)}
        return video.decode_clip(clip.media, start=clip.start, end=clip.end, rng=rng, **options)


class ClipReader:
    """Reads and decodes clips of data sources, for one iterator.

    `blocked` are clips that crash or hang the process that decodes them, with the reason: they are not decoded again.
    """

    def __init__(self, sources: Sequence[Sequence], frames: FrameOptions) -> None:
        self.consumer = Consumer()
        self.sources = [s.read_for(self.consumer) if isinstance(s, RetryingSource) else s for s in sources]
        self.frames = frames
        self.blocked: dict[ClipKey, str] = {}

    def read(
        self, number: int, index: int, rng: np.random.Generator | None
    ) -> tuple[schema.ClipRecord, UInt8[np.ndarray, "t s s 3"]]:
        """The clip at an index of source `number`, and its frames. Raises `Unreadable`."""
        try:
            clip = schema.from_example(self.sources[number][index])
        except DamagedRecord as error:
            raise Unreadable(str(error)) from error
        if reason := self.blocked.get((number, index)):
            raise Unreadable(f"{clip.id}: {reason}")
        try:
            with crash_guard.guarded(number, index, self.frames.limits.clock_seconds):
                return clip, self.frames.decode(clip, rng)
        except video.DecodeError as error:
            raise Unreadable(f"{clip.id}: {error}") from error


class Batches(contextlib.AbstractContextManager, Iterator[Batch]):
    """Batches made ahead of time. Closing ends the worker processes, and so does leaving the `with` block.

    A worker process that ends is replaced, and its piece is made anew. The batch is the same, unless a clip crashes its
    process twice, or takes too long: that clip counts as one that cannot be decoded from then on.

    Args:
      clips: the elements of the batches, dictionaries that are made with `reader`.
      size: clips of a batch. The last one is filled up with clips that are not `valid`.
      memory: how much the batches that are made ahead may take.
      workers: processes that decode, at most; 0 decodes in threads of this one.
      first, every: batch number `first`, and every `every`-th from there on.

    Raises `InputError` where the memory is too little. From `next` comes what `clips` raise, in a worker process too,
    and `RunStopped` where worker processes end again and again, over the same batch, and no clip is to blame.
    """

    def __init__(
        self,
        clips: grain.MapDataset,
        reader: ClipReader,
        size: int,
        memory: PrefetchMemory,
        workers: int,
        first: int = 0,
        every: int = 1,
    ) -> None:
        prefetch = plan_prefetch(memory, batch=size, frame_bytes=reader.frames.nbytes, workers=workers)
        self._consumer = reader.consumer
        serve = functools.partial(_serve_piece, clips, reader)
        self._workers = [WorkerProcess(serve) for _ in range(prefetch.workers)]
        calls = [functools.partial(_make_piece_guarded, worker, reader) for worker in self._workers]
        calls = calls or [functools.partial(_make_piece, clips)] * THREADS
        pieces = piece_ranges(len(clips), size, prefetch.piece, first, every)
        self._pieces = InOrder(calls, pieces, prefetch.window)
        joined = functools.partial(join, self._pieces)
        self._batches = InOrder([joined], itertools.repeat(size), 2 if prefetch.ahead else 1)

    def __next__(self) -> Batch:
        return next(self._batches)

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # While Python ends, threads are at a standstill, and modules may be gone.
        if sys is not None and not sys.is_finalizing() and hasattr(self, "_batches"):
            self.close()

    def close(self) -> None:
        """Ends threads and worker processes, also those that wait for their data; a second time, does nothing."""
        self._consumer.closed.set()
        for worker in self._workers:
            worker.close()
        self._pieces.close()
        self._batches.close()


def piece_ranges(clips: int, size: int, piece: int, first: int = 0, every: int = 1) -> Iterator[range]:
    """The indices of each piece: of batch number `first`, of `size` clips, and every `every`-th batch from there on."""
    for begin in range(first * size, clips, every * size):
        end = min(begin + size, clips)
        for start in range(begin, end, piece):
            yield range(start, min(start + piece, end))


def _make_piece(clips: grain.MapDataset, indices: range) -> Batch:
    return stack([clips[index] for index in indices])


def _serve_piece(clips: grain.MapDataset, reader: ClipReader, request: tuple[range, dict[ClipKey, str]]) -> Batch:
    """In a worker process: the piece of these indices, without the clips that are blocked by now."""
    indices, blocked = request
    reader.blocked.update(blocked)
    return _make_piece(clips, indices)


def _make_piece_guarded(worker: WorkerProcess, reader: ClipReader, indices: range) -> Batch:
    """A piece made by a worker process; a clip that crashes or hangs it is added to `reader.blocked`.

    A clip that was being decoded when the process ended is tried once more, so that it is not blamed for what the
    system did.
    """
    seconds, suspect, deaths = reader.frames.limits.clock_seconds, None, 0
    while True:
        try:
            return worker((indices, dict(reader.blocked)))
        except WorkerEnded as ended:
            if ended.clip is not None and (ended.hung or ended.clip == suspect):
                late = f"it was not decoded within {seconds:g} s, after which its process was ended"
                reader.blocked[ended.clip] = late if ended.hung else crash_guard.CRASHED
                continue
            suspect, deaths = ended.clip, deaths + 1
            if deaths > MOST_DEATHS:
                raise RunStopped(
                    f"{ended}, {deaths} times over the same batch, by the system if it ran out of memory; run again, "
                    "with fewer, as in --config.data.workers=1"
                ) from ended
            logging.warning("%s; another makes its part of the batch anew", ended)


def stack(elements: Sequence[Mapping[str, Any]]) -> Batch:
    """A batch of elements: arrays are stacked, lists (of failures, of ids) are joined."""
    batch: Batch = {}
    for key, value in elements[0].items():
        values = [element[key] for element in elements]
        batch[key] = list(itertools.chain(*values)) if isinstance(value, list) else np.stack(values)
    return batch


def join(pieces: Iterator[Batch], size: int) -> Batch:
    """Takes the pieces of a batch and copies each as it comes, so that no more than one of them is held.

    Where the pieces end before there are `size` clips, the batch is filled up with clips that are not `valid`. Raises
    `StopIteration` where there is no piece.
    """
    batch: Batch = {}
    done = 0
    while done < size:
        try:
            done += _append(batch, next(pieces), done, size)
        except StopIteration:
            if not done:
                raise
            for value in batch.values():
                if not isinstance(value, list):
                    value[done:] = value[done - 1]
            batch["valid"][done:], batch["index"][done:] = False, -1
            break
    return batch


def _append(batch: Batch, piece: Batch, done: int, size: int) -> int:
    """Copies a piece to its place in a batch; returns its number of clips."""
    count = next(len(value) for value in piece.values() if not isinstance(value, list))
    for key, value in piece.items():
        if isinstance(value, list):
            batch.setdefault(key, []).extend(value)
            continue
        if key not in batch:
            batch[key] = np.empty((size, *value.shape[1:]), value.dtype)
        batch[key][done : done + count] = value
    return count
