"""Checks a data set before it is built: are the annotations complete, are the media there, and can they be opened?

    python -m vlab_jax.datasets.check --dataset=msrvtt --manual_dir=/data
    python -m vlab_jax.datasets.check --dataset=msvd_qa --manual_dir=/data --allow_missing
    python -m vlab_jax.datasets.check --dataset=folder:/my/videos

The annotation files and the media of an official data set lie in <manual_dir>/<data set>/, or in manual_dir itself, if
it is the folder of that one data set; docs/datasets.md names the files. What is checked:

    counts        clips, captions and questions of each split, against the official numbers
    media         missing; of zero length; unreadable; shorter than the annotated interval, or wholly before it;
                  and media that no annotation names
    splits        one video in two splits (a leak), the same bytes under two names in two splits, ids that are used
                  twice; and how many captions two splits share
    texts         clips with neither caption nor question

It prints a line for each kind of finding, and lists every single one in a file (--out), separated by tabs: kind, split,
clip, media, detail. How far it is stands in a second file beside it (<out>.state): a check that was ended, or killed,
goes on where it was, and a second check opens only what is new. Memory does not grow with the data set.

Exit status: 0 nothing is wrong (there may be notes); 1 a fault of the program; 2 errors to mend, in the command or the
data; 3 warnings alone: the data set can be built, without some clips or some of what they show.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import pathlib
import re
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, TextIO

from vlab_jax.data.media import DEFAULT_LIMITS, MediaLimits, add_flags, given_limits
from vlab_jax.data.video import DecodeError, probe
from vlab_jax.datasets.annotations import SPLITS, AnnotationEntry, Tally
from vlab_jax.datasets.media_index import Media, MediaIndex
from vlab_jax.datasets.records import read_file
from vlab_jax.errors import InputError

# FOLDED vlab_jax/datasets/check.py: Media files are opened by worker processes: one that hangs or brings its process
# down is a finding, not the end.

_START = 120.0  # seconds for a process to start


@dataclasses.dataclass(frozen=True)
class Probed:
    """What opening a file has shown.

    Attributes:
      duration: in seconds.
      content: a hash of the bytes, of 64 bits with sign.
      error: why it cannot be read or decoded; else empty.
    """

    path: str
    duration: float = 0.0
    content: int = 0
    error: str = ""


def hash64(data: bytes) -> int:
    """A hash of 64 bits with sign, as databases store it."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), signed=True)


def probe_file(path: str, limits: MediaLimits = DEFAULT_LIMITS) -> Probed:
    """Reads a file, every packet of it, and decodes one frame."""
    try:
        data = read_file(path, limits.max_bytes)
        return Probed(path, probe(data, limits).duration, hash64(data))
    except (DecodeError, OSError) as error:
        return Probed(path, error=" ".join(str(error).split()))


