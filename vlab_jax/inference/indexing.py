"""Indexing a folder: what is new or changed is decoded, embedded and written; what is gone is deleted.

A file counts as unchanged while its size and time are what they were. Where its time has changed and its bytes have
not, it is not embedded again. A run that was killed leaves whole files in the index, and the next goes on with the
rest.
"""

import contextlib
import dataclasses
import os
import pathlib
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vlab_jax.datasets.media_index import is_utf8
from vlab_jax.errors import InputError, RunStopped
from vlab_jax.inference.clips import media_files, readable
from vlab_jax.inference.engine import Embedder
from vlab_jax.inference.search_index import File, Indexed, SearchIndex
from vlab_jax.inference.windows import Cut, DecodedWindows, Task, Window, read_windows

_COMMIT_SECONDS, _COMMIT_WINDOWS, _COMMITS_TO_TIDY = 20.0, 2048, 50


@dataclasses.dataclass
class Summary:
    """Counts of files: `touched` have other times and the same bytes, `failed` cannot be decoded, of `partial` some
    windows cannot; and of `windows` that were embedded."""

    new: int = 0
    changed: int = 0
    touched: int = 0
    unchanged: int = 0
    deleted: int = 0
    failed: int = 0
    partial: int = 0
    windows: int = 0


def folder_files(folder: pathlib.Path) -> dict[str, File]:
    """The media below a folder, by their path in it.

    Raises:
      InputError: there is no such folder, it has no media, or it cannot be listed.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give the one that holds the videos")
    found = {}
    for path in media_files(str(folder)):
        name = pathlib.PurePath(os.path.relpath(path, folder)).as_posix()
        with contextlib.suppress(OSError):  # a link that leads nowhere
            status = os.stat(path)
            if stat.S_ISREG(status.st_mode):
                found[name] = File(name, status.st_size, status.st_mtime_ns)
    return found


def index_folder(
    index: SearchIndex,
    embedder: Embedder,
    *,
    workers: int = 0,
    batch: int = 16,
    retry: bool = False,
    told: Callable[[str], object] = lambda line: None,
    progress: Callable[[Iterable[float], int], Iterable[float]] = lambda shares, total: shares,
) -> Summary:
    """Brings an index up to date with its folder.

    Args:
      index: one to write to.
      workers: processes that decode; with 0, this one does.
      batch: windows that are embedded at once.
      retry: files that could not be decoded are tried again, though they have not changed.
      told: gets a line for each file that cannot be decoded.
      progress: wraps the work that is done, piece by piece, in files: a piece of a long one is a fraction. Gets how
        many files there are to do.

    Raises:
      InputError: the folder has no media, or cannot be listed.
      RunStopped: the model's embeddings are no numbers.
    """
    folder, known = pathlib.Path(index.about.folder), index.files()
    media = folder_files(folder)
    summary = Summary()
    work = _plan(index, media, known, retry, summary, told)
    cut = Cut(index.about.window, index.about.stride, index.about.num_frames, index.about.size)
    tasks = (Task(file.file, str(folder / file.file), cut, _content(known, file.file)) for file in work)
    writer = _Writer(index, embedder, media, known, batch, summary, told)
    for _ in progress(map(writer.take, read_windows(tasks, workers)), len(work)):
        writer.commit_if_due()
    writer.commit()
    index.tidy()
    summary.failed = len(index.failures)
    return summary


def _plan(
    index: SearchIndex,
    media: Mapping[str, File],
    known: Mapping[str, File],
    retry: bool,
    summary: Summary,
    told: Callable[[str], object],
) -> list[File]:
    """The files to open; rows and failures of files that are gone are deleted."""
    gone = [file for file in known if file not in media]
    index.remove(gone)
    summary.deleted = len(gone)
    remembered = {} if retry else index.failures
    index.failures = {
        file: failure for file, failure in remembered.items() if file in media and _is_same(failure, media[file])
    }
    work = []
    for name, file in media.items():
        if name in index.failures:
            continue
        if not is_utf8(name):
            index.failures[name] = _failure(file, "its name is not UTF-8; rename it")
            told(f"{readable(name)}: {index.failures[name]['error']}")
        elif name in known and (known[name].size, known[name].time) == (file.size, file.time):
            summary.unchanged += 1
        else:
            work.append(file)
    index.save_failures()
    return work


def _failure(file: File, error: str) -> dict[str, Any]:
    return {"size": file.size, "time": file.time, "error": error}


def _is_same(failure: Mapping[str, Any], file: File) -> bool:
    return (failure.get("size"), failure.get("time")) == (file.size, file.time)


def _content(known: Mapping[str, File], file: str) -> str:
    return known[file].content if file in known else ""


@dataclasses.dataclass(eq=False)
class _Open:
    """A file of which not everything is read and embedded."""

    file: File
    windows: list[Window] = dataclasses.field(default_factory=list)
    vectors: list[np.ndarray] = dataclasses.field(default_factory=list)
    error: str = ""
    tasks: int = 1


class _Writer:
    """Takes what was read, embeds it in batches, and writes whole files from time to time."""

    def __init__(
        self,
        index: SearchIndex,
        embedder: Embedder,
        media: Mapping[str, File],
        known: Mapping[str, File],
        batch: int,
        summary: Summary,
        told: Callable[[str], object],
    ) -> None:
        self._index, self._embedder, self._media, self._known = index, embedder, media, known
        self._batch, self._summary, self._told = batch, summary, told
        self._open: dict[str, _Open] = {}
        self._waiting: list[tuple[_Open, Window, np.ndarray]] = []  # for the model
        self._done: list[_Open] = []
        self._committed, self._commits = time.monotonic(), 0

    def take(self, read: DecodedWindows) -> float:
        """Takes what has come of a task; which share of its file that is."""
        name = read.task.file
        if read.same:
            self._index.touch(self._media[name])
            self._summary.touched += 1
            return 1.0
        open_file = self._open.setdefault(name, _Open(self._media[name]))
        if read.content:
            open_file.file = dataclasses.replace(open_file.file, content=read.content)
            open_file.tasks = read.tasks
        open_file.error = read.error or open_file.error
        for window, frames in zip(read.windows, read.frames, strict=True):
            self._waiting.append((open_file, window, frames))
            if len(self._waiting) >= self._batch:
                self._embed()
        if not read.rest and read.task.last:
            self._done.append(self._open.pop(name))
        return 1 / open_file.tasks

    def commit_if_due(self) -> None:
        """Writes where there is much to write, or some that has waited long."""
        if not self._done:
            return
        late = time.monotonic() - self._committed > _COMMIT_SECONDS
        if late or sum(len(done.windows) for done in self._done) >= _COMMIT_WINDOWS:
            self.commit()

    def commit(self) -> None:
        """Writes the files that are done."""
        self._embed()
        good = [done for done in self._done if done.windows]
        files = [Indexed(done.file, done.windows, np.stack(done.vectors)) for done in good]
        self._fail([done for done in self._done if not done.windows])
        self._index.put(files, self._known)
        for done in good:
            self._count(done)
        self._done, self._committed = [], time.monotonic()
        self._commits += 1
        if self._commits % _COMMITS_TO_TIDY == 0:
            self._index.tidy()

    def _embed(self) -> None:
        if not self._waiting:
            return
        vectors = np.asarray(self._embedder.embed_videos([frames for _, _, frames in self._waiting]))
        if not np.isfinite(vectors).all():
            raise RunStopped("the model's embeddings are not finite numbers; nothing of them was written")
        for (open_file, window, _), vector in zip(self._waiting, vectors, strict=True):
            open_file.windows.append(window)
            open_file.vectors.append(vector)
        self._summary.windows += len(vectors)
        self._waiting = []

    def _fail(self, failed: Sequence[_Open]) -> None:
        """Remembers files of which nothing can be decoded; what they had been has no rows any more."""
        if not failed:
            return
        self._index.remove([each.file.file for each in failed if each.file.file in self._known])
        for each in failed:
            self._index.failures[each.file.file] = _failure(each.file, each.error)
            self._told(f"{each.file.file}: {each.error}")
        self._index.save_failures()

    def _count(self, done: _Open) -> None:
        self._summary.changed += done.file.file in self._known
        self._summary.new += done.file.file not in self._known
        if done.error:
            self._summary.partial += 1
            self._told(f"{done.file.file}: a part is left out: {done.error}")
