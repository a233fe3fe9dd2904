"""Media files are opened by worker processes: one that hangs or brings its process down is a finding, not the end."""

import contextlib
import dataclasses
import hashlib
import multiprocessing
import signal
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait

from vlab_jax.data.files import read_file
from vlab_jax.data.limits import DEFAULT_LIMITS, MediaLimits
from vlab_jax.data.video import DecodeError, probe
from vlab_jax.errors import InputError

_START = 120.0  # seconds for a process to start


@dataclasses.dataclass(frozen=True)
class Probed:
    """What opening a file has shown.

    Attributes:
      duration: in seconds.
      content: a hash of the bytes, of 64 bits with sign.
      error: why it cannot be read or decoded; else empty.
    """

    path: str
    duration: float = 0.0
    content: int = 0
    error: str = ""


def hash64(data: bytes) -> int:
    """A hash of 64 bits with sign, as databases store it."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), signed=True)


def probe_file(path: str, limits: MediaLimits = DEFAULT_LIMITS) -> Probed:
    """Reads a file, every packet of it, and decodes one frame."""
    try:
        data = read_file(path, limits.max_bytes)
        return Probed(path, probe(data, limits).duration, hash64(data))
    except (DecodeError, OSError) as error:
        return Probed(path, error=" ".join(str(error).split()))


def probe_files(
    paths: Iterable[str],
    workers: int,
    timeout: float,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> Iterator[Probed]:
    """What opening each file shows, as it is known; the paths are taken as workers are free.

    Args:
      workers: processes.
      timeout: seconds after which a file counts as unreadable, and its worker is replaced.
      limits: what reading one file may take.

    Raises:
      InputError: worker processes do not start.
    """
    paths = iter(paths)
    crew = [_Worker(limits) for _ in range(max(workers, 1))]
    try:
        for worker in crew:
            worker.wait_for_start()
            worker.give(next(paths, None), timeout)
        while any(worker.path is not None for worker in crew):
            busy = [worker for worker in crew if worker.path is not None]
            soonest = min(worker.deadline for worker in busy) - time.monotonic()
            ready = wait([worker.connection for worker in busy], max(soonest, 0))
            for place, worker in enumerate(crew):
                if worker.path is None:
                    continue
                late = time.monotonic() >= worker.deadline
                if worker.connection not in ready and not late:
                    continue
                result = worker.result(timeout)
                if worker.ended:
                    crew[place] = worker = _Worker(limits)
                    worker.wait_for_start()
                yield result
                worker.give(next(paths, None), timeout)
    finally:
        for worker in crew:
            worker.end()


class _Worker:
    """A process that probes one file at a time."""

    def __init__(self, limits: MediaLimits) -> None:
        # Spawned: a fork would copy whatever locks the parent's threads hold.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, limits), daemon=True)
        self._process.start()
        theirs.close()
        self.path: str | None = None
        self.deadline = 0.0
        self.ended = False

    def wait_for_start(self) -> None:
        """Returns when the process is ready, so that a file is not blamed for what the process lacks."""
        with contextlib.suppress(EOFError, ConnectionError):
            if self.connection.poll(_START):
                self.connection.recv()
                return
        raise InputError(
            "worker processes do not start: the system has no memory for them (ask for fewer: --workers=1), or the "
            'program starts its work when it is imported, outside of `if __name__ == "__main__":`'
        )

    def give(self, path: str | None, timeout: float) -> None:
        """Hands over the next file, if there is one."""
        self.path = path
        if path is not None:
            self.deadline = time.monotonic() + timeout
            self.connection.send(path)

    def result(self, timeout: float) -> Probed:
        """What has become of the file; the process ends where it gave no answer."""
        path, self.path = self.path, None
        if self.connection.poll():
            with contextlib.suppress(EOFError, ConnectionError):
                return self.connection.recv()
        died = not self._process.is_alive() or self.connection.poll()
        self.end()
        self.ended = True
        reason = "the decoder crashed on it" if died else f"it was not opened in {timeout:g} s"
        return Probed(path, error=reason)

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, limits: MediaLimits) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        connection.send("ready")
        while True:
            connection.send(probe_file(connection.recv(), limits))
