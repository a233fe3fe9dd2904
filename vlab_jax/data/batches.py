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
from collections.abc import Callable, Iterator

import grain
from absl import flags

from vlab_jax.data import left
from vlab_jax.data.in_hand import InHand, guilty
from vlab_jax.data.patience import Patient
from vlab_jax.data.pieces import Batch, Pieces, join
from vlab_jax.data.prefetch import THREADS, Prefetch
from vlab_jax.data.reader import Reader
from vlab_jax.data.workers import begin_worker
from vlab_jax.errors import CannotRead, InputError, RunStopped

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

    def __init__(self, make: Callable[[Reader], Pieces], reader: Reader, size: int, prefetch: Prefetch) -> None:
        self._folder = left.folder()
        self._next: _Joined | None = None
        shared = pathlib.Path(self._folder.name)
        self._tag = left.tag_of(self._folder.name)
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
            left.remove_undelivered(self._tag)

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
