"""Batches made ahead of time, by threads of this process or by worker processes, which are replaced where they die."""

import concurrent.futures
import dataclasses
import functools
import gc
import logging
import pathlib
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import grain
import numpy as np
from absl import flags
from jaxtyping import UInt8

from vlab_jax.data import crash_guard, schema, video
from vlab_jax.data.crash_guard import NOWHERE, InHand, Note, begin_worker, guilty
from vlab_jax.data.media import DEFAULT_LIMITS, MediaLimits
from vlab_jax.data.pieces import THREADS, Batch, Pieces, Prefetch, join
from vlab_jax.data.sources import DamagedRecord, Patient
from vlab_jax.errors import CannotRead, InputError, RunStopped

# FOLDED vlab_jax/data/batches.py: Clips of data sources, read and decoded; a clip that has ended a worker process is
# not decoded again.


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

    def decode(self, clip: schema.ClipRecord, rng: np.random.Generator | None) -> np.ndarray:
        """uint8 RGB frames `[T, S, S, 3]`."""
        return video.decode_clip(
            clip.media,
            num_frames=self.num_frames,
            size=self.size,
            start=clip.start,
            end=clip.end,
            rng=rng,
            short=self.short,
            limits=self.limits,
        )


@dataclasses.dataclass(frozen=True)
class ClipReader:
    """Decodes clips of the sources, and notes which one while it does.

    `lost` are clips that have brought a worker process down, with the reason: they are not decoded again.
    """

    sources: tuple[Sequence, ...]
    frames: FrameOptions
    in_hand: InHand = NOWHERE
    lost: Mapping[tuple[int, str], str] = dataclasses.field(default_factory=dict)

    def clip(self, number: int, index: int) -> schema.ClipRecord:
        """The clip at a place of a source."""
        return schema.from_example(self.sources[number][index])

    def read(
        self, number: int, index: int, rng: np.random.Generator | None
    ) -> tuple[schema.ClipRecord, UInt8[np.ndarray, "t s s 3"]]:
        """The clip at a place of a source, and its frames. Raises `Unreadable`."""
        try:
            clip = self.clip(number, index)
        except DamagedRecord as error:
            raise Unreadable(str(error)) from error
        if reason := self.lost.get((number, clip.id)):
            raise Unreadable(f"{clip.id}: {reason}")
        try:
            with self.in_hand.noted(Note(number, index, clip.id, rng)):
                return clip, self.frames.decode(clip, rng)
        except video.DecodeError as error:
            raise Unreadable(f"{clip.id}: {error}") from error

    def again(self, note: Note) -> None:
        """Decodes what a process was at when it ended."""
        self.frames.decode(self.clip(note.source, note.index), note.rng)


MOST_DEATHS = 3  # of worker processes over one batch
_LEAST_SHARED = 65_536  # bytes of an array that are worth shared memory; smaller ones go through a pipe


