"""Checks a data set before it is built: are the annotations complete, are the media there, and can they be opened?

    python -m vlab_jax.data.check --dataset=msrvtt --manual_dir=/data
    python -m vlab_jax.data.check --dataset=msvd_qa --manual_dir=/data --allow_missing
    python -m vlab_jax.data.check --dataset=folder:/my/videos

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
import contextlib
import dataclasses
import functools
import pathlib
import re
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from vlab_jax.data.limits import DEFAULT_LIMITS, MediaLimits, add_flags, given_limits
from vlab_jax.errors import InputError

if TYPE_CHECKING:
    from tqdm import tqdm

    from vlab_jax.data.builders.annotation import Entry, Tally
    from vlab_jax.data.check_report import Finding
    from vlab_jax.data.check_state import CheckState

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
    splits: dict[str, "Callable[[], Iterator[Entry]]"]
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
    from vlab_jax.data.check_report import ERROR, Finding, Listing, findings_of  # here, because all this takes seconds
    from vlab_jax.data.check_state import CheckState
    from vlab_jax.data.workers import default_workers

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
    from vlab_jax.data import builders
    from vlab_jax.data.builders.folder import Folder
    from vlab_jax.data.builders.official import Official

    builder_class, rest = builders.find(dataset)
    if builder_class is Folder:
        return _folder(dataset, pathlib.Path(rest).expanduser().absolute())
    if not issubclass(builder_class, Official):
        raise InputError(f"{dataset} is rendered by this project; there is nothing to check")
    if not manual_dir:
        raise InputError(f"say where the files of {dataset} lie: --manual_dir=<directory>")
    return _official(builder_class, rest, manual_dir)


def _official(builder_class: type, configuration: str, manual_dir: str) -> Source:
    from vlab_jax.data.builders.annotation import AnnotationFolder

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
    from vlab_jax.data.builders.annotation import Entry
    from vlab_jax.data.builders.folder import assign_splits
    from vlab_jax.data.builders.folder_annotations import ANNOTATIONS, Row, read_annotations

    def entries(split: str, rows: Sequence[Row]) -> Iterator[Entry]:
        for row in rows:
            yield Entry(row.id, row.video, split, row.captions, row.questions, row.start, row.end)

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
    from vlab_jax.data.probing import probe_files

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
        prog="python -m vlab_jax.data.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