def probe_files(
    paths: Iterable[str],
    workers: int,
    timeout: float,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> Iterator[Probed]:
    """What opening each file shows, as it is known; the paths are taken as workers are free.

    Args:
      workers: processes.
      timeout: seconds after which a file counts as unreadable, and its worker is replaced.
      limits: what reading one file may take.

    Raises:
      InputError: worker processes do not start.
    """
    paths = iter(paths)
    crew = [_Worker(limits) for _ in range(max(workers, 1))]
    try:
        for worker in crew:
            worker.wait_for_start()
            worker.give(next(paths, None), timeout)
        while any(worker.path is not None for worker in crew):
            busy = [worker for worker in crew if worker.path is not None]
            soonest = min(worker.deadline for worker in busy) - time.monotonic()
            ready = wait([worker.connection for worker in busy], max(soonest, 0))
            for place, worker in enumerate(crew):
                if worker.path is None:
                    continue
                late = time.monotonic() >= worker.deadline
                if worker.connection not in ready and not late:
                    continue
                result = worker.result(timeout)
                if worker.ended:
                    crew[place] = worker = _Worker(limits)
                    worker.wait_for_start()
                yield result
                worker.give(next(paths, None), timeout)
    finally:
        for worker in crew:
            worker.end()


class _Worker:
    """A process that probes one file at a time."""

    def __init__(self, limits: MediaLimits) -> None:
        # Spawned: a fork would copy whatever locks the parent's threads hold.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, limits), daemon=True)
        self._process.start()
        theirs.close()
        self.path: str | None = None
        self.deadline = 0.0
        self.ended = False

    def wait_for_start(self) -> None:
        """Returns when the process is ready, so that a file is not blamed for what the process lacks."""
        with contextlib.suppress(EOFError, ConnectionError):
            if self.connection.poll(_START):
                self.connection.recv()
                return
        raise InputError(
            "worker processes do not start: the system has no memory for them (ask for fewer: --workers=1), or the "
            'program starts its work when it is imported, outside of `if __name__ == "__main__":`'
        )

    def give(self, path: str | None, timeout: float) -> None:
        """Hands over the next file, if there is one."""
        self.path = path
        if path is not None:
            self.deadline = time.monotonic() + timeout
            self.connection.send(path)

    def result(self, timeout: float) -> Probed:
        """What has become of the file; the process ends where it gave no answer."""
        path, self.path = self.path, None
        if self.connection.poll():
            with contextlib.suppress(EOFError, ConnectionError):
                return self.connection.recv()
        died = not self._process.is_alive() or self.connection.poll()
        self.end()
        self.ended = True
        reason = "the decoder crashed on it" if died else f"it was not opened in {timeout:g} s"
        return Probed(path, error=reason)

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, limits: MediaLimits) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        connection.send("ready")
        while True:
            connection.send(probe_file(connection.recv(), limits))


# FOLDED vlab_jax/datasets/check.py: What a check knows so far, in an SQLite file: memory does not grow with the
# data set, and a killed check goes on.  It holds the list of media (`builders.media`), a row for each clip, a hash
# of each caption, and what opening each media file has shown. The last is kept from one check to the next, for
# files that have not changed since.

_AT_ONCE = 10_000

_TABLES = """
CREATE TABLE IF NOT EXISTS known (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS clip (
    split INTEGER, id TEXT, video TEXT, media INTEGER, start REAL, stop REAL, problem TEXT, texts INTEGER);
CREATE TABLE IF NOT EXISTS caption (hash INTEGER, split INTEGER);
CREATE TABLE IF NOT EXISTS probe (
    path TEXT PRIMARY KEY, size INTEGER, time INTEGER, duration REAL, content INTEGER, error TEXT) WITHOUT ROWID;
"""
# Clips with what is known of their media.
_SEEN = """
CREATE INDEX IF NOT EXISTS clip_media ON clip (media);
CREATE TEMP VIEW IF NOT EXISTS seen AS
    SELECT split, id, video, shown || '/' || stem || suffix AS path, start, stop, problem, texts,
        media.size, duration, error, content
    FROM clip
    LEFT JOIN media ON media.number = clip.media
    LEFT JOIN directory ON directory.number = media.directory
    LEFT JOIN probe ON probe.path = shown || '/' || stem || suffix
        AND probe.size = media.size AND probe.time = media.time;
"""
# All that is found out anew by the next check; at once, since a process can be killed between two statements.
_FORGET = """
BEGIN;
DROP TABLE IF EXISTS clip;
DROP TABLE IF EXISTS caption;
DROP TABLE IF EXISTS media;
DROP TABLE IF EXISTS directory;
DELETE FROM known;
COMMIT;
"""