class Batches(Iterator[Batch]):
    """Batches made ahead of time, by threads of this process or by worker processes.

    A worker process that dies is replaced, and the batches that were not delivered are made anew: they are the same,
    unless the clip that it was at is to blame, by a crash of the decoder or by taking too long; that one is a clip that
    cannot be decoded from then on. Closing ends the worker processes, and so does leaving the `with` block. Without
    that they end when it is no longer referred to, which an exception on its way up can put off.

    Args:
      make: the pieces of all batches, of clips read by a reader.
      reader: of the data sources; patient ones are shared by those who read.
      size: clips of a batch.
      prefetch: who makes the pieces, and how far ahead.

    Raises, from `next`:
      InputError, CannotRead: as the transformations raise them, in a worker process too.
      RunStopped: worker processes die again and again, over the same batch, and no clip is to blame.
    """

    def __init__(self, make: Callable[[ClipReader], Pieces], reader: ClipReader, size: int, prefetch: Prefetch) -> None:
        self._folder = crash_guard.folder()
        self._next: _Joined | None = None
        shared = pathlib.Path(self._folder.name)
        self._tag = crash_guard.tag_of(self._folder.name)
        if prefetch.workers:
            (shared / "in_hand").mkdir()
            in_hand = InHand(str(shared / "in_hand"), reader.frames.limits.clock_seconds)
            reader = dataclasses.replace(reader, in_hand=in_hand)
        sources = tuple(each.within(shared) if isinstance(each, Patient) else each for each in reader.sources)
        self._make, self._reader = make, dataclasses.replace(reader, sources=sources)
        self._size, self._prefetch = size, prefetch
        self._delivered = self._deaths = 0
        self._pieces: grain.DatasetIterator | None = None
        self._start()

    def _start(self) -> None:
        pieces = self._make(self._reader)
        left_over = pieces[self._delivered * pieces.of_batch :]
        self._pieces = iter(_in_background(left_over, self._prefetch.workers, self._tag))
        self._next = _Joined(self._pieces, self._size)

    def __next__(self) -> Batch:
        while self._next is not None:
            try:
                batch = self._next.result()
            except (InputError, CannotRead) as error:
                raise type(error)(str(error)) from None  # without Grain's note on tracebacks
            except RuntimeError as error:
                if "Worker process was terminated" not in str(error):
                    raise
                self._replace_workers(error)
                continue
            self._delivered, self._deaths = self._delivered + 1, 0
            self._next = _Joined(self._pieces, self._size, begin=self._prefetch.ahead)
            return batch
        raise StopIteration  # closed

    def _end_workers(self) -> None:
        joined, self._next = self._next, None
        pieces, self._pieces = self._pieces, None
        if joined is not None:
            joined.stop()  # Grain's iterator is for one thread at a time
        if pieces is None:
            return
        pieces.close()
        if self._prefetch.workers:
            del pieces, joined
            gc.collect()  # the iterator refers to itself, and holds pieces in shared memory
            crash_guard.remove_undelivered(self._tag)

    def _replace_workers(self, error: RuntimeError) -> None:
        """Begins anew behind the last batch that was delivered, without the clips that are to blame."""
        self._end_workers()
        told = re.search(r"exit code (-?\d+)", str(error))
        code = int(told.group(1)) if told else None
        reader = self._reader
        found = guilty(reader.in_hand.left(), code, reader.again, reader.in_hand.seconds)
        if found:
            self._reader = dataclasses.replace(reader, lost={**reader.lost, **found})
        else:
            self._count_death("unknown" if code is None else str(code), error)
        self._start()

    def _count_death(self, code: str, error: RuntimeError) -> None:
        ended = f"a worker process that decodes was ended with exit code {code}"
        self._deaths += 1
        if self._deaths > MOST_DEATHS:
            raise RunStopped(
                f"{ended}, {self._deaths} times over the same batch, by the system if it ran out of memory; run again, "
                "with fewer, as in --config.data.workers=1"
            ) from error
        logging.warning("%s; others make its batches anew", ended)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not sys.is_finalizing() and hasattr(self, "_pieces"):  # then threads are at a standstill
            self.close()

    def close(self) -> None:
        """Ends threads and worker processes, those too that wait for their data; a second time, does nothing."""
        self._folder.cleanup()
        self._end_workers()


class _Joined:
    """A batch that a thread joins from pieces as they come; it begins at once, or when the batch is asked for.

    The thread refers to this object and not to the `Batches`, which so end when they are dropped.
    """

    def __init__(self, pieces: Iterator[Batch], size: int, begin: bool = True) -> None:
        self._future: concurrent.futures.Future[Batch] = concurrent.futures.Future()
        self._stopped = threading.Event()
        # A daemon: a program that ends does not wait for it.
        self._thread = threading.Thread(target=self._join, args=(pieces, size), daemon=True)
        if begin:
            self._thread.start()

    def _join(self, pieces: Iterator[Batch], size: int) -> None:
        try:
            self._future.set_result(join(pieces, size, self._check))
        except BaseException as error:
            self._future.set_exception(error)

    def _check(self) -> None:
        if self._stopped.is_set():
            raise _Stopped

    def result(self) -> Batch:
        """The batch, or the error that came of it; a signal's handler is heard meanwhile."""
        if self._thread.ident is None:
            self._thread.start()
        return self._future.result()

    def stop(self) -> None:
        """Ends the thread, after the piece that it waits for."""
        self._stopped.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()


class _Stopped(Exception):
    """The batch is not wanted any more."""


def _in_background(pieces: grain.MapDataset, workers: int, tag: str) -> grain.IterDataset:
    """Pieces made ahead: by threads of this process, or by worker processes that decode one after the other.

    `tag` is in the names of the memory that the worker processes share.
    """
    if workers == 0:
        return pieces.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=THREADS))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain asks for its own flags; a program without a command line has none
    elements = pieces.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    elements = grain.experimental.WithOptionsIterDataset(
        elements, grain.experimental.DatasetOptions(min_shm_size=_LEAST_SHARED)
    )
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    return elements.mp_prefetch(options, functools.partial(begin_worker, tag))
