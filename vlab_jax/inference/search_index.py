"""An index of videos on the disk: windows of files with their embeddings, and the nearest of them to a vector.

The directory holds

    index.json      which model made the index, of which folder, and how files were cut
    windows.lance   a table of LanceDB: a row for each window
    failures.json   files that could not be decoded, with the reason
    index.lock      held by the process that writes

Each write to the table makes a new version of it in one move, with all windows of a file: a kill leaves the version
before or the one after, and a search sees one of them. experiments/search_speed says why it is this library and these
numbers.

Dimensions: `W` windows, `E` embedding width.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
from jaxtyping import Float
from lancedb.index import IvfFlat

from vlab_jax.errors import InputError
from vlab_jax.inference.clips import Window
from vlab_jax.runtime.disk import exclusive_lock, write_json

INFO, FAILURES, LOCK, TABLE = "index.json", "failures.json", "index.lock", "windows"
FORMAT = 1
# A query is compared with all rows while there are fewer than these; above, with a quarter of the partitions:
# recall@10 is 0.97 in 17 ms of 200,000 rows.
ROWS_TO_PARTITION, ROWS_PER_PARTITION, MIN_PROBES = 5_000, 1_600, 8
_REPARTITION_GROWTH = 2  # the rows are partitioned anew when there are so many times as many
_KEEP_OLD_VERSIONS = datetime.timedelta(minutes=10)  # for processes that read them
_MIN_SPAN = 0.05  # seconds: anything shorter is an image
_TOLERANCE = 1e-6  # seconds: windows that share less than this do not overlap
_FILES_PER_DELETE = 1000
_ANEW = "make the index anew, in another directory"


@dataclasses.dataclass(frozen=True)
class IndexInfo:
    """How an index was made; the fields of `index.json`."""

    model: str  # the place it was loaded from, for messages alone; `fingerprint` tells models apart
    fingerprint: str
    folder: str  # the absolute path
    num_frames: int
    size: int  # pixels of a frame's side
    width: int  # `E`
    window: float  # seconds, as `stride`
    stride: float
    partitioned: int = 0  # the number of rows when the vectors were partitioned; 0: they are not
    format: int = FORMAT


@dataclasses.dataclass(frozen=True)
class MediaFile:
    """A media file when it was indexed: its path within the folder, bytes, time (in ns) and a hash of its content."""

    file: str
    size: int
    time: int
    content: str = ""


@dataclasses.dataclass(eq=False)
class EmbeddedFile:
    """A file, its windows and their embeddings, unit vectors `[E]`; `error` says why some windows are missing."""

    file: MediaFile
    windows: list[Window] = dataclasses.field(default_factory=list)
    vectors: list[np.ndarray] = dataclasses.field(default_factory=list)
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Hit:
    """A window that a search found, in seconds; `score` is the cosine."""

    file: str
    start: float
    end: float
    score: float

    @property
    def span(self) -> str:
        """The time span, as in `0:10.0-0:20.0`; empty for an image."""
        return f"{timestamp(self.start)}-{timestamp(self.end)}" if self.end - self.start >= _MIN_SPAN else ""


def timestamp(seconds: float) -> str:
    """Seconds as `0:07.5`, `12:03.0` or `1:02:03.0`."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}:{minutes:02d}" if hours else str(minutes)) + f":{rest // 10:02d}.{rest % 10}"


def without_overlaps(hits: Iterable[Hit]) -> list[Hit]:
    """Non-maximum suppression: of hits, best first, those that overlap no better one of the same file."""
    kept: list[Hit] = []
    for hit in hits:
        better = [other for other in kept if other.file == hit.file]
        if not any(min(hit.end, other.end) - max(hit.start, other.start) > _TOLERANCE for other in better):
            kept.append(hit)
    return kept