class CheckState:
    """The state of a check in a file.

    Args:
      path: of the file, made if it is missing.
      sources: what the check is of, in words; the file of a check of something else is started afresh.
      folders: where the media lie.

    Attributes:
      path: as given.
      index: the media.
      resumed: whether an earlier check was killed, and this one goes on.
    """

    def __init__(self, path: pathlib.Path, sources: str, folders: Sequence[pathlib.Path]) -> None:
        self.path = path
        try:
            self.database = sqlite3.connect(path, timeout=1.0)
            self.database.execute("PRAGMA locking_mode = EXCLUSIVE")
            # A process that is killed loses nothing that was committed; only a power failure might.
            self.database.execute("PRAGMA synchronous = OFF")
            self.database.execute("PRAGMA cache_size = -32000")  # KiB
            self.database.executescript(_TABLES)
            self.index = MediaIndex(folders, self.database)
            begun = self._known("sources") == sources and self._known("finished") is None
            self.resumed = begun and not self.index.changed()
            if not self.resumed:
                self.database.executescript(_FORGET + _TABLES)
                self.index = MediaIndex(folders, self.database)
                self._note("sources", sources)
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"{path}, where the check notes how far it is, cannot be used ({error}); end the check that has it "
                "open, or delete it"
            ) from error

    def read(
        self, split: str, entries: Callable[[], Iterator[AnnotationEntry]], update: Callable[[int], object]
    ) -> Tally:
        """Notes the entries of a split that are not noted yet, with their media; returns the counts of all.

        Args:
          entries: makes them, from the first on.
          update: told how many more are noted.
        """
        number, tally = SPLITS.index(split), Tally()
        saved = json.loads(self._known(f"counts {split}") or "{}")
        tally.counts |= saved
        done = tally.counts["clips"]
        update(done)
        for some in _chunks(itertools.islice(entries(), done, None)):
            self._add(number, some, tally)
            self._note(f"counts {split}", json.dumps(tally.counts))
            update(len(some))
        query = "SELECT count(DISTINCT video) FROM clip WHERE split = ?"
        (tally.counts["videos"],) = self.database.execute(query, (number,)).fetchone()
        return tally

    def _add(self, split: int, entries: Sequence[AnnotationEntry], tally: Tally) -> None:
        clips, captions = [], []
        for entry in entries:
            tally.add(entry)
            media, problem = self._media(entry)
            texts = len(entry.captions) + len(entry.questions)
            clips.append((split, entry.id, entry.video, media, entry.start, entry.end, problem, texts))
            captions += [(hash64(" ".join(text.lower().split()).encode()), split) for text in entry.captions]
        self.database.executemany("INSERT INTO clip VALUES (?, ?, ?, ?, ?, ?, ?, ?)", clips)
        self.database.executemany("INSERT INTO caption VALUES (?, ?)", captions)

    def _media(self, entry: AnnotationEntry) -> tuple[int | None, str | None]:
        try:
            media = self.index.find(entry.video, *entry.aliases)
        except InputError as error:
            return None, str(error)
        return media.number if media else None, None

    def join(self) -> None:
        """To be called when all entries are noted."""
        self.database.executescript(_SEEN)
        self.database.commit()

    def rows(self, query: str) -> Iterator[tuple[Any, ...]]:
        """The rows of a query on the tables and on `seen`; a statement that has none is carried out at once."""
        return self.database.execute(query)

    def seen(self) -> Iterator[tuple[Any, ...]]:
        """Of each clip: split, id, video, path of its media, interval, problem, texts; bytes, seconds and error of its
        media, as far as they are known."""
        return self.rows("SELECT split, id, video, path, start, stop, problem, texts, size, duration, error FROM seen")

    def unprobed(self, share: float) -> Iterator[Media]:
        """The media of clips that are not empty and not opened yet, or a share of them, chosen by number."""
        last = -1
        while True:
            rows = self.database.execute(
                "SELECT number FROM media WHERE number > ? AND size > 0 AND (number * 2654435761) % 1000003 < ? "
                "AND EXISTS (SELECT 1 FROM clip WHERE clip.media = media.number) ORDER BY number LIMIT 1000",
                (last, share * 1_000_003),
            ).fetchall()
            if not rows:
                return
            for (last,) in rows:
                media = self.index[last]
                query = "SELECT 1 FROM probe WHERE path = ? AND size = ? AND time = ?"
                if not self.database.execute(query, (media.path, media.size, media.time)).fetchone():
                    yield media

    def note_probes(self, probed: Iterable[tuple[Media, Probed]]) -> None:
        """Notes what opening files has shown."""
        self.database.executemany(
            "INSERT OR REPLACE INTO probe VALUES (?, ?, ?, ?, ?, ?)",
            [(m.path, m.size, m.time, p.duration, p.content, p.error) for m, p in probed],
        )
        self.database.commit()

    def finish(self) -> None:
        """The next check starts afresh, but for what opening the files has shown."""
        self._note("finished", "yes")

    def close(self) -> None:
        """Lets others use the file."""
        self.database.close()

    def _known(self, key: str) -> Any:
        row = self.database.execute("SELECT value FROM known WHERE key = ?", (key,)).fetchone()
        return row and row[0]

    def _note(self, key: str, value: str) -> None:
        self.database.execute("INSERT OR REPLACE INTO known VALUES (?, ?)", (key, value))
        self.database.commit()


