"""Worker processes: how they end, in time, and a map over them that keeps the order and bounds what is in memory."""

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from vlab_jax.data.left import name_by_parent
from vlab_jax.errors import RunStopped

A = TypeVar("A")
B = TypeVar("B")

_AHEAD = 4  # items a worker that are in work or done and not yet asked for


def default_workers(asked: int, processes: int = 1) -> int:
    """Worker processes for decoding, of each of so many processes that share this one's cores.

    As many as asked, or, for -1, its share of two fewer than there are cores that it may use, and one at least.
    """
    return asked if asked >= 0 else max(1, (_usable_cores() - 2) // processes)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # of Linux: a container or a scheduler may allow a part of the cores
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def begin_worker(tag: str, *_: int) -> None:
    """What a worker process does first: see to its end, and to the names of the memory that it shares (`left.py`)."""
    end_with_parent()
    name_by_parent(tag)


def end_with_parent() -> None:
    """Lets a worker process end when its parent is gone: after a SIGKILL nobody else tells it to.

    The sentinel is a pipe whose other end the parent alone holds, so a parent that is gone already is noticed too.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def end_after(seconds: float | int) -> Iterator[None]:
    """Ends this process with SIGALRM where the block takes longer: the system does, whatever a library is busy with."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def map_in_order(
    function: Callable[[A], B],
    items: Iterable[A],
    workers: int,
    lost: Callable[[A], B],
    seconds: float | int = 0.0,
) -> Iterator[B]:
    """`function` of each item, in the order of the items, by processes of their own; 0 workers: by this one.

    Items are taken a few ahead of what is asked for, so memory does not grow with their number. Function, items and
    results are pickled. An item whose process dies (a decoder that crashes, the system short of memory) is tried once
    more, alone; if its process dies again, `lost` stands in for its result. A process that is at one item for longer
    than `seconds` is ended, if that is not 0.

    Raises what `function` raises, and `RunStopped` where no process can be started.
    """
    if not workers:
        yield from map(function, items)
        return
    function = functools.partial(_in_time, function, seconds)
    items, waiting, pool = iter(items), collections.deque(), _pool(workers)
    try:
        while True:
            for item in itertools.islice(items, _AHEAD * workers - len(waiting)):
                waiting.append((item, _submit(pool, function, item)))
            if not waiting:
                return
            item, future = waiting.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                pool.shutdown()
                result = alone(function, item, lost)
                pool = _pool(workers)
                for place, (later, future) in enumerate(waiting):
                    if not _succeeded(future):
                        waiting[place] = later, _submit(pool, function, later)
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    # Spawned: a fork would copy the locks that threads of JAX may hold.
    return concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)


def _begin() -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers


def _submit(pool: concurrent.futures.Executor, function: Callable[[A], B], item: A) -> concurrent.futures.Future[B]:
    try:
        return pool.submit(function, item)
    except BrokenProcessPool as error:
        future: concurrent.futures.Future[B] = concurrent.futures.Future()
        future.set_exception(error)
        return future


def _succeeded(future: concurrent.futures.Future) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _in_time(function: Callable[[A], B], seconds: float | int, item: A) -> B:
    with end_after(seconds):
        return function(item)


def alone(function: Callable[[A], B], item: A, lost: Callable[[A], B]) -> B:
    """`function` of an item by a process of its own, or, if that dies, `lost` of it.

    Raises what `function` raises, and `RunStopped` where no process can be started.
    """
    with _pool(1) as pool:
        try:
            pool.submit(int).result()
        except BrokenProcessPool as error:
            raise RunStopped(
                "worker processes cannot be started: the system has no memory for them, or the program's own file "
                'starts its work when it is imported, outside of `if __name__ == "__main__":`'
            ) from error
        try:
            return pool.submit(function, item).result()
        except BrokenProcessPool:
            return lost(item)
