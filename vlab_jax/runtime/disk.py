"""Writing to disk: failures as one line, JSON files that are never half written, and locks."""

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
# Orbax and tensorstore pass on the message of a system error, without its number.
_MESSAGES = {os.strerror(number): number for number in (*_NO_ROOM, *_NOT_ALLOWED, *_OTHER)}


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns disk errors of the block, which writes `path` or below it, into `CannotWrite`."""
    try:
        yield
    except OSError as error:
        if errno_of(error) is None:
            raise
        raise cannot_write(path, error) from error


def errno_of(error: BaseException | None) -> int | None:
    """The number of the disk error that an exception is, quotes, or was caused by; None if it is no disk error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _MESSAGES.values():
            return error.errno
        for message, number in _MESSAGES.items():
            if message in str(error):
                return number
        error = error.__cause__ or error.__context__
    return None


def cannot_write(path: pathlib.Path, error: BaseException) -> CannotWrite:
    """The exception that a disk error ends the run with; `path`, a file or a directory, need not exist."""
    number = errno_of(error)
    advice = "make it writable" if number in _NOT_ALLOWED else "check the disk"
    advice = "make room or raise the quota" if number in _NO_ROOM else advice
    folder = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
    return CannotWrite(
        f"{path} cannot be written: {os.strerror(number)} ({shutil.disk_usage(folder).free / 2**20:,.1f} MiB free); "
        f"the checkpoints before it are whole: {advice}, and the same command goes on from the newest"
    )


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file in one move: a kill, or an error (`CannotWrite`), leaves the old one or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_json(path: pathlib.Path, content: Any, **options: Any) -> None:
    """Writes a value as `write_text` does; `options` are of `json.dumps` (the indent is 2 by default)."""
    write_text(path, json.dumps(content, **{"indent": 2, **options}) + "\n")


@contextlib.contextmanager
def exclusive_lock(path: pathlib.Path, message: str) -> Iterator[None]:
    """Holds the lock file `path`, which the system releases when the process ends, however it ends. If another process
    holds it, raises `InputError(message)`."""
    lock = filelock.FileLock(path)
    try:
        with writing(path.parent):
            lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(message) from None
    try:
        yield
    finally:
        lock.release()
