"""Worker processes: how they end, in time, and a map over them that keeps the order and bounds what is in memory."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import os
import pathlib
import pickle
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker, shared_memory
from typing import Any, TypeVar

import numpy as np

from vlab_jax.errors import RunStopped

# FOLDED vlab_jax/data/crash_guard.py: What a kill leaves outside of the workdir, and how the next start removes it: shared
# memory and empty folders.  Worker processes hand batches over in shared memory. Python names the segments at
# random, and a process beside the run removes those that are left. SIGKILL for the whole group takes that process
# too, and they stay in memory until the machine restarts. So what belongs to a run gets a prefix that follows from
# its process, kept in the workdir.

_SEGMENTS = pathlib.Path("/dev/shm")
_PREFIX = "_SHM_NAME_PREFIX"  # of Python's module; a version without it names as it likes, and nothing is removed
_LENGTH = "_SHM_SAFE_NAME_LENGTH"  # of a name, what is drawn for each segment included


def prefix_of(pid: int) -> str:
    """What the names of a process's segments begin with: eight characters, others for another process of that id."""
    status = _status(pid)
    started = status[19] if len(status) > 19 else ""
    return "vj" + hashlib.sha256(f"{pid} {started}".encode()).hexdigest()[:6]


def _status(pid: int) -> list[str]:
    """What the system says of a process, from its state on (proc(5), `stat`); nothing where there is none."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _lives(prefix: str) -> bool:
    """Whether the process of that prefix runs; one that has ended and that its parent has not asked about does not."""
    numbers = (int(path.name) for path in pathlib.Path("/proc").glob("[0-9]*"))
    return any(prefix_of(pid) == prefix and _status(pid)[:1] not in (["Z"], ["X"], []) for pid in numbers)


def name_by_parent(tag: str = "") -> None:
    """In a worker process: what it makes from now on is named after its parent, and then by the tag."""
    if hasattr(shared_memory, _PREFIX) and hasattr(shared_memory, _LENGTH):
        prefix = f"/{prefix_of(os.getppid())}{tag}"
        setattr(shared_memory, _PREFIX, prefix)
        setattr(shared_memory, _LENGTH, len(prefix) + 16)  # as many letters at random


def tag_of(folder: str) -> str:
    """Four characters that tell one group of a process's workers from another, by a folder that is the group's own."""
    return hashlib.sha256(folder.encode()).hexdigest()[:4]


def remove_undelivered(tag: str) -> int:
    """Removes segments that worker processes of that tag, which have ended, made and this process has not opened.

    A worker that is ended while it hands a batch over leaves them; Python would remove them when this process ends, and
    warn.

    Returns:
      How many there were.
    """
    count, opened = 0, _opened_segments()
    for path in _SEGMENTS.glob(f"{prefix_of(os.getpid())}{tag}*"):
        if path.name in opened:  # whoever has opened it removes it
            continue
        try:
            path.unlink()
        except FileNotFoundError:  # it was being removed
            continue
        resource_tracker.unregister(f"/{path.name}", "shared_memory")
        count += 1
    return count


def _opened_segments() -> set[str]:
    """The names of the segments that this process has mapped (proc(5), `maps`)."""
    try:
        lines = pathlib.Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return set()
    return {line.rpartition("/")[2] for line in lines if f" {_SEGMENTS}/" in line}


def folder() -> tempfile.TemporaryDirectory:
    """A folder of this process, for as long as the object lives."""
    return tempfile.TemporaryDirectory(prefix=f"{prefix_of(os.getpid())}-", ignore_cleanup_errors=True)


def take_over(file: pathlib.Path) -> int:
    """Removes what is left of the process that `file` names, and names this one there.

    A process that lives keeps what it has: it may have trained here before and elsewhere now.

    Returns:
      How many segments and folders there were.

    Raises:
      OSError: the file cannot be written.
    """
    own = prefix_of(os.getpid())
    before = file.read_text().strip() if file.exists() else ""
    segments, folders = [], []
    if len(before) == len(own) and before.isalnum() and not _lives(before):
        segments = list(_SEGMENTS.glob(f"{before}*"))
        folders = list(pathlib.Path(tempfile.gettempdir()).glob(f"{before}-*"))
    for path in segments:
        path.unlink(missing_ok=True)
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)
    file.write_text(own)
    return len(segments) + len(folders)


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


# FOLDED vlab_jax/data/crash_guard.py: The clip that a worker process is at: known after a decoder has brought the
# process down, or did not come back.  Before a worker decodes a clip it notes which, and sets the system's alarm
# clock, which ends the process where decoding takes too long, even if the decoder never returns to Python. What a
# dead worker has noted is tried again in a process of its own, so that a clip is blamed for what it does and not
# for what the system did.

ENDED = "the process that decoded it ended: a crash of the decoder, too little memory, or more time than it may take"


@dataclasses.dataclass(frozen=True)
class Note:
    """A clip that is being decoded: its source and place there, its id, and the generator its frames are drawn by."""

    source: int
    index: int
    id: str
    rng: np.random.Generator | None

    @property
    def clip(self) -> tuple[int, str]:
        """What tells the clip from others."""
        return self.source, self.id


@dataclasses.dataclass(frozen=True)
class InHand:
    """Where worker processes note what they are at.

    Attributes:
      folder: of the notes, one a process; empty: nothing is noted or timed, as where threads of the main process
        decode.
      seconds: after which a process that is at one clip is ended.
    """

    folder: str = ""
    seconds: float | int = 0.0

    @contextlib.contextmanager
    def noted(self, note: Note) -> Iterator[None]:
        """Notes a clip while it is decoded."""
        if not self.folder:
            yield
            return
        path = pathlib.Path(self.folder, str(os.getpid()))
        path.write_bytes(pickle.dumps(note))  # a folder that this program made for its own processes
        try:
            with end_after(self.seconds):
                yield
        finally:
            path.unlink()

    def left(self) -> list[Note]:
        """What processes that have ended were at, the longest first; their notes are removed."""
        paths = sorted(pathlib.Path(self.folder).iterdir(), key=lambda path: path.stat().st_mtime_ns)
        contents = [path.read_bytes() for path in paths]
        for path in paths:
            path.unlink()
        return [pickle.loads(content) for content in contents if content]


NOWHERE = InHand()


def guilty(notes: Sequence[Note], exit_code: int | None, read: Any, seconds: float | int) -> dict[tuple[int, str], str]:
    """Which of the clips that dead workers were at are to blame, and why.

    Args:
      notes: the longest in hand first.
      exit_code: of the process whose end was seen first, where it is known.
      read: decodes a note's clip again; pickled.
      seconds: after which a process that is at one clip is ended.
    """
    if exit_code == -signal.SIGALRM and notes:
        return {notes[0].clip: f"it was not decoded within {seconds:g} s, after which its process was ended"}
    tried = {note.clip: alone(_Again(read, seconds), note, lambda note: ENDED) for note in notes}
    return {clip: reason for clip, reason in tried.items() if reason}


@dataclasses.dataclass(frozen=True)
class _Again:
    """Decodes what a note says; that it cannot be decoded is no crime."""

    read: Any
    seconds: float | int

    def __call__(self, note: Note) -> str:
        with end_after(self.seconds), contextlib.suppress(Exception):
            self.read(note)
        return ""
