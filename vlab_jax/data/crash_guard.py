"""Worker processes that may crash or hang: it is known what each was doing, and the others go on.

Decoders crash on some damaged media, and never return from others, so media are decoded by processes of their own. Each
is driven by one thread of the main process, which sends it one item at a time. When a process ends, its thread knows
the item, the clip that the process was decoding (`guarded`) and the exit code, and starts another process.

Results come back through a pipe. The system frees it with the processes, so a run that is killed leaves nothing in
`/dev/shm`, and the size of `/dev/shm` does not matter.
"""

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from vlab_jax.errors import InputError, RunStopped

A = TypeVar("A")
B = TypeVar("B")

CRASHED = "the process that decoded it ended: a crash of the decoder, too little memory, or more time than it may take"

_AHEAD = 4  # items for each worker that are in work, or done and not yet taken


def default_workers(wanted: int, processes: int = 1) -> int:
    """The worker processes of each of `processes` on this machine; -1 wants a share of all usable cores but two."""
    if wanted >= 0:
        return wanted
    # On Linux a container or a scheduler may allow a part of the cores.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, (cores - 2) // processes)


def map_in_order(
    function: Callable[[A], B], items: Iterable[A], workers: int, on_crash: Callable[[A], B], seconds: float | int = 0.0
) -> Iterator[B]:
    """Yields `function(item)` for each item, in order, computed by worker processes; with 0 workers, by this process.

    Items are taken a few ahead, so memory does not grow with their number. Function, items and results are pickled.
    An item whose process crashes is tried once more. If it crashes again, or takes longer than `seconds` (0: no limit),
    `on_crash(item)` is yielded in its place. Close the iterator to end the processes early.

    Raises what `function` raises, and `RunStopped` where no process can be started.
    """
    if not workers:
        yield from map(function, items)
        return
    processes = [WorkerProcess(function, seconds) for _ in range(workers)]
    results = InOrder([functools.partial(_call_twice, each, on_crash) for each in processes], items, _AHEAD * workers)
    try:
        yield from results
    finally:
        for process in processes:
            process.close()
        results.close()


def _call_twice(process: "WorkerProcess[A, B]", on_crash: Callable[[A], B], item: A) -> B:
    for _ in range(2):
        try:
            return process(item)
        except WorkerEnded as ended:
            if ended.hung:
                break
    return on_crash(item)


class InOrder(Iterator[B]):
    """The results of items, in order; each of the calls is made by a thread of its own.

    At most `window` items are in work, or done and not yet taken. `items` may yield more after they have ended once. An
    error ends the results. One thread takes them; any thread may close.
    """

    def __init__(self, calls: Sequence[Callable[[A], B]], items: Iterable[A], window: int) -> None:
        self._items, self._window = iter(items), window
        self._lock, self._ended = threading.Lock(), False
        self._waiting: collections.deque[concurrent.futures.Future[B]] = collections.deque()
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        # Daemons: a program that ends does not wait for them.
        self._threads = [threading.Thread(target=_answer_all, args=(c, self._requests), daemon=True) for c in calls]
        for thread in self._threads:
            thread.start()
        self._request()

    def _request(self) -> None:
        for item in itertools.islice(self._items, self._window - len(self._waiting)):
            self._waiting.append(concurrent.futures.Future())
            self._requests.put((item, self._waiting[-1]))

    def __next__(self) -> B:
        with self._lock:
            if not self._ended:
                self._request()
            if self._ended or not self._waiting:
                raise StopIteration
            future = self._waiting.popleft()
        try:
            return future.result()
        except BaseException:
            self._ended = True
            raise

    def close(self) -> None:
        """Ends the threads, each after the item that it is at."""
        with self._lock:
            self._ended = True
            for future in self._waiting:
                future.cancel()
        for _ in self._threads:
            self._requests.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()


def _answer_all(call: Callable[[A], B], requests: queue.SimpleQueue) -> None:
    while (request := requests.get()) is not None:
        item, future = request
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call(item))
            except BaseException as error:
                future.set_exception(error)
        del request, item, future  # a result is large, and the next request may be long in coming


class WorkerEnded(Exception):
    """A worker process ended at an item; `clip` is the one that it was decoding (`guarded`), if any."""

    def __init__(self, exit_code: int | None, clip: tuple[int, int] | None) -> None:
        super().__init__(f"a worker process that decodes was ended with exit code {exit_code}")
        self.clip, self.hung = clip, exit_code == -signal.SIGALRM


