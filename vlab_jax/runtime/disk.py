"""Writes that fail, said in one line: what could not be written, why, how much room there is, what to do."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import filelock

from vlab_jax.errors import CannotWrite, InputError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)
_OTHER = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN)
# Orbax and tensorstore hand errors of the system on in words.
_WORDS = {os.strerror(number): number for number in (*_NO_ROOM, *_NOT_ALLOWED, *_OTHER)}


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """For the block that writes a file or below a directory.

    Raises:
      CannotWrite: the system refused.
    """
    try:
        yield
    except OSError as error:
        if number_of(error) is None:
            raise
        raise cannot_write(path, error) from error


def number_of(error: BaseException | None) -> int | None:
    """The system's number of an error of a disk, as it is, in words, or below another; None: it is no such error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _WORDS.values():
            return error.errno
        for words, number in _WORDS.items():
            if words in str(error):
                return number
        error = error.__cause__ or error.__context__
    return None


def cannot_write(path: pathlib.Path, error: BaseException) -> CannotWrite:
    """The line that the run ends with; `path` is a file or a directory, which need not be there."""
    number = number_of(error)
    if number in _NO_ROOM:
        advice = "make room or raise the quota"
    elif number in _NOT_ALLOWED:
        advice = "make it writable"
    else:
        advice = "see to the disk"
    reason = os.strerror(number) if number is not None else " ".join(str(error).split())
    return CannotWrite(
        f"{path} cannot be written: {reason} ({_room(path)} free); the checkpoints before it are whole: {advice}, "
        "and the same command goes on from the newest"
    )


def _room(path: pathlib.Path) -> str:
    """Free bytes where a path is, or would be."""
    for folder in (path, *path.absolute().parents):
        try:
            free = float(shutil.disk_usage(folder).free)
        except OSError:
            continue
        for unit in ("bytes", "KiB", "MiB", "GiB"):
            if free < 1024:
                return f"{free:.4g} {unit}"
            free /= 1024
        return f"{free:.4g} TiB"
    return "unknown"


# FOLDED vlab_jax/runtime/disk.py: JSON files that are never half written.


def write_json(path: pathlib.Path, content: Any, **spelling: Any) -> None:
    """Writes a value in one move: a kill leaves the old file or the new one.

    Args:
      spelling: options of `json.dumps`; the indent is 2 by default.

    Raises:
      CannotWrite: the disk is full or read-only; the old file is as it was.
    """
    text = json.dumps(content, **{"indent": 2, **spelling}) + "\n"
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


# FOLDED vlab_jax/runtime/disk.py: One process at a time on a directory: a run on its workdir, an indexer on
# its index.


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
