"""Data sources: how a mixture of data sets is spelled, which clips are the same clip, and retries during outages."""

import contextlib
import copy
import hashlib
import logging
import math
import pathlib
import pickle
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vlab_jax.errors import CannotRead, InputError


def parse_mixture(entries: Sequence[str]) -> list[tuple[str, float]]:
    """Data sets with their weights: `('motion@0.7', 'folder:/a/directory')`; without a weight, it is 1.

    A number after the last '@' is a weight, unless it ends the name of a directory that exists: so
    `folder:/videos@2024` is that directory, and `folder:/videos@2024@0.5` gives it a weight.

    Raises `InputError` where there is no entry, or a weight is not positive and finite.
    """
    if not entries:
        raise InputError("no data set to train on; name one, as in data.train=('motion',)")
    mixture = []
    for entry in entries:
        pair, path = (entry, 1.0), entry.removeprefix("folder:")
        spec, at, weight = entry.rpartition("@")
        if at and not (path != entry and pathlib.Path(path).expanduser().is_dir()):
            with contextlib.suppress(ValueError):  # an '@' within a path
                pair = (spec, float(weight))
        if not 0 < pair[1] < math.inf:
            raise InputError(f"the weight of data set {entry!r} must be positive and finite")
        mixture.append(pair)
    return mixture


def dataset_names(specs: Sequence[str]) -> tuple[str, ...]:
    """The data set of each spec: configurations of one (`msrvtt/captioning`) share their clips, directories do not."""
    return tuple(spec if spec.startswith("folder:") else spec.partition("/")[0] for spec in specs)


def clip_hash(name: str, dataset: str = "") -> np.int32:
    """A clip as a number that is the same in every process: a hash of its id and its data set.

    `dataset` is empty for the first data set of a mixture, and for the only one.
    """
    key = f"{dataset}\0{name}" if dataset else name
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return np.int32(int.from_bytes(digest, "little", signed=True))


_FIRST_WAIT, _LONGEST_WAIT = 0.2, 10.0  # seconds; each wait is twice the one before
# ArrayRecord passes the system's errors on in words: `pread() failed: Stale file handle; reading ...`.
_SYSTEM_CALL = re.compile(r"\b\w+\(\) failed: ")
_DAMAGED = "Corrupted Riegeli"


class DamagedRecord(InputError):
    """A record whose bytes are not those that were written."""


class Consumer:
    """What the threads and processes that read for one iterator share during an outage.

    `closed` is set when the iterator is closed: nobody waits for data any longer. A worker process has its own, which
    is never set: it is killed.
    """

    def __init__(self, token: str = "") -> None:
        self.closed = threading.Event()
        self._token = token or secrets.token_hex(8)

    def __reduce__(self) -> tuple:
        return Consumer, (self._token,)

    @contextlib.contextmanager
    def outage(self) -> Iterator[bool]:
        """Lasts as long as an outage; yields whether this reader is the one that reports it."""
        mark = pathlib.Path(tempfile.gettempdir(), f"vlab-outage-{self._token}")
        try:
            mark.touch(exist_ok=False)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            mark.unlink(missing_ok=True)


class RetryingSource(Sequence):
    """A data source whose reads are retried, with growing waits, while its files are out of reach.

    An outage may last `seconds`; it is logged in one line, and its end in another. A damaged record is not read again.
    `source` can be pickled, and what is unpickled opens its files anew; worker processes open it when they first read,
    so they too can start during an outage. `name` is what messages call it.
    """

    def __init__(self, source: Sequence, seconds: float, name: str) -> None:
        self._source: Sequence | None = source
        self._pickled, self._length = pickle.dumps(source), len(source)
        self._seconds, self._name, self._consumer = seconds, name, Consumer()

    def read_for(self, consumer: Consumer) -> "RetryingSource":
        """The same source, read for a consumer, which all readers of one iterator share."""
        source = copy.copy(self)
        source._consumer = consumer
        return source

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        """Raises `CannotRead` where the record was out of reach for too long, and `DamagedRecord`."""
        try:
            return self._read(index)
        except _OutOfReach as error:
            return self._retry(index, str(error))

    def _read(self, index: int) -> Any:
        try:
            source = self._source
            if source is None:
                source = self._source = _unpickle(self._pickled)
            return source[index]
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            if _DAMAGED in reason:
                raise DamagedRecord(f"record {index} of {self._name} is damaged: {reason[:200]}") from error
            if isinstance(error, OSError | _OutOfReach) or _SYSTEM_CALL.search(reason):
                raise _OutOfReach(reason) from error
            raise

    def _retry(self, index: int, reason: str) -> Any:
        began, wait = time.monotonic(), _FIRST_WAIT
        with self._consumer.outage() as reports:
            if reports and self._seconds > 0:
                logging.warning("%s is out of reach, and is tried again: %s", self._name, reason)
            while (remaining := self._seconds - (time.monotonic() - began)) > 0:
                if self._consumer.closed.wait(min(wait, remaining)):
                    break
                wait = min(2 * wait, _LONGEST_WAIT)
                self._source = None  # what could not open a file says so for ever
                try:
                    record = self._read(index)
                except _OutOfReach as error:
                    reason = str(error)
                    continue
                if reports:
                    logging.warning("%s is back after %.0f s", self._name, time.monotonic() - began)
                return record
        raise CannotRead(
            f"{self._name} was out of reach for {time.monotonic() - began:.0f} s (data.retry_seconds="
            f"{self._seconds:g}): {reason}; bring it back, and the same command goes on"
        )


class _OutOfReach(RuntimeError):
    """Files that cannot be read now."""


def _unpickle(pickled: bytes) -> Sequence:
    try:
        return pickle.loads(pickled)
    except Exception as error:  # it could be opened before; TFDS reads its description again, and raises its own
        raise _OutOfReach(" ".join(str(error.__cause__ or error).split())) from error