def _chunks(entries: Iterator[AnnotationEntry]) -> Iterator[list[AnnotationEntry]]:
    while some := list(itertools.islice(entries, _AT_ONCE)):
        yield some


# FOLDED vlab_jax/datasets/check.py: What a check has found: a line for each kind of finding, and a file that
# lists every single one.

ERROR, WARNING, NOTE = "error", "warning", "note"
# A run goes on as long as no larger share of its clips cannot be decoded (`data.max_failed_share`).
UNREADABLE_SHARE = 0.01

# Kinds of findings on single clips, and what is told of them.
KINDS = {
    "name": "name media that lead out of the folder; mend the annotations",
    "missing": "have no media",
    "empty": "have media of zero length",
    "unreadable": "have media that cannot be decoded; get these files anew, or take them away",
    "outside": "begin after the end of their media; get these files anew, or take them away",
    "short": "have media that end before half of their interval; what there is will be shown",
    "cut": "have intervals that end a little after their media, and are cut to them",
    "no text": "have neither caption nor question, and will be left out",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One kind of thing that a check has found: how bad it is, and the line that tells it."""

    severity: str
    kind: str
    text: str


class Listing:
    """The file that lists single findings: kind, split, clip, media and detail, separated by tabs."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.add("kind", "split", "clip", "media", "detail")

    def add(self, *fields: Any) -> None:
        """Writes a line."""
        texts = (" ".join(str("" if field is None else field).split()) for field in fields)
        self._file.write("\t".join(texts) + "\n")


def findings_of(
    state: CheckState, clips: Mapping[str, int], allow_missing: bool, listing: Listing
) -> Iterator[Finding]:
    """Looks through what a check has noted.

    Args:
      clips: how many there are in each split.
      allow_missing: whether clips without media will be left out.
      listing: gets the single findings.
    """
    yield from _on_clips(state, clips, allow_missing, listing)
    yield from _on_splits(state, listing)
    yield from _on_captions(state)
    yield from _on_unused(state, listing)


def _on_clips(state: CheckState, clips: Mapping[str, int], allow_missing: bool, listing: Listing) -> Iterator[Finding]:
    found: dict[str, collections.Counter] = {kind: collections.Counter() for kind in KINDS}
    for split, clip, video, path, *rest in state.seen():
        kind, detail = _kind_of(*rest)
        if kind:
            found[kind][SPLITS[split]] += 1
            listing.add(kind, SPLITS[split], clip, path or video, detail)
    total = max(sum(clips.values()), 1)
    lost = found["missing"].total() + found["empty"].total()
    left_out = allow_missing and lost < total
    broken = (found["unreadable"].total() + found["outside"].total()) / total > UNREADABLE_SHARE
    severities = {
        **dict.fromkeys(("missing", "empty"), WARNING if left_out else ERROR),
        **dict.fromkeys(("unreadable", "outside"), ERROR if broken else WARNING),
        **{"name": ERROR, "short": WARNING, "cut": NOTE, "no text": WARNING},
    }
    for kind, count in found.items():
        if count:
            shares = ", ".join(f"{split} {count[split]:,} of {clips[split]:,}" for split in clips)
            text = f"{count.total():,} of {total:,} clips ({count.total() / total:.2%}) {KINDS[kind]}"
            if kind in ("missing", "empty"):
                text += "; they are left out" if left_out else "; add them, or leave the clips out: --allow_missing"
            yield Finding(severities[kind], kind, f"{text}: {shares}")


def _kind_of(
    start: float,
    end: float,
    problem: str | None,
    texts: int,
    size: int | None,
    duration: float | None,
    error: str | None,
) -> tuple[str, str]:
    """The kind of finding that a clip is, and its detail; empty where nothing is wrong with it."""
    if problem:
        return "name", problem
    if size is None:
        return "missing", ""
    if not size:
        return "empty", ""
    if error:
        return "unreadable", error
    if duration is not None:
        interval = f"from {start:g} s to {end:g} s, of {duration:.2f} s"
        if start >= duration:
            return "outside", interval
        if end > duration and math.isfinite(end):
            return ("short" if duration - start < (end - start) / 2 else "cut"), interval
    return ("", "") if texts else ("no text", "")


def _on_splits(state: CheckState, listing: Listing) -> Iterator[Finding]:
    """Ids that are used twice, and what two splits share."""
    count = 0
    for split, clip in state.rows("SELECT split, id FROM clip GROUP BY split, id HAVING count(*) > 1"):
        count += 1
        listing.add("duplicate", SPLITS[split], clip, "", "another clip of the split has this id")
    if count:
        yield Finding(ERROR, "duplicate", f"{count:,} ids are those of several clips of a split; mend the annotations")
    count = 0
    for video, splits in state.rows(
        "SELECT video, group_concat(DISTINCT split) FROM clip GROUP BY video HAVING min(split) < max(split)"
    ):
        count += 1
        listing.add("leak", "", "", video, f"in {_named(splits)}")
    if count:
        yield Finding(ERROR, "leak", f"{count:,} videos are in several splits: what is tested on was trained on")
    count = 0
    for path, splits in state.rows(
        "SELECT min(path), group_concat(DISTINCT split) FROM seen WHERE content <> 0 GROUP BY content "
        "HAVING min(split) < max(split) AND min(video) < max(video)"
    ):
        count += 1
        listing.add("copy", "", "", path, f"another name has the same bytes; in {_named(splits)}")
    if count:
        yield Finding(WARNING, "copy", f"{count:,} media have a copy, under another name, in another split")


def _on_captions(state: CheckState) -> Iterator[Finding]:
    """How many captions are the same, but for case and space, in several splits."""
    state.rows("CREATE TEMP TABLE IF NOT EXISTS shared (hash INTEGER PRIMARY KEY)")
    state.rows("INSERT INTO shared SELECT hash FROM caption GROUP BY hash HAVING min(split) < max(split)")
    ((texts,),) = state.rows("SELECT count(*) FROM shared")
    if texts:
        counted = state.rows("SELECT split, count(*) FROM caption WHERE hash IN shared GROUP BY split ORDER BY split")
        shares = ", ".join(f"{count:,} captions of {SPLITS[split]}" for split, count in counted)
        yield Finding(NOTE, "same caption", f"{texts:,} texts are captions in several splits: {shares}")


def _on_unused(state: CheckState, listing: Listing) -> Iterator[Finding]:
    """Media that no clip names."""
    count = 0
    for (path,) in state.rows(
        "SELECT shown || '/' || stem || suffix FROM media JOIN directory ON directory.number = media.directory "
        "WHERE NOT EXISTS (SELECT 1 FROM clip WHERE clip.media = media.number)"
    ):
        count += 1
        listing.add("unused", "", "", path, "")
    if count:
        yield Finding(NOTE, "unused", f"{count:,} of {state.index.files:,} media files are those of no clip")


def _named(splits: str) -> str:
    return " and ".join(SPLITS[int(number)] for number in sorted(splits.split(",")))


if TYPE_CHECKING:
    from tqdm import tqdm

    from vlab_jax.datasets.annotations import AnnotationEntry, Tally

    pass
    pass

STATUS = {"note": 0, "warning": 3, "error": 2}
_NOTED_AT_ONCE = 100  # opened files; a killed check opens no more than these again


@dataclasses.dataclass(frozen=True)
class Source:
    """What is checked.

    Attributes:
      name: of the data set with its configuration.
      folders: where its media lie.
      identity: differs where the annotations do.
      splits: of each, what makes its entries.
      problems: what is wrong with the counts of the splits.
      left_out: splits without annotation files, and the files that each lacks.
    """

    name: str
    folders: tuple[pathlib.Path, ...]
    identity: str
    splits: dict[str, "Callable[[], Iterator[AnnotationEntry]]"]
    problems: "Callable[[dict[str, Tally]], Iterator[str]]"
    left_out: dict[str, list[str]]


def check(
    dataset: str,
    manual_dir: str,
    out: pathlib.Path,
    *,
    allow_missing: bool = False,
    workers: int = -1,
    probe: float = 1.0,
    timeout: float = 60.0,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> list["Finding"]:
    """Checks a data set, prints what it finds, and lists it in a file.

    Args:
      dataset: as configs name it: `msrvtt`, `msrvtt/retrieval_9k`, `folder:/a/directory`.
      manual_dir: where the files of official data sets lie.
      out: the list of findings; `<out>.state` has how far the check is.
      allow_missing: whether clips without media will be left out.
      workers: processes that open media; -1: two fewer than there are cores.
      probe: the share of the media that are opened.
      timeout: seconds after which a file counts as unreadable.
      limits: what reading one file may take.

    Raises:
      InputError: there is no such data set, or nothing to check.
    """
    pass  # here, because all this takes seconds
    pass
    from vlab_jax.data.crash_guard import default_workers

    source = source_of(dataset, manual_dir)
    state = CheckState(out.with_name(f"{out.name}.state"), source.identity, source.folders)
    tallies, findings = {}, []
    with contextlib.closing(state), _disk_in_order(state):
        where = " and ".join(map(str, source.folders))
        print(f"{source.name} in {where}{', going on' if state.resumed else ''}", flush=True)
        with _bar("listing media", " files", state.index.files) as bar:
            state.index.scan(bar.update)
        for split, entries in source.splits.items():
            with _bar(f"reading {split}", " clips") as bar:
                try:
                    tallies[split] = state.read(split, entries, bar.update)
                except InputError as error:
                    findings.append(Finding(ERROR, "annotations", f"{split}: {error}"))
        state.join()
        _probe(state, probe, default_workers(workers), timeout, limits)
        findings += [Finding(ERROR, "counts", problem) for problem in source.problems(tallies)]
        clips = {split: tally.counts["clips"] for split, tally in tallies.items()}
        with open(out, "w", encoding="utf-8") as file:
            findings += findings_of(state, clips, allow_missing, Listing(file))
        state.finish()
    _print_report(source, tallies, findings, out)
    return findings


@contextlib.contextmanager
def _disk_in_order(state: "CheckState") -> Iterator[None]:
    """A full disk is the user's to mend."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise InputError(f"{state.path} cannot be written ({error}); make room, or name another --out") from error


def source_of(dataset: str, manual_dir: str) -> Source:
    """What a data set's name stands for.

    Raises:
      InputError: there is no such data set, it is made by this project, or its annotations are missing.
    """
    from vlab_jax.datasets import registry
    from vlab_jax.datasets.folder import Folder
    from vlab_jax.datasets.official import Official

    builder_class, rest = registry.find(dataset)
    if builder_class is Folder:
        return _folder(dataset, pathlib.Path(rest).expanduser().absolute())
    if not issubclass(builder_class, Official):
        raise InputError(f"{dataset} is rendered by this project; there is nothing to check")
    if not manual_dir:
        raise InputError(f"say where the files of {dataset} lie: --manual_dir=<directory>")
    return _official(builder_class, rest, manual_dir)


def _official(builder_class: type, configuration: str, manual_dir: str) -> Source:
    from vlab_jax.datasets.annotations import AnnotationFolder

    protocol = builder_class.protocol_of(configuration)
    folders = builder_class.folders_of(manual_dir)
    annotations = AnnotationFolder(folders)
    splits = builder_class.splits_of(protocol, annotations)
    files = {file.path for split in splits for file in protocol.sources(annotations, split)}
    name = f"{builder_class.name}/{protocol.name}"
    return Source(
        name,
        folders,
        f"{name} {_stamps(files)}",
        {split: functools.partial(protocol.read, annotations, split) for split in splits},
        lambda tallies: protocol.problems(tallies, annotations),
        {split: protocol.missing(annotations, split) for split in protocol.files if split not in splits},
    )


def _folder(dataset: str, directory: pathlib.Path) -> Source:
    from vlab_jax.datasets.annotations import AnnotationEntry
    from vlab_jax.datasets.folder import ANNOTATIONS, Row, assign_splits, read_annotations

    def entries(split: str, rows: Sequence[Row]) -> Iterator[AnnotationEntry]:
        for row in rows:
            yield AnnotationEntry(row.id, row.video, split, row.captions, row.questions, row.start, row.end)

    splits = assign_splits(read_annotations(directory))
    return Source(
        dataset,
        (directory,),
        f"{dataset} {_stamps([directory / ANNOTATIONS])}",
        {split: functools.partial(entries, split, rows) for split, rows in splits.items()},
        lambda tallies: iter(()),
        {},
    )


def _stamps(files: Iterable[pathlib.Path]) -> str:
    """Size and time of files, by name."""
    return " ".join(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in sorted(files))


def _probe(state: "CheckState", share: float, workers: int, timeout: float, limits: MediaLimits) -> None:
    """Opens the media that have not been opened yet."""
    pass

    total = sum(1 for _ in state.unprobed(share))
    if not total:
        return
    media = {}

    def paths() -> Iterator[str]:
        for each in state.unprobed(share):
            media[each.path] = each
            yield each.path

    noted = []
    with _bar("opening media", " files", total=total) as bar:
        for probed in probe_files(paths(), workers, timeout, limits):
            noted.append((media.pop(probed.path), probed))
            if len(noted) == _NOTED_AT_ONCE:
                state.note_probes(noted)
                noted = []
            bar.update()
        state.note_probes(noted)


def _bar(what: str, unit: str, initial: int = 0, total: int | None = None) -> "tqdm":
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm(desc=what, unit=unit, initial=initial, total=total, mininterval=interval)


def _print_report(
    source: Source, tallies: Mapping[str, "Tally"], findings: Sequence["Finding"], out: pathlib.Path
) -> None:
    for split, tally in tallies.items():
        counts = [f"{tally.counts[name]:,} {name}" for name in ("clips", "videos", "captions", "questions")]
        print(f"  {split:<12}{', '.join(count for count in counts if not count.startswith('0 '))}")
    for split, files in source.left_out.items():
        print(f"  {split:<12}left out: {', '.join(files)} is missing")
    for severity in STATUS:
        for finding in findings:
            if finding.severity == severity:
                print(f"{severity}: {finding.kind}: {finding.text}")
    verdict = {0: "nothing is wrong", 2: "there are errors to mend", 3: "it can be built, with these warnings"}
    print(f"{verdict[status_of(findings)]}; single findings: {out}")


def status_of(findings: Sequence["Finding"]) -> int:
    """The exit status."""
    severities = {finding.severity for finding in findings}
    return 2 if "error" in severities else 3 if "warning" in severities else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vlab_jax.datasets.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", required=True, help="as in msrvtt, msrvtt/retrieval_9k or folder:/my/videos")
    parser.add_argument("--manual_dir", default="", help="where the files of official data sets lie")
    parser.add_argument("--allow_missing", action="store_true", help="clips without media will be left out: a warning")
    parser.add_argument("--workers", type=int, default=-1, help="processes that open media (default: cores less two)")
    parser.add_argument("--probe", type=float, default=1.0, help="the share of the media to open (default: 1)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one file (default: 60)")
    add_flags(parser)
    parser.add_argument("--out", default="", help="the list of findings (default: check_<data set>.tsv)")
    given = parser.parse_args(arguments)
    out = pathlib.Path(given.out or f"check_{re.sub(r'[^0-9A-Za-z]+', '_', given.dataset)}.tsv")
    try:
        _check_arguments(given, out)
        findings = check(
            given.dataset,
            given.manual_dir,
            out,
            allow_missing=given.allow_missing,
            workers=given.workers,
            probe=given.probe,
            timeout=given.timeout,
            limits=MediaLimits.from_fields(given_limits(vars(given))),
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"ended; the same command goes on where it was ({out}.state)", file=sys.stderr)
        return 2
    return status_of(findings)


def _check_arguments(given: argparse.Namespace, out: pathlib.Path) -> None:
    if not 0 <= given.probe <= 1:
        raise InputError(f"--probe={given.probe} must be from 0 to 1")
    if given.timeout <= 0:
        raise InputError(f"--timeout={given.timeout} must be more than 0 seconds")
    if not out.parent.is_dir():
        raise InputError(f"--out={out}: there is no directory {str(out.parent)!r}; make it")


if __name__ == "__main__":
    sys.exit(main())
