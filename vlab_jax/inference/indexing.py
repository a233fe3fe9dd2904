"""Brings the index of a folder up to date: embeds files that are new or have changed, and deletes those that are gone.

A file counts as unchanged while its size and time are the same. If its time has changed and its bytes have not, only
the time is updated. A run that is killed leaves whole files in the index, and the next run goes on with the others.
"""

import collections
import contextlib
import dataclasses
import os
import pathlib
import stat
import sys
import time
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from vlab_jax.datasets.media_index import is_utf8
from vlab_jax.errors import InputError, RunStopped
from vlab_jax.inference.clips import DecodedWindows, FrameShape, Window, WindowTask, decode_windows, media_files
from vlab_jax.inference.search_index import EmbeddedFile, MediaFile, SearchIndex

_COMMIT_SECONDS, _COMMIT_WINDOWS, _COMMITS_TO_OPTIMIZE = 20.0, 2048, 50
_BAR = "{percentage:3.0f}%|{bar}| {n:.1f}/{total} files [{elapsed}<{remaining}]"


def index_folder(
    index: SearchIndex, embed: Callable[[list[np.ndarray]], np.ndarray], workers: int, batch: int, retry: bool = False
) -> str:
    """Brings an index of `writable_index` up to date; returns a line that counts files and embedded windows.

    Standard error gets a bar, and a line for each file that cannot be decoded.

    Args:
      embed: embeds a batch of decoded windows, uint8 `[T, S, S, 3]` each, as unit vectors `[W, E]`.
      workers: processes that decode; with 0, this one does.
      retry: try again to decode files that have failed and have not changed.

    Raises InputError where the folder has no media, and RunStopped where the model's embeddings are not finite.
    """
    folder, info = pathlib.Path(index.info.folder), index.info
    indexer = _Indexer(index, embed, batch)
    files = indexer.plan(retry)
    tasks = (WindowTask(each.file, str(folder / each.file), indexer.known_hash(each.file)) for each in files)
    decoded = decode_windows(tasks, info.window, info.stride, FrameShape(info.num_frames, info.size), workers)
    interval = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(total=len(files), disable=not files, bar_format=_BAR, mininterval=interval) as bar:
        for each in decoded:
            indexer.take(each)
            bar.update(each.task.share)
            indexer.commit_if_due()
    indexer.commit()
    index.optimize()
    names = ("new", "changed", "touched", "unchanged", "deleted")
    counts = [f"{indexer.counts[name]} {name}" for name in names if indexer.counts[name]]
    return f"files: {', '.join(counts) or 'none indexed'}; windows embedded: {indexer.counts['windows']}"


def folder_files(folder: pathlib.Path) -> dict[str, MediaFile]:
    """The media below a folder, by their path in it. Raises InputError where there is none, or it cannot be listed."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; name the folder that holds the videos")
    found = {}
    for path in media_files(str(folder)):
        name = pathlib.PurePath(os.path.relpath(path, folder)).as_posix()
        with contextlib.suppress(OSError):  # a link that leads nowhere
            status = os.stat(path)
            if stat.S_ISREG(status.st_mode):
                found[name] = MediaFile(name, status.st_size, status.st_mtime_ns)
    return found


def printable(name: str) -> str:
    """A file name that any terminal accepts, also where it is not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


class _Indexer:
    """Embeds decoded windows in batches, and writes whole files from time to time.

    `counts` is of embedded `windows` and of files; `touched` files have another time and the same bytes.
    """

    def __init__(self, index: SearchIndex, embed: Callable[[list[np.ndarray]], np.ndarray], batch: int) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self._index, self._embed, self._batch = index, embed, batch
        self._known = index.files()
        self._media = folder_files(pathlib.Path(index.info.folder))
        self._unfinished: dict[str, EmbeddedFile] = {}
        self._to_embed: list[tuple[EmbeddedFile, Window, np.ndarray]] = []
        self._decoded: list[EmbeddedFile] = []  # files all windows of which are decoded, and perhaps not embedded
        self._last_commit, self._commits = time.monotonic(), 0

    def plan(self, retry: bool) -> list[MediaFile]:
        """The files to decode. Rows and failures of files that are gone are deleted."""
        gone = [file for file in self._known if file not in self._media]
        self._index.remove(gone)
        self.counts["deleted"] = len(gone)
        old, self._index.failures = self._index.failures, {}
        to_decode = []
        for name, file in self._media.items():
            failure, known = old.get(name), self._known.get(name)
            if not retry and failure and (failure.get("size"), failure.get("time")) == (file.size, file.time):
                self._index.failures[name] = failure
            elif not is_utf8(name):
                self._add_failure(file, "its name is not UTF-8; rename it")
            elif known and (known.size, known.time) == (file.size, file.time):
                self.counts["unchanged"] += 1
            else:
                to_decode.append(file)
        self._index.save_failures()
        return to_decode

    def known_hash(self, file: str) -> str:
        """The hash of a file's bytes when it was indexed; empty for a new file."""
        return self._known[file].content if file in self._known else ""

    def take(self, decoded: DecodedWindows) -> None:
        """Takes the result of a task."""
        name = decoded.task.file
        if decoded.content and decoded.content == self.known_hash(name):
            self._index.touch(self._media[name])
            self.counts["touched"] += 1
            return
        embedded = self._unfinished.setdefault(name, EmbeddedFile(self._media[name]))
        if decoded.content:
            embedded.file = dataclasses.replace(embedded.file, content=decoded.content)
        embedded.error = decoded.error or embedded.error
        for window, frames in decoded.frames:
            self._to_embed.append((embedded, window, frames))
            if len(self._to_embed) >= self._batch:
                self._embed_batch()
        if decoded.task.is_last:
            self._decoded.append(self._unfinished.pop(name))

    def commit_if_due(self) -> None:
        """Commits if there is much to write, or if the last commit was long ago."""
        late = time.monotonic() - self._last_commit > _COMMIT_SECONDS
        if self._decoded and (late or sum(len(each.windows) for each in self._decoded) >= _COMMIT_WINDOWS):
            self.commit()

    def commit(self) -> None:
        """Writes the files that are decoded, and records those of which nothing can be decoded."""
        self._embed_batch()
        self._index.remove([each.file.file for each in self._decoded if each.file.file in self._known])
        self._index.add([each for each in self._decoded if each.windows])
        for each in self._decoded:
            name = each.file.file
            if not each.windows:
                self._add_failure(each.file, each.error)
                continue
            self.counts["changed" if name in self._known else "new"] += 1
            if each.error:
                tqdm.write(f"{name}: a part is left out: {each.error}", file=sys.stderr)
        self._index.save_failures()
        self._decoded, self._last_commit = [], time.monotonic()
        self._commits += 1
        if self._commits % _COMMITS_TO_OPTIMIZE == 0:
            self._index.optimize()

    def _embed_batch(self) -> None:
        if not self._to_embed:
            return
        vectors = np.asarray(self._embed([frames for _, _, frames in self._to_embed]))
        if not np.isfinite(vectors).all():
            raise RunStopped("the model's embeddings are not finite numbers; they were not written")
        for (embedded, window, _), vector in zip(self._to_embed, vectors, strict=True):
            embedded.windows.append(window)
            embedded.vectors.append(vector)
        self.counts["windows"] += len(vectors)
        self._to_embed = []

    def _add_failure(self, file: MediaFile, error: str) -> None:
        self._index.failures[file.file] = {"size": file.size, "time": file.time, "error": error}
        tqdm.write(f"{printable(file.file)}: {error}", file=sys.stderr)