class SearchIndex:
    """An index in a directory; `open_index` opens it to search, `writable_index` to write.

    `failures` are the files that cannot be decoded, by path: size, time and reason.
    """

    def __init__(self, directory: pathlib.Path, info: IndexInfo, table: Any) -> None:
        self.directory, self.info, self._table = directory, info, table
        self.failures: dict[str, dict[str, Any]] = _read_json(directory / FAILURES) or {}

    def __len__(self) -> int:
        with _one_line_errors(self.directory, "read"):
            return self._table.count_rows()

    def files(self) -> dict[str, MediaFile]:
        """The files that have rows, by path."""
        with _one_line_errors(self.directory, "read"):
            rows = self._table.search().select(["file", "size", "time", "content"]).to_arrow()
        found = rows.group_by(rows.column_names).aggregate([])  # all rows of a file have the same values
        return {row["file"]: MediaFile(**row) for row in found.to_pylist()}

    def check(self, fingerprint: str, model: str) -> None:
        """Raises InputError where another model made the index, or there is nothing to search."""
        _check_model(self.directory, self.info, fingerprint, model)
        if not len(self):
            raise InputError(f"the index in {self.directory} is empty; fill it by python -m vlab_jax.predict index")

    def add(self, files: Iterable[EmbeddedFile]) -> None:
        """Adds rows for the windows of files that have none."""
        rows = [
            {**dataclasses.asdict(each.file), **window._asdict(), "vector": np.asarray(vector, np.float32)}
            for each in files
            for window, vector in zip(each.windows, each.vectors, strict=True)
        ]
        if rows:
            with _one_line_errors(self.directory, "written"):
                self._table.add(pa.Table.from_pylist(rows, schema=_schema(self.info.width)))

    def touch(self, file: MediaFile) -> None:
        """Writes the new time of a file whose content is the same."""
        with _one_line_errors(self.directory, "written"):
            self._table.update(where=f"file = {_quoted(file.file)}", values={"size": file.size, "time": file.time})

    def remove(self, files: Sequence[str]) -> None:
        """Deletes the rows of files."""
        with _one_line_errors(self.directory, "written"):
            for first in range(0, len(files), _FILES_PER_DELETE):
                quoted = ", ".join(map(_quoted, files[first : first + _FILES_PER_DELETE]))
                self._table.delete(f"file IN ({quoted})")

    def save_failures(self) -> None:
        """Writes `failures`."""
        with _one_line_errors(self.directory, "written"):
            write_json(self.directory / FAILURES, self.failures)

    def optimize(self) -> None:
        """Joins the fragments of many writes, and partitions the vectors once there are many."""
        rows = len(self)
        with _one_line_errors(self.directory, "written"):
            if rows >= max(ROWS_TO_PARTITION, _REPARTITION_GROWTH * self.info.partitioned):
                partitions = IvfFlat(distance_type="dot", num_partitions=rows // ROWS_PER_PARTITION)
                self._table.create_index("vector", config=partitions, replace=True)
                self.info = dataclasses.replace(self.info, partitioned=rows)
                write_json(self.directory / INFO, dataclasses.asdict(self.info))
            self._table.optimize(cleanup_older_than=_KEEP_OLD_VERSIONS)

    def nearest(self, vector: Float[np.ndarray, " E"], count: int) -> list[Hit]:
        """The `count` windows that are most similar to a unit vector by cosine, best first."""
        with _one_line_errors(self.directory, "read"):
            rows = self._query(vector, count).to_arrow().to_pylist()
        return [Hit(row["file"], row["start"], row["end"], 1.0 - row["_distance"]) for row in rows]

    def _query(self, vector: Float[np.ndarray, " E"], count: int) -> Any:
        query = self._table.search(np.asarray(vector, np.float32)).distance_type("dot").limit(count)
        if self.info.partitioned:
            partitions = self.info.partitioned // ROWS_PER_PARTITION
            query = query.nprobes(max(MIN_PROBES, math.ceil(partitions / 4)))
        return query.select(["file", "start", "end", "_distance"])

    def search(self, vector: Float[np.ndarray, " E"], top: int) -> list[Hit]:
        """The `top` best windows, of which no two show the same moment of a file."""
        count = top
        while True:
            found = self.nearest(vector, count)
            kept = without_overlaps(found)
            if len(kept) >= top or len(found) < count:
                return kept[:top]
            count *= 2


def read_info(directory: pathlib.Path) -> IndexInfo | None:
    """How the index in a directory was made; None where there is no index. Raises InputError if it cannot be read."""
    fields = _read_json(directory / INFO)
    if fields is None:
        return None
    version = fields.get("format")
    if version != FORMAT or fields.keys() != {field.name for field in dataclasses.fields(IndexInfo)}:
        raise InputError(f"{directory / INFO} is of another version (format {version}, here {FORMAT}); {_ANEW}")
    return IndexInfo(**fields)


def open_index(directory: pathlib.Path) -> SearchIndex:
    """Opens an index to search; writes nothing. Raises InputError where there is none, or it cannot be read."""
    info = read_info(directory)
    if info is None:
        raise InputError(f"there is no index in {directory}; make one by python -m vlab_jax.predict index")
    with _one_line_errors(directory, "read"):
        return SearchIndex(directory, info, lancedb.connect(directory).open_table(TABLE))


@contextlib.contextmanager
def writable_index(directory: pathlib.Path, info: IndexInfo, moved: bool = False) -> Iterator[SearchIndex]:
    """Opens an index to write, or makes one, and holds its lock.

    Raises InputError where another process writes to it, it cannot be written to, or it was not made as `info` says,
    but for another path of the folder if that has `moved`.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the index directory {directory} cannot be made: {error.strerror}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(f"the index in {directory} cannot be written to (searching in it works); name another --index")
    others = {entry.name for entry in directory.iterdir()} - {LOCK, f"{INFO}.tmp"}
    if others and INFO not in others:
        raise InputError(f"{directory} holds other things than an index; name a new directory, or an empty one")
    taken = f"another process is writing to the index in {directory}; wait until it ends, or name another --index"
    with exclusive_lock(directory / LOCK, taken):
        existing = read_info(directory)
        if existing:
            _check_compatible(directory, existing, info, moved)
        info = dataclasses.replace(existing or info, folder=info.folder)
        with _one_line_errors(directory, "written"):
            if info != existing:
                write_json(directory / INFO, dataclasses.asdict(info))
            table = lancedb.connect(directory).create_table(TABLE, schema=_schema(info.width), exist_ok=True)
        yield SearchIndex(directory, info, table)


def _check_model(directory: pathlib.Path, info: IndexInfo, fingerprint: str, model: str) -> None:
    if fingerprint != info.fingerprint:
        raise InputError(
            f"the index in {directory} was made by the model {info.model} ({info.fingerprint[:8]}), and {model} "
            f"({fingerprint[:8]}) embeds differently; name the first one, or make an index in another directory"
        )


def _check_compatible(directory: pathlib.Path, existing: IndexInfo, info: IndexInfo, moved: bool) -> None:
    _check_model(directory, existing, info.fingerprint, info.model)
    if (existing.window, existing.stride) != (info.window, info.stride):
        raise InputError(
            f"the index in {directory} was made with --window={existing.window:g} --stride={existing.stride:g}; leave "
            "them out, or make an index in another directory"
        )
    if existing.folder != info.folder and not moved:
        raise InputError(
            f"the index in {directory} is of {existing.folder}, not of {info.folder}; name another --index, or give "
            "--moved if it is the same folder in another place"
        )


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}); {_ANEW}") from error


def _schema(width: int) -> pa.Schema:
    text, number, integer, vector = pa.string(), pa.float64(), pa.int64(), pa.list_(pa.float32(), width)
    types = {"file": text, "start": number, "end": number, "size": integer, "time": integer, "content": text}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in {**types, "vector": vector}.items()])


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@contextlib.contextmanager
def _one_line_errors(directory: pathlib.Path, done: str) -> Iterator[None]:
    """Turns errors of the library into an `InputError` of one line; `done`: read, or written."""
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()).removeprefix("lance error: ").split(" at path ")[0]
        raise InputError(f"the index in {directory} cannot be {done}: {reason[:300]}") from error
