"""A data source that waits while its files are out of reach: a server that restarts, a mount that comes back."""

import contextlib
import hashlib
import logging
import math
import os
import pathlib
import pickle
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vlab_jax.errors import CannotRead, InputError

# FOLDED vlab_jax/data/sources.py: A mixture of data sets: how it is spelled, and which of its clips are the same
# clip.


def parse_mixture(entries: Sequence[str]) -> list[tuple[str, float]]:
    """Data sets with their weights: `('motion@0.7', 'folder:/a/directory')`; the weight is 1 where none is given.

    A number behind the last '@' is a weight, unless it ends the name of a directory that is there: so
    `folder:/videos@2024` is that directory, and `folder:/videos@2024@0.5` gives it a weight.

    Raises:
      InputError: there is no entry, or a weight is not positive and finite.
    """
    if not entries:
        raise InputError("no data set to train on; name one, as in data.train=('motion',)")
    mixture = []
    for entry in entries:
        spec, at, weight = entry.rpartition("@")
        try:
            pair = (spec, float(weight)) if at and not _is_folder(entry) else (entry, 1.0)
        except ValueError:
            pair = (entry, 1.0)  # an '@' within a path
        if not 0 < pair[1] < math.inf:
            raise InputError(f"the weight of data set {entry!r} must be positive and finite")
        mixture.append(pair)
    return mixture


def _is_folder(spec: str) -> bool:
    """Whether the spec of a data set is `folder:` with a directory that is there."""
    kind, _, path = spec.partition(":")
    return kind == "folder" and pathlib.Path(path).expanduser().is_dir()


def dataset_names(specs: Sequence[str]) -> tuple[str, ...]:
    """The data set that each spec is of: configurations of one (`msrvtt/captioning`) are on the same clips, two
    directories are not."""
    return tuple(spec if spec.startswith("folder:") else spec.partition("/")[0] for spec in specs)


def identity(name: str, dataset: str = "") -> np.int32:
    """A clip as a number that is the same in every process: its id, in a data set.

    Args:
      dataset: empty for the first data set of a mixture, and for the only one.
    """
    known = f"{dataset}\0{name}" if dataset else name
    digest = hashlib.blake2b(known.encode(), digest_size=4).digest()
    return np.int32(int.from_bytes(digest, "little", signed=True))


_FIRST_WAIT, _LONGEST_WAIT = 0.2, 10.0  # seconds; each is twice the one before
_GLANCE = 0.5  # seconds between two looks at whether anybody still waits for the record
# ArrayRecord hands errors of the system on in words: `pread() failed: Stale file handle; reading ...`.
_SYSTEM_CALL = re.compile(r"\b\w+\(\) failed: ")
_DAMAGED = "Corrupted Riegeli"


class DamagedRecord(InputError):
    """A record whose bytes are not those that were written."""


class Patient(Sequence):
    """A data source whose reads are tried again, ever more slowly, while its files are out of reach.

    An outage is said in one line, and its end in another. A record that is damaged is not tried again. The source can
    be pickled; worker processes open it when they first read, so they too can begin during an outage.

    Args:
      source: a sequence that can be pickled; what is unpickled opens its files anew.
      seconds: how long an outage may take.
      name: what a message calls the source.
      folder: shared by the processes and threads that read for one consumer: the first to see an outage speaks for all,
        and when the folder is gone, so is the consumer, and nobody waits any longer. Empty: there is but one.
    """

    def __init__(self, source: Sequence | bytes, seconds: float, name: str, length: int = -1, folder: str = "") -> None:
        self._pickled = source if isinstance(source, bytes) else pickle.dumps(source)
        self._source = None if isinstance(source, bytes) else source
        self._length = length if length >= 0 else len(source)
        self._seconds, self._name, self._folder = seconds, name, folder

    def within(self, folder: pathlib.Path) -> "Patient":
        """The same source, read by several that share a folder."""
        return Patient(self._pickled, self._seconds, self._name, self._length, str(folder))

    def __reduce__(self) -> tuple:
        return Patient, (self._pickled, self._seconds, self._name, self._length, self._folder)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        """Raises:
        CannotRead: it was out of reach for too long.
        DamagedRecord: it is damaged.
        """
        try:
            return self._read(index)
        except _OutOfReach as error:
            return self._read_patiently(index, str(error))

    def _read(self, index: int) -> Any:
        try:
            source = self._source
            if source is None:
                source = self._source = _opened(self._pickled)
            return source[index]
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            if _DAMAGED in reason:
                raise DamagedRecord(f"record {index} of {self._name} is damaged: {reason[:200]}") from error
            if isinstance(error, OSError | _OutOfReach) or _SYSTEM_CALL.search(reason):
                raise _OutOfReach(reason) from error
            raise

    def _read_patiently(self, index: int, reason: str) -> Any:
        began, wait = time.monotonic(), _FIRST_WAIT
        with self._outage() as speaks:
            if speaks and self._seconds > 0:
                logging.warning("%s is out of reach, and is tried again: %s", self._name, reason)
            while (left := self._seconds - (time.monotonic() - began)) > 0 and self._pause(min(wait, left)):
                wait = min(2 * wait, _LONGEST_WAIT)
                self._source = None  # what could not open a file says so for ever
                try:
                    record = self._read(index)
                except _OutOfReach as error:
                    reason = str(error)
                    continue
                if speaks:
                    logging.warning("%s is back after %.0f s", self._name, time.monotonic() - began)
                return record
        raise CannotRead(
            f"{self._name} was out of reach for {time.monotonic() - began:.0f} s (data.retry_seconds="
            f"{self._seconds:g}): {reason}; bring it back, and the same command goes on"
        )

    def _pause(self, seconds: float) -> bool:
        """Waits; whether anybody still waits for the record."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self._folder and not os.path.isdir(self._folder):
                return False
            time.sleep(min(left, _GLANCE))
        return True

    @contextlib.contextmanager
    def _outage(self) -> Iterator[bool]:
        """For the time of an outage: whether it is this reader that speaks of it."""
        if not self._folder:
            yield True
            return
        mark = pathlib.Path(self._folder, "outage")
        try:
            mark.touch(exist_ok=False)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            mark.unlink(missing_ok=True)


class _OutOfReach(RuntimeError):
    """Files that cannot be read now."""


def _opened(pickled: bytes) -> Sequence:
    try:
        return pickle.loads(pickled)
    except Exception as error:  # it could be opened before; TFDS reads its description again, and raises its own
        raise _OutOfReach(" ".join(str(error.__cause__ or error).split())) from error
