"""One process at a time on a directory: a run on its workdir, an indexer on its index."""

import contextlib
import pathlib
from collections.abc import Iterator

import filelock

from vlab_jax.errors import InputError
from vlab_jax.runtime.writing import writing


@contextlib.contextmanager
def only_run(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the workdir's lock, which the system releases when the process ends, however it ends.

    Raises:
      InputError: another run holds it.
    """
    taken = f"another run is at work in {workdir}; wait until it ends, or use another --workdir"
    with only_holder(workdir / "run.lock", taken):
        yield


@contextlib.contextmanager
def only_holder(path: pathlib.Path, taken: str) -> Iterator[None]:
    """Holds the lock `path`, which the system releases when the process ends, however it ends.

    Raises:
      InputError: another process holds it; the message is `taken`.
    """
    lock = filelock.FileLock(path)
    try:
        with writing(path.parent):
            lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(taken) from None
    try:
        yield
    finally:
        lock.release()
