"""Finds the media of a name below a user's folders: flat or in subfolders, of any extension.

Names come from annotation files, paths from listing the folders: a name is compared with what is there and never made
into a path, so no annotation can lead out of the folders. Links that lie in the folders are the user's own: files are
taken, and directories are walked, each once, but for those that hold the folder itself.

The list is kept in an SQLite database, so that memory does not grow with it: in a temporary one, or in one on the disk
that `scan` goes on with after the process was killed.
"""

import hashlib
import os
import pathlib
import posixpath
import re
import sqlite3
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from vlab_jax.datasets.text_files import quoted
from vlab_jax.errors import InputError

VIDEOS = "mp4|m4v|mkv|avi|mov|mpg|mpeg|m1v|m2v|webm|gif|wmv|asf|flv|f4v|3gp|3g2|mts|m2ts|ts|ogv|vob|divx|rm|rmvb|mxf"
IMAGES = "jpg|jpeg|jfif|png|webp|bmp|tif|tiff|avif"
_EXTENSIONS = re.compile(rf"(\.({VIDEOS}|{IMAGES})?)+\Z", re.IGNORECASE)
_IMAGE = re.compile(rf"\.({IMAGES})\Z", re.IGNORECASE)
_UNUSABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_COMMIT_EVERY = 100_000  # files

_TABLES = """
CREATE TABLE IF NOT EXISTS directory (
    number INTEGER PRIMARY KEY, real TEXT UNIQUE, shown TEXT, folder INTEGER, listed INTEGER DEFAULT 0, time INTEGER);
CREATE TABLE IF NOT EXISTS media (
    number INTEGER PRIMARY KEY, stem TEXT, suffix TEXT, directory INTEGER, size INTEGER, time INTEGER);
"""
_MEDIA = (
    "SELECT media.number, shown || '/' || stem || suffix, size, media.time FROM media "
    "JOIN directory ON directory.number = media.directory"
)


class Media(NamedTuple):
    """A media file: its number in the index, its path, its bytes, and when it was changed (in ns)."""

    number: int
    path: str
    size: int
    time: int


def without_extension(name: str) -> str:
    """A media's name without extension; of several (`a.mov.mp4`) without each, and without a dot that ends it."""
    return _EXTENSIONS.sub("", name) or name


