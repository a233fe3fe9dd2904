"""Checks a data set before it is built: are the annotations complete, are the media there, and can they be opened?

    python -m vlab_jax.datasets.check --dataset=msrvtt --manual_dir=/data
    python -m vlab_jax.datasets.check --dataset=msvd_qa --manual_dir=/data --allow_missing
    python -m vlab_jax.datasets.check --dataset=folder:/my/videos

The annotation files and the media of an official data set are in <manual_dir>/<data set>/, or in manual_dir itself, if
it is the folder of that one data set; docs/datasets.md names the files. The check looks at:

    counts        clips, captions and questions of each split, against the official numbers
    media         missing; of zero length; unreadable; shorter than the annotated interval, or wholly before it;
                  and media that no annotation names
    splits        one video in two splits (a leak), the same bytes under two names in two splits, ids that are used
                  twice; and how many captions two splits share
    texts         clips with neither caption nor question

It prints a line for each kind of finding, and lists each single one in a file (--out), separated by tabs: kind, split,
clip, media, detail. What opening the media has shown is kept in a second file beside it (<out>.state): after an
interruption or a kill, the same command opens only the rest, and a later check only what is new or changed. Memory
does not grow with the data set.

Exit status: 0 nothing is wrong (there may be notes); 1 a bug in the program; 2 errors in the command or the data;
3 warnings only: the data set can be built, without some clips or some of what they show.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import pathlib
import re
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from vlab_jax.data.crash_guard import default_workers, map_in_order
from vlab_jax.data.media import DEFAULT_LIMITS, DecodeError, MediaLimits, add_limit_flags, limit_fields
from vlab_jax.data.video import measure_duration
from vlab_jax.datasets import registry
from vlab_jax.datasets.annotations import AnnotationSource, hash_share
from vlab_jax.datasets.findings import ERROR, NOTE, WARNING, Finding, find_all, status_of
from vlab_jax.datasets.media_index import MediaIndex
from vlab_jax.datasets.records import progress_bar, read_file
from vlab_jax.errors import InputError, RunStopped

_PROBES_PER_COMMIT = 100  # a killed check opens no more files than these again

_TABLES = """
PRAGMA locking_mode = EXCLUSIVE;  -- another check with this file gets an error
PRAGMA synchronous = OFF;  -- a killed process loses nothing that was committed
BEGIN EXCLUSIVE; COMMIT;
PRAGMA cache_size = -32000; PRAGMA temp.cache_size = -32000;  -- KiB
-- The one table that is kept: what opening each media file has shown.
CREATE TABLE IF NOT EXISTS probe (
    path TEXT PRIMARY KEY, size INTEGER, time INTEGER, duration REAL, content INTEGER, error TEXT) WITHOUT ROWID;
CREATE TEMP TABLE clip (
    split TEXT, id TEXT, video TEXT, media INTEGER, start REAL, stop REAL, problem TEXT, texts INTEGER);
CREATE TEMP TABLE caption (hash INTEGER, split TEXT);
CREATE TEMP VIEW result AS
    SELECT split, id, video, start, stop, problem, texts, media.path, media.size, media.time, duration, error, content
    FROM clip
    LEFT JOIN media ON media.number = clip.media  -- the table of `MediaIndex`
    LEFT JOIN probe ON probe.path = media.path AND probe.size = media.size AND probe.time = media.time;
"""


class Probe(NamedTuple):
    """What opening a file has shown: its duration in seconds, a 64-bit hash of its bytes, and why it has failed."""

    duration: float = 0.0
    content: int = 0
    error: str = ""


def probe_file(path: str, limits: MediaLimits = DEFAULT_LIMITS) -> Probe:
    """Reads a file, demuxes every packet, and decodes one frame."""
    try:
        data = read_file(path, limits.max_bytes)
        return Probe(measure_duration(data, limits), hash64(data))
    except (DecodeError, OSError) as error:
        return Probe(error=" ".join(str(error).split()))


def probe_files(
    paths: Iterable[str], workers: int, timeout: float, limits: MediaLimits = DEFAULT_LIMITS
) -> Iterator[Probe]:
    """Opens files in worker processes, and yields the results in order; see `map_in_order`."""
    reason = f"opening it crashed the decoder, or took more than {timeout:g} s"
    function = functools.partial(probe_file, limits=limits)
    return map_in_order(function, paths, max(workers, 1), lambda path: Probe(error=reason), timeout)


def hash64(data: bytes) -> int:
    """A hash of 64 bits with sign, the largest integer that databases store."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), signed=True)


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
) -> list[Finding]:
    """Checks a data set, prints the findings, and lists each single one in a file.

    Args:
      dataset: a spec, as in `msrvtt`, `msrvtt/retrieval_9k`, `folder:/a/directory`.
      out: the list of findings; `<out>.state` keeps what opening the media has shown.
      allow_missing: whether clips without media will be left out.
      workers: processes that open media; -1: two fewer than there are cores.
      probe: the share of the media to open.
      timeout: seconds after which a file counts as unreadable.

    Raises:
      InputError: there is no such data set, nothing to check, or no room for the state.
      RunStopped: no worker process can be started.
    """
    family, config = registry.find(dataset)
    source = family.annotation_source(config, manual_dir)
    counts: dict[str, Counter[str]] = {}
    findings = []
    print(f"{source.name} in {' and '.join(map(str, source.folders))}", flush=True)
    with _open_state(out.with_name(f"{out.name}.state"), source.folders) as (database, index):
        with progress_bar("listing media", " files") as bar:
            index.scan(bar.update)
        for split in source.splits:
            try:
                counts[split] = _read_split(database, index, source, split)
            except InputError as error:
                findings.append(Finding(ERROR, "annotations", f"{split}: {error}"))
        _probe_media(database, probe, default_workers(workers), timeout, limits)
        findings += [Finding(ERROR, "counts", problem) for problem in source.count_problems(counts)]
        with open(out, "w", encoding="utf-8") as file:
            findings += find_all(database, allow_missing, file)
    _print_report(source, counts, findings, out)
    return findings


