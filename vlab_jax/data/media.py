"""What encoded media are read from: their bytes, or an open file, of which no more is in memory than is being read.

An opened file may be read by several readers, each at a place of its own: they do not rely on the file's position.
"""

import contextlib
import io
import os
from collections.abc import Iterator

from vlab_jax.data.limits import Watch

# The bytes of a file, or a file opened for reading bytes, at any place.
Encoded = bytes | io.BufferedReader


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Encoded]:
    """The file at a path, or what comes out of it where it is a pipe. Raises `OSError`."""
    with open(path, "rb") as file:
        yield file if file.seekable() else file.read()


def size(media: Encoded) -> int:
    """How many bytes it has."""
    return len(media) if isinstance(media, bytes) else os.fstat(media.fileno()).st_size


def head(media: Encoded, count: int) -> bytes:
    """The first bytes."""
    return as_file(media).read(count)


def as_file(media: Encoded) -> io.BytesIO | io.BufferedReader:
    """A file at its beginning."""
    if isinstance(media, bytes):
        return io.BytesIO(media)
    media.seek(0)
    return media


class WatchedReader:
    """Reads within the time that the clip has: reading is all that a container's headers can ask for."""

    def __init__(self, media: Encoded, watch: Watch) -> None:
        self._file, self._size, self._watch, self._at = as_file(media), size(media), watch, 0

    def read(self, count: int = -1) -> bytes:
        self._watch.check_time()
        self._file.seek(self._at)
        found = self._file.read(count)
        self._at += len(found)
        return found

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence], 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True