class MediaIndex:
    """The media files below some folders, by name.

    Args:
      folders: walked in this order; of media of one name, those of the first come first.
      database: where the list is kept; None: in a temporary file.

    Attributes:
      files: how many media files have been found.
    """

    def __init__(self, folders: Sequence[pathlib.Path], database: sqlite3.Connection | None = None) -> None:
        self.folders = [os.path.abspath(folder) for folder in folders]
        self._real = [os.path.realpath(folder) for folder in folders]
        self.database = database or sqlite3.connect("", check_same_thread=False)
        self.database.executescript(_TABLES)
        (self.files,) = self.database.execute("SELECT count(*) FROM media").fetchone()

    def scan(self, update: Callable[[int], object] = lambda files: None) -> "MediaIndex":
        """Lists the folders, or what is left of them; afterwards, `find` finds.

        Args:
          update: told how many more media files have been found.
        """
        for number, (real, shown) in enumerate(zip(self._real, self.folders, strict=True)):
            self._add_directory(real, shown, number)
        pending = 0
        while True:
            rows = self.database.execute(
                "SELECT number, real, shown, folder FROM directory WHERE NOT listed ORDER BY number LIMIT 1000"
            ).fetchall()
            if not rows:
                break
            for row in rows:
                found = self._list(*row)
                update(found)
                self.files += found
                pending += found
                if pending >= _COMMIT_EVERY:
                    self.database.commit()
                    pending = 0
        self.database.execute("CREATE INDEX IF NOT EXISTS media_stem ON media (stem)")
        self.database.commit()
        return self

    def changed(self) -> bool:
        """Whether a directory that was listed has been changed since, by files that were added or taken away."""
        for shown, time in self.database.execute("SELECT shown, time FROM directory WHERE listed"):
            try:
                if os.stat(shown).st_mtime_ns != time:
                    return True
            except OSError:
                return True
        return False

    def find(self, *names: str) -> Media | None:
        """The media of the first of these names that there are any of.

        A name is that of a file without its extension; one with folders, as in `00017/000170042`, has to stand at the
        end of the file's path. Where several files have it, the first of these counts: one that is not empty; one that
        has the extension, where the name has one; one of the first folder; one that stands where the name says, counted
        from the folder; a video; one in fewer subfolders; the first by path.

        Raises:
          InputError: a name leads out of the folder.
        """
        for name in names:
            found = list(self._named(checked_name(name), name))
            if found:
                return min(found)[-1]
        return None

    def fingerprint(self) -> str:
        """A short hash of the path, size and time of every media file, in whatever order they are listed."""
        total = 0
        for media in self:
            digest = hashlib.blake2b(f"{media.path}\0{media.size}\0{media.time}".encode(), digest_size=16).digest()
            total += int.from_bytes(digest)
        return f"{total % 2**128:032x}"

    def __iter__(self) -> Iterator[Media]:
        return map(Media._make, self.database.execute(_MEDIA))

    def __getitem__(self, number: int) -> Media:
        return Media._make(self.database.execute(f"{_MEDIA} WHERE media.number = ?", (number,)).fetchone())

    def _named(self, name: str, given: str) -> Iterator[tuple[bool, bool, int, bool, bool, int, str, Media]]:
        """The media of a name, each behind what it is ranked by; `given` is the name before its extension was lost."""
        rows = self.database.execute(
            "SELECT media.number, shown, folder, suffix, size, media.time FROM media "
            "JOIN directory ON directory.number = media.directory WHERE stem = ?",
            (posixpath.basename(name),),
        )
        for number, shown, folder, suffix, size, time in rows.fetchall():
            stem = f"{shown}/{posixpath.basename(name)}"
            inside = os.path.relpath(stem, self.folders[folder])
            if f"/{inside}".endswith(f"/{name}"):
                media = Media(number, stem + suffix, size, time)
                where = (folder, inside != name)
                image, depth = bool(_IMAGE.search(suffix)), inside.count("/")
                yield not size, inside + suffix != given, *where, image, depth, media.path, media

    def _list(self, number: int, real: str, shown: str, folder: int) -> int:
        """Lists one directory; returns how many media files it holds."""
        found = []
        try:
            # Taken before the listing: what is added meanwhile changes it.
            time = os.stat(real).st_mtime_ns
            with os.scandir(real) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if not is_utf8(entry.name):
                        raise InputError(f"the name of {shown}/{entry.name!a} is not UTF-8; rename it")
                    if entry.is_dir():
                        below = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                        self._add_directory(below, f"{shown}/{entry.name}", folder)
                    elif match := _EXTENSIONS.search(entry.name):
                        found += _row(entry, match.start(), number)
        except OSError as error:
            raise InputError(f"{shown} cannot be listed ({error.strerror}); make it readable") from error
        self.database.executemany(
            "INSERT INTO media (stem, suffix, directory, size, time) VALUES (?, ?, ?, ?, ?)", found
        )
        self.database.execute("UPDATE directory SET listed = 1, time = ? WHERE number = ?", (time, number))
        return len(found)

    def _add_directory(self, real: str, shown: str, folder: int) -> None:
        """Notes a directory that is to be listed, unless it is noted already or holds a folder."""
        if not any(each.startswith(real.rstrip("/") + "/") for each in self._real):
            row = (real, shown, folder)
            self.database.execute("INSERT OR IGNORE INTO directory (real, shown, folder) VALUES (?, ?, ?)", row)


def checked_name(name: str) -> str:
    """The name of a media, normalised, without its extension. Raises InputError where it leads out, or is no name."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith("/") or ".." in parts or not name.strip("./"):
        raise InputError(f"the annotations name the media {quoted(name)}, which leads out of the folder; mend them")
    if _UNUSABLE.search(name):
        raise InputError(f"the annotations name the media {quoted(name)}, with characters that no name has; mend them")
    return without_extension(posixpath.normpath(name))


def is_utf8(name: str) -> bool:
    """Whether the name can be written down; the system hands out other bytes as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _row(entry: os.DirEntry, cut: int, directory: int) -> list[tuple[str, str, int, int, int]]:
    """The row of a file, if it is one; a pipe is none, nor is a link that leads nowhere."""
    try:
        found = entry.stat()
    except OSError:
        return []
    name = entry.name
    is_media = cut and stat.S_ISREG(found.st_mode)
    return [(name[:cut], name[cut:], directory, found.st_size, found.st_mtime_ns)] if is_media else []