class WorkerProcess(Generic[A, B]):
    """A process that computes `function` of one item at a time; called again after it has ended, it is started anew.

    An item that takes longer than `seconds` (0: no limit) ends it. One thread calls it; any thread may close it.
    """

    def __init__(self, function: Callable[[A], B], seconds: float | int = 0.0) -> None:
        self._function, self._seconds = function, seconds
        self._process: multiprocessing.process.BaseProcess | None = None
        self._lock, self._closed = threading.Lock(), False

    def __call__(self, item: A) -> B:
        """`function(item)`; raises what it raises, and `WorkerEnded` and `RunStopped`."""
        if self._process is None:
            self._start()
        clip = None
        try:
            self._connection.send(item)
            while (message := self._connection.recv())[0] == _CLIP:
                clip = message[1]
            kind, data, sizes = message
            buffers = [bytearray(size) for size in sizes]
            with open(self._connection.fileno(), "rb", closefd=False) as stream:
                if any(stream.readinto(buffer) < len(buffer) for buffer in buffers):
                    raise EOFError
        except (EOFError, OSError):
            raise self._end(clip) from None
        result = pickle.loads(data, buffers=buffers)
        if kind == _ERROR:
            raise result
        return result

    def close(self) -> None:
        """Ends the process, whatever it does; it is not started again."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()
                self._process.join(5.0)  # one that waits for a server's disk cannot be killed

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks that threads of JAX may hold
        self._connection, theirs = context.Pipe()
        with self._lock:
            if self._closed:
                raise concurrent.futures.CancelledError
            self._process = context.Process(target=_serve, args=(theirs, self._function, self._seconds), daemon=True)
            self._process.start()
        theirs.close()
        try:
            self._connection.recv()
        except (EOFError, OSError):
            self._process = None
            raise RunStopped(
                "worker processes cannot be started: the system has no memory for them, or the program's own file "
                'starts its work when it is imported, outside of `if __name__ == "__main__":`'
            ) from None

    def _end(self, clip: tuple[int, int] | None) -> WorkerEnded:
        with self._lock:
            if self._closed:
                raise concurrent.futures.CancelledError
            process, self._process = self._process, None
            process.join()
        self._connection.close()
        return WorkerEnded(process.exitcode, clip)


# What follows runs in the worker process. A message to its parent is a kind, what it holds, and the sizes of the
# buffers that come behind it.

_CLIP, _RESULT, _ERROR = "clip", "result", "error"
_parent: Connection | None = None  # of this process, where it is a worker


@contextlib.contextmanager
def guarded(source: int, index: int, seconds: float | int) -> Iterator[None]:
    """In a worker process, reports the clip that it decodes, and ends the process where that takes too long."""
    if _parent is None:
        yield
        return
    _parent.send((_CLIP, (source, index), ()))
    try:
        with _end_after(seconds):
            yield
    finally:
        _parent.send((_CLIP, None, ()))


@contextlib.contextmanager
def _end_after(seconds: float | int) -> Iterator[None]:
    """Ends this process with SIGALRM where the block takes longer: the system does, whatever a library is busy with."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _serve(parent: Connection, function: Callable[[Any], Any], seconds: float | int) -> None:
    global _parent
    _parent = parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        parent.send("ready")
        while True:
            item = parent.recv()
            try:
                with _end_after(seconds):
                    result = function(item)
                _send(parent, _RESULT, result)
            except Exception as error:
                _send(parent, _ERROR, _sendable(error))
            item = result = None


def _send(parent: Connection, kind: str, value: Any) -> None:
    """Sends the value's pickle, and its arrays without copying them."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    raw = [buffer.raw() for buffer in buffers]
    parent.send((kind, data, [each.nbytes for each in raw]))
    with open(parent.fileno(), "wb", closefd=False) as stream:
        for each in raw:
            stream.write(each)


def _sendable(error: Exception) -> Exception:
    """The error as the parent can load it; one that is a fault of the program has a note on where it was raised."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # some libraries' own cannot be pickled
        error = RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    if not isinstance(error, InputError | RunStopped):
        error.add_note("".join(traceback.format_tb(error.__traceback__)))
    return error


def _end_with_parent() -> None:
    """Ends this worker process with its parent: after a SIGKILL nobody else tells it to."""
    multiprocessing.parent_process().join()  # notices a parent that is gone already, too
    os._exit(1)
