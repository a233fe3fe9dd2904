"""One run at a time on a workdir."""

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
    lock = filelock.FileLock(workdir / "run.lock")
    try:
        with writing(workdir):
            lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"another run is at work in {workdir}; wait until it ends, or use another --workdir") from None
    try:
        yield
    finally:
        lock.release()