@contextlib.contextmanager
def _open_state(path: pathlib.Path, folders: Sequence[pathlib.Path]) -> Iterator[tuple[sqlite3.Connection, MediaIndex]]:
    """The database of a check: the table of probes is in the file `path`, and all others are temporary."""
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=1.0)) as database:
            database.executescript(_TABLES)
            database.create_function("hash_share", 1, hash_share)
            yield database, MediaIndex(folders, database)
    except sqlite3.DatabaseError as error:
        raise InputError(
            f"{path}, the state of the check, cannot be used ({error}); make room, end the check that has it open, or "
            "delete it"
        ) from error


def _read_split(database: sqlite3.Connection, index: MediaIndex, source: AnnotationSource, split: str) -> Counter[str]:
    """Puts the clips and captions of a split into the database; returns the counts."""
    counts = Counter[str]()
    with progress_bar(f"reading {split}", " clips") as bar:
        for entry in source.read(split, counts):
            media = problem = None
            try:
                media = index.find(entry.video, *entry.aliases)
            except InputError as error:
                problem = str(error)
            texts = len(entry.captions) + len(entry.questions)
            row = (split, entry.id, entry.video, media and media.number, entry.start, entry.end, problem, texts)
            database.execute("INSERT INTO clip VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            captions = ((hash64(" ".join(text.lower().split()).encode()), split) for text in entry.captions)
            database.executemany("INSERT INTO caption VALUES (?, ?)", captions)
            bar.update()
    database.commit()
    query = "SELECT count(DISTINCT video) FROM clip WHERE split = ?"
    (counts["videos"],) = database.execute(query, (split,)).fetchone()
    return counts


def _probe_media(database: sqlite3.Connection, share: float, workers: int, timeout: float, limits: MediaLimits) -> None:
    """Opens the media of clips that were not opened before, or a share of them."""
    query = "SELECT DISTINCT path, size, time FROM result WHERE size > 0 AND duration IS NULL AND hash_share(path) < ?"
    database.execute(f"CREATE TEMP TABLE to_probe AS {query}", (share,))
    (total,) = database.execute("SELECT count(*) FROM to_probe").fetchone()
    if not total:
        return
    media, again = itertools.tee(database.execute("SELECT path, size, time FROM to_probe"))
    probes = probe_files((path for path, _, _ in again), workers, timeout, limits)
    with progress_bar("opening media", " files", total) as bar, contextlib.closing(probes):
        rows = (row + probe for row, probe in zip(media, probes, strict=True))
        while batch := list(itertools.islice(rows, _PROBES_PER_COMMIT)):
            database.executemany("INSERT OR REPLACE INTO probe VALUES (?, ?, ?, ?, ?, ?)", batch)
            database.commit()
            bar.update(len(batch))


def _print_report(
    source: AnnotationSource, counts: Mapping[str, Mapping[str, int]], findings: Sequence[Finding], out: pathlib.Path
) -> None:
    for split, of_split in counts.items():
        names = [name for name in ("clips", "videos", "captions", "questions") if of_split[name]]
        print(f"  {split:<12}{', '.join(f'{of_split[name]:,} {name}' for name in names)}")
    for split, files in source.left_out.items():
        print(f"  {split:<12}left out: {', '.join(files)} is missing")
    for severity in (NOTE, WARNING, ERROR):
        for finding in findings:
            if finding.severity == severity:
                print(f"{severity}: {finding.kind}: {finding.text}")
    verdict = {0: "nothing is wrong", 2: "there are errors to mend", 3: "it can be built, with these warnings"}
    print(f"{verdict[status_of(findings)]}; single findings: {out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vlab_jax.datasets.check",
        description=__doc__,
        epilog=registry.specs_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", required=True, help="as in msrvtt, msrvtt/retrieval_9k or folder:/my/videos")
    parser.add_argument("--manual_dir", default="", help="directory of the files of official data sets")
    parser.add_argument("--allow_missing", action="store_true", help="clips without media will be left out: a warning")
    parser.add_argument("--workers", type=int, default=-1, help="processes that open media (default: cores less two)")
    parser.add_argument("--probe", type=float, default=1.0, help="the share of the media to open (default: 1)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one file (default: 60)")
    add_limit_flags(parser)
    parser.add_argument("--out", default="", help="the list of findings (default: check_<data set>.tsv)")
    flags = parser.parse_args(arguments)
    out = pathlib.Path(flags.out or f"check_{re.sub(r'[^0-9A-Za-z]+', '_', flags.dataset)}.tsv")
    try:
        if not 0 <= flags.probe <= 1:
            raise InputError(f"--probe={flags.probe} must be from 0 to 1")
        if flags.timeout <= 0:
            raise InputError(f"--timeout={flags.timeout} must be more than 0 seconds")
        if not out.parent.is_dir():
            raise InputError(f"--out={out}: there is no directory {str(out.parent)!r}; make it")
        findings = check(
            flags.dataset,
            flags.manual_dir,
            out,
            allow_missing=flags.allow_missing,
            workers=flags.workers,
            probe=flags.probe,
            timeout=flags.timeout,
            limits=MediaLimits(**limit_fields(vars(flags))),
        )
    except (InputError, RunStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; the same command opens only the media that are not in {out}.state", file=sys.stderr)
        return 2
    return status_of(findings)


if __name__ == "__main__":
    sys.exit(main())
