"""An index of videos on the disk: windows of files with their embeddings, and the nearest of them to a vector.

The directory holds

    index.json      which model made the index, of which folder, and how files were cut
    windows.lance   a table of LanceDB: a row for each window
    failures.json   files that could not be decoded, with the reason
    index.lock      held by the process that writes

Each write to the table makes a new version of it in one move, so a kill leaves the version before or the one after,
and who searches meanwhile sees one of them. All windows of a file are written by one such move. docs/search.md tells
what the files mean to a user, and experiments/search_speed why it is this library, this kind of vector index and these
numbers.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
from jaxtyping import Float
from lancedb.index import IvfFlat

from vlab_jax.errors import InputError
from vlab_jax.inference.windows import Window, best_apart
from vlab_jax.runtime.disk import only_holder, write_json

ABOUT, FAILURES, LOCK, TABLE = "index.json", "failures.json", "index.lock", "windows"
FORMAT = 1
# Below so many rows all are compared; above, a quarter of the partitions: recall@10 0.97 in 17 ms of 200,000 rows.
ROWS_TO_PARTITION, ROWS_A_PARTITION, FEWEST_PROBES = 5_000, 1_600, 8
_PARTITIONED_ANEW = 2  # when there are so many times the rows
_OLD_VERSIONS = datetime.timedelta(minutes=10)  # are kept for who reads them


@dataclasses.dataclass(frozen=True)
class About:
    """What made an index.

    Attributes:
      model: where it was loaded from, for messages alone; `fingerprint` is what tells models apart.
      folder: the absolute path of the folder whose files are indexed.
      num_frames, size, width: frames of a window, pixels of their side, and of the embedding.
      window, stride: seconds.
      partitioned: rows when the vector index was trained; 0: there is none.
    """

    model: str
    fingerprint: str
    folder: str
    num_frames: int
    size: int
    width: int
    window: float
    stride: float
    partitioned: int = 0
    format: int = FORMAT


@dataclasses.dataclass(frozen=True)
class File:
    """A media file as it was when it was indexed: its path within the folder, bytes, time (in ns) and their hash."""

    file: str
    size: int
    time: int
    content: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Indexed:
    """A file with its windows and their embeddings, unit vectors `[W, E]`."""

    file: File
    windows: Sequence[Window]
    vectors: Float[np.ndarray, "W E"]


@dataclasses.dataclass(frozen=True)
class Hit:
    """A window that was found; `score` is the cosine."""

    file: str
    start: float
    end: float
    score: float


class SearchIndex:
    """An index in a directory. Make one by `open_index`, or to write by `writable_index`.

    Attributes:
      about: what made it.
      failures: files that cannot be decoded, by path: size, time and reason.
    """

    def __init__(self, directory: pathlib.Path, about: About, table: Any) -> None:
        self.directory, self.about, self._table = directory, about, table
        self.failures: dict[str, dict[str, Any]] = _read_json(directory / FAILURES) or {}

    def __len__(self) -> int:
        with _explained(self.directory, "read"):
            return self._table.count_rows()

    def files(self) -> dict[str, File]:
        """The files that have rows, by path."""
        with _explained(self.directory, "read"):
            rows = self._table.search().select(["file", "size", "time", "content"]).to_arrow()
        found = rows.group_by("file").aggregate([("size", "max"), ("time", "max"), ("content", "max")])
        columns = ("file", "size_max", "time_max", "content_max")
        return {row[0]: File(*row) for row in zip(*(found[name].to_pylist() for name in columns), strict=True)}

    def holds(self, file: str) -> bool:
        """Whether a file has rows."""
        with _explained(self.directory, "read"):
            return self._table.count_rows(f"file = {_quoted(file)}") > 0

    def check_model(self, fingerprint: str, model: str) -> None:
        """Raises InputError where another model made the index."""
        if fingerprint != self.about.fingerprint:
            raise InputError(
                f"the index in {self.directory} was made by the model {self.about.model} "
                f"({self.about.fingerprint[:8]}), and {model} ({fingerprint[:8]}) embeds differently; give that one, "
                "or make an index in another directory"
            )

    def check_filled(self) -> None:
        """Raises InputError where there is nothing to search."""
        if not len(self):
            raise InputError(f"the index in {self.directory} is empty; fill it by python -m vlab_jax.predict index")

    def put(self, files: Sequence[Indexed], known: Mapping[str, File]) -> None:
        """Writes files, in place of the rows that those in `known` have. Killed in between, they are without rows."""
        if not files:
            return
        self.remove([each.file.file for each in files if each.file.file in known])
        with _explained(self.directory, "written"):
            self._table.add(_rows(files, self.about.width))

    def touch(self, file: File) -> None:
        """Notes a file's new time; its content is the same."""
        with _explained(self.directory, "written"):
            self._table.update(where=f"file = {_quoted(file.file)}", values={"size": file.size, "time": file.time})

    def remove(self, files: Sequence[str]) -> None:
        """Deletes the rows of files."""
        with _explained(self.directory, "written"):
            for first in range(0, len(files), 1000):
                self._table.delete(f"file IN ({', '.join(map(_quoted, files[first : first + 1000]))})")

    def save_failures(self) -> None:
        """Writes what is in `failures`."""
        with _explained(self.directory, "written"):
            write_json(self.directory / FAILURES, self.failures)

    def tidy(self) -> None:
        """Joins what many writes have left, and partitions the vectors where they have become many."""
        rows = len(self)
        with _explained(self.directory, "written"):
            if rows >= max(ROWS_TO_PARTITION, _PARTITIONED_ANEW * self.about.partitioned):
                partitions = IvfFlat(distance_type="dot", num_partitions=rows // ROWS_A_PARTITION)
                self._table.create_index("vector", config=partitions, replace=True)
                self.about = dataclasses.replace(self.about, partitioned=rows)
                write_json(self.directory / ABOUT, dataclasses.asdict(self.about))
            self._table.optimize(cleanup_older_than=_OLD_VERSIONS)

    def nearest(self, vector: Float[np.ndarray, " E"], count: int) -> list[Hit]:
        """The `count` windows that are most similar to a unit vector, best first, by cosine."""
        with _explained(self.directory, "read"):
            rows = self._asked(vector, count).to_arrow().to_pylist()
        return [Hit(row["file"], row["start"], row["end"], 1.0 - row["_distance"]) for row in rows]

    def _asked(self, vector: Float[np.ndarray, " E"], count: int) -> Any:
        asked = self._table.search(np.asarray(vector, np.float32)).distance_type("dot").limit(count)
        if self.about.partitioned:
            partitions = self.about.partitioned // ROWS_A_PARTITION
            asked = asked.nprobes(max(FEWEST_PROBES, math.ceil(partitions / 4)))
        return asked.select(["file", "start", "end", "_distance"])

    def search(self, vector: Float[np.ndarray, " E"], top: int) -> list[Hit]:
        """The `top` best windows, none of which shows a moment that a better one of the same file shows."""
        asked = top
        while True:
            found = self.nearest(vector, asked)
            kept = best_apart(found, lambda hit: (hit.file, Window(hit.start, hit.end)))
            if len(kept) >= top or len(found) < asked:
                return kept[:top]
            asked *= 2


def open_index(directory: pathlib.Path) -> SearchIndex:
    """An index to search; nothing is written.

    Raises:
      InputError: there is none, or it cannot be read.
    """
    about = _about(directory)
    if about is None:
        raise InputError(f"there is no index in {directory}; make one by python -m vlab_jax.predict index")
    with _explained(directory, "read"):
        database = lancedb.connect(directory)
        try:
            return SearchIndex(directory, about, database.open_table(TABLE))
        except ValueError as error:  # the process that made it was ended before its first row
            if "not found" not in str(error):
                raise
            raise InputError(
                f"the index in {directory} is empty; finish it by python -m vlab_jax.predict index"
            ) from None


@contextlib.contextmanager
def writable_index(directory: pathlib.Path, wanted: About, moved: bool = False) -> Iterator[SearchIndex]:
    """An index to write, made where there is none, and locked.

    Args:
      wanted: what is to make it, which has to be what has made it.
      moved: the folder is the same as before under another path.

    Raises:
      InputError: another process writes to it, it was made otherwise, or it cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the index directory {directory} cannot be made: {error.strerror}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(f"the index in {directory} cannot be written to (searching in it works); name another --index")
    others = {entry.name for entry in directory.iterdir()} - {LOCK, f"{ABOUT}.tmp"}
    if others and ABOUT not in others:
        raise InputError(f"{directory} holds other things than an index; name a new directory, or an empty one")
    taken = f"another process is writing to the index in {directory}; wait until it ends, or name another --index"
    with only_holder(directory / LOCK, taken):
        about = _about(directory)
        if about is not None:
            _check_same(directory, about, wanted, moved)
        if about is None or about.folder != wanted.folder:
            about = dataclasses.replace(about or wanted, folder=wanted.folder)
            with _explained(directory, "written"):
                write_json(directory / ABOUT, dataclasses.asdict(about))
        with _explained(directory, "written"):
            table = lancedb.connect(directory).create_table(TABLE, schema=_schema(about.width), exist_ok=True)
        yield SearchIndex(directory, about, table)


def recorded(directory: pathlib.Path) -> About | None:
    """What made the index in a directory, if there is one. Raises InputError where it cannot be read."""
    return _about(directory)


def _check_same(directory: pathlib.Path, about: About, wanted: About, moved: bool) -> None:
    SearchIndex(directory, about, None).check_model(wanted.fingerprint, wanted.model)
    if (about.window, about.stride) != (wanted.window, wanted.stride):
        raise InputError(
            f"the index in {directory} was made with --window={about.window:g} --stride={about.stride:g}; leave them "
            "out, or make an index in another directory"
        )
    if about.folder != wanted.folder and not moved:
        raise InputError(
            f"the index in {directory} is of {about.folder}, not of {wanted.folder}; name another --index, or give "
            "--moved if it is the same folder in another place"
        )


def _about(directory: pathlib.Path) -> About | None:
    fields = _read_json(directory / ABOUT)
    if fields is None:
        return None
    if fields.get("format") != FORMAT or fields.keys() != {field.name for field in dataclasses.fields(About)}:
        raise InputError(
            f"{directory / ABOUT} is of another version (format {fields.get('format')}, here {FORMAT}); "
            "make the index anew, in another directory"
        )
    return About(**fields)


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise InputError(f"{path.parent} is a file; an index is a directory") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); make the index anew, in another directory") from error


def _schema(width: int) -> pa.Schema:
    texts, numbers = pa.string(), pa.int64()
    fields = {"file": texts, "start": pa.float64(), "end": pa.float64(), "size": numbers, "time": numbers}
    return pa.schema(
        [
            *(pa.field(name, kind, nullable=False) for name, kind in fields.items()),
            pa.field("content", texts, nullable=False),
            pa.field("vector", pa.list_(pa.float32(), width), nullable=False),
        ]
    )


def _rows(files: Iterable[Indexed], width: int) -> pa.Table:
    rows = [(each.file, window) for each in files for window in each.windows]
    vectors = np.concatenate([np.asarray(each.vectors, np.float32) for each in files]).reshape(-1)
    columns = [
        [file.file for file, _ in rows],
        [window.start for _, window in rows],
        [window.end for _, window in rows],
        [file.size for file, _ in rows],
        [file.time for file, _ in rows],
        [file.content for file, _ in rows],
        pa.FixedSizeListArray.from_arrays(pa.array(vectors), width),
    ]
    return pa.table(columns, schema=_schema(width))


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@contextlib.contextmanager
def _explained(directory: pathlib.Path, done: str) -> Iterator[None]:
    """Whatever the library raises becomes one line."""
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()).removeprefix("lance error: ").split(" at path ")[0]
        raise InputError(f"the index in {directory} cannot be {done}: {reason[:300]}") from error
