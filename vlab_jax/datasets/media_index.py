"""Finds media by name below a user's folders: flat or in subfolders, with any extension.

Names come from annotation files, paths from listing the folders. A name is compared with the paths and never made into
one, so no annotation can lead out of the folders. Links in the folders are the user's own: they are followed, each
directory once, but not to a directory that holds the folder itself.

The list is in a temporary SQLite table, so memory does not grow with it.
"""

import contextlib
import hashlib
import os
import pathlib
import posixpath
import re
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, NoReturn

from vlab_jax.datasets.text_files import quoted
from vlab_jax.errors import InputError

VIDEOS = "mp4|m4v|mkv|avi|mov|mpg|mpeg|m1v|m2v|webm|gif|wmv|asf|flv|f4v|3gp|3g2|mts|m2ts|ts|ogv|vob|divx|rm|rmvb|mxf"
IMAGES = "jpg|jpeg|jfif|png|webp|bmp|tif|tiff|avif"
_EXTENSIONS = re.compile(rf"(\.({VIDEOS}|{IMAGES})?)+\Z", re.IGNORECASE)
_IMAGE = re.compile(rf"\.({IMAGES})\Z", re.IGNORECASE)
_UNUSABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class Media(NamedTuple):
    """A media file: its number in the index, its path, and its size in bytes."""

    number: int
    path: str
    size: int


class MediaIndex:
    """The media files below some folders, by name.

    Args:
      folders: in order of preference.
      database: gets the temporary table `media` (number, stem, folder, path, size, time); None: a database of its own.

    Attributes:
      files: the number of media files.
    """

    def __init__(self, folders: Sequence[pathlib.Path], database: sqlite3.Connection | None = None) -> None:
        self.folders = [os.path.abspath(folder) for folder in folders]
        self.files = 0
        self._database = database or sqlite3.connect("", check_same_thread=False)
        self._database.execute(
            "CREATE TEMP TABLE media "
            "(number INTEGER PRIMARY KEY, stem TEXT, folder INTEGER, path TEXT, size INTEGER, time INTEGER)"
        )

    def scan(self, update: Callable[[int], object] = lambda files: None) -> "MediaIndex":
        """Lists the folders; afterwards, `find` finds.

        Args:
          update: gets the number of media files in each directory, for a progress bar.

        Raises:
          InputError: a directory cannot be listed, or a name is not UTF-8.
        """
        tops = [os.path.realpath(folder) for folder in self.folders]
        entered = set(tops)

        def enter(directory: str) -> bool:
            real = os.path.realpath(directory)
            if real in entered or any(top.startswith(f"{real.rstrip('/')}/") for top in tops):
                return False
            entered.add(real)
            return True

        for number, top in enumerate(self.folders):
            for folder, directories, files in os.walk(top, onerror=_refuse_directory, followlinks=True):
                directories[:] = [name for name in _named(folder, directories) if enter(f"{folder}/{name}")]
                media = [(stem, number, *row) for stem, *row in _list_media(folder, _named(folder, files))]
                query = "INSERT INTO media (stem, folder, path, size, time) VALUES (?, ?, ?, ?, ?)"
                self._database.executemany(query, media)
                self.files += len(media)
                update(len(media))
        self._database.execute("CREATE INDEX temp.media_stem ON media (stem)")
        self._database.commit()
        return self

    def find(self, *names: str) -> Media | None:
        """The media of the first of these names that any file has.

        A name is that of a file without its extension; one with folders, as in `00017/000170042`, must be the end of
        the file's path. If several files have it, the choice is by these rules, in this order: not empty; with the
        extension that the name has, if any; of the first folder; at the path that the name is, counted from the folder;
        a video; in fewer subfolders; the first by path.

        Raises:
          InputError: a name leads out of the folder.
        """
        query = "SELECT folder, number, path, size FROM media WHERE stem = ?"
        for name in names:
            stem, found = checked_name(name), []
            for folder, *row in self._database.execute(query, (posixpath.basename(stem),)):
                media = Media(*row)
                inside = os.path.relpath(media.path, self.folders[folder])
                inside_stem = without_extension(inside)
                if f"/{inside_stem}".endswith(f"/{stem}"):
                    rank = (not media.size, inside != name, folder, inside_stem != stem, bool(_IMAGE.search(inside)))
                    found.append((*rank, inside.count("/"), media.path, media))
            if found:
                return min(found)[-1]
        return None

    def fingerprint(self) -> str:
        """A short hash of the path, size and time of every media file, in whatever order they are listed."""
        total = 0
        for path, size, time in self._database.execute("SELECT path, size, time FROM media"):
            digest = hashlib.blake2b(f"{path}\0{size}\0{time}".encode(), digest_size=16).digest()
            total += int.from_bytes(digest)
        return f"{total % 2**128:032x}"


def _refuse_directory(error: OSError) -> NoReturn:
    raise InputError(f"{error.filename} cannot be listed ({error.strerror}); make it readable") from error


def _named(folder: str, names: list[str]) -> Iterator[str]:
    """The names that are not hidden. Raises `InputError` if one is not UTF-8."""
    for name in names:
        if not name.startswith("."):
            if not is_utf8(name):
                raise InputError(f"the name of {folder}/{name!a} is not UTF-8; rename it")
            yield name


def _list_media(folder: str, names: Iterable[str]) -> Iterator[tuple[str, str, int, int]]:
    """Stem, path, size and time of the media; pipes, and links that lead nowhere, are no media."""
    for name in names:
        path, stem = f"{folder}/{name}", without_extension(name)
        if stem != name:
            with contextlib.suppress(OSError):
                found = os.stat(path)
                if stat.S_ISREG(found.st_mode):
                    yield stem, path, found.st_size, found.st_mtime_ns


def without_extension(name: str) -> str:
    """A media's name without its extensions (`a.mov.mp4` has two), and without a dot at its end."""
    return _EXTENSIONS.sub("", name) or name


def checked_name(name: str) -> str:
    """A media's name, normalised, without its extension. Raises `InputError` if it leads out, or is no name."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith("/") or ".." in parts or not name.strip("./"):
        raise InputError(f"the annotations name the media {quoted(name)}, which leads out of the folder; mend them")
    if _UNUSABLE.search(name):
        raise InputError(f"the annotations name the media {quoted(name)}, with characters that no name has; mend them")
    return without_extension(posixpath.normpath(name))


def is_utf8(name: str) -> bool:
    """Whether a file's name is UTF-8; the system represents other bytes as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
