"""What a check of a data set finds: a line for each kind of finding, and a file that lists each single one."""

import collections
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TextIO

from vlab_jax.datasets.annotations import SPLITS

ERROR, WARNING, NOTE = "error", "warning", "note"
# A run goes on as long as no larger share of its clips cannot be decoded (`data.max_failed_share`).
UNREADABLE_SHARE = 0.01

# Kinds of findings on single clips: the condition, of which the first that holds counts, and the end of the line.
_PAST_END = "stop > duration AND stop < 9e999"  # infinite if the clip ends with its media
CLIP_FINDINGS = {
    "name": ("problem IS NOT NULL", "name media that lead out of the folder; mend the annotations"),
    "missing": ("size IS NULL", "have no media"),
    "empty": ("size = 0", "have media of zero length"),
    "unreadable": ("error <> ''", "have media that cannot be decoded; get these files anew, or take them away"),
    "outside": ("start >= duration", "begin after the end of their media; get these files anew, or take them away"),
    "short": (
        f"{_PAST_END} AND duration - start < (stop - start) / 2",
        "have media that end before half of their interval; what there is will be shown",
    ),
    "cut": (_PAST_END, "have intervals that end a little after their media, and are cut to them"),
    "no text": ("texts = 0", "have neither caption nor question, and will be left out"),
}
_CASES = " ".join(f"WHEN {condition} THEN '{kind}'" for kind, (condition, _) in CLIP_FINDINGS.items())
_CLIPS = f"""
SELECT kind, split, id, coalesce(path, video),
    CASE WHEN kind IN ('outside', 'short', 'cut')
    THEN printf('from %g s to %g s, of %.2f s', start, stop, duration) ELSE coalesce(problem, error, '') END
FROM (SELECT *, CASE {_CASES} END AS kind FROM result) WHERE kind IS NOT NULL
"""
# Severity, kind, the line after the number of findings, and a query for their split, clip, media and detail.
_QUERY_FINDINGS = (
    (
        ERROR,
        "duplicate",
        "ids are those of several clips of a split; mend the annotations",
        "SELECT split, id, '', 'another clip of the split has this id' FROM clip "
        "GROUP BY split, id HAVING count(*) > 1",
    ),
    (
        ERROR,
        "leak",
        "videos are in several splits: what is tested on was trained on",
        "SELECT '', '', video, 'in ' || in_order(group_concat(DISTINCT split)) FROM clip "
        "GROUP BY video HAVING min(split) < max(split)",
    ),
    (
        WARNING,
        "copy",
        "media have a copy, under another name, in another split",
        "SELECT '', '', min(path), 'another name has the same bytes; in ' || in_order(group_concat(DISTINCT split)) "
        "FROM result WHERE content <> 0 GROUP BY content HAVING min(split) < max(split) AND min(video) < max(video)",
    ),
    (
        NOTE,
        "unused",
        "media files are those of no clip",
        "SELECT '', '', path, '' FROM media WHERE number NOT IN (SELECT media FROM clip WHERE media IS NOT NULL)",
    ),
)


class Finding(NamedTuple):
    """One kind of finding of a check: its severity, and the line to print."""

    severity: str
    kind: str
    text: str


def status_of(findings: Sequence[Finding]) -> int:
    """The exit status."""
    severities = {finding.severity for finding in findings}
    return 2 if ERROR in severities else 3 if WARNING in severities else 0


def find_all(database: sqlite3.Connection, allow_missing: bool, file: TextIO) -> Iterator[Finding]:
    """Looks through the tables that `check` has filled, and yields each kind of finding.

    Args:
      allow_missing: whether clips without media will be left out.
      file: gets the list of single findings.
    """
    database.create_function("in_order", 1, _in_order)
    _write_row(file, "kind", "split", "clip", "media", "detail")
    yield from _clip_findings(database, allow_missing, file)
    for severity, kind, text, query in _QUERY_FINDINGS:
        count = 0
        for row in database.execute(query):
            _write_row(file, kind, *row)
            count += 1
        if count:
            yield Finding(severity, kind, f"{count:,} {text}")
    yield from _shared_captions(database)


def _clip_findings(database: sqlite3.Connection, allow_missing: bool, file: TextIO) -> Iterator[Finding]:
    clips = _in_each_split(database, "clip")
    found: dict[str, collections.Counter] = {kind: collections.Counter() for kind in CLIP_FINDINGS}
    for kind, split, *fields in database.execute(_CLIPS):
        found[kind][split] += 1
        _write_row(file, kind, split, *fields)
    total = max(sum(clips.values()), 1)
    left_out = allow_missing and found["missing"].total() + found["empty"].total() < total
    broken = (found["unreadable"].total() + found["outside"].total()) / total > UNREADABLE_SHARE
    severities = {
        **dict.fromkeys(("missing", "empty"), WARNING if left_out else ERROR),
        **dict.fromkeys(("unreadable", "outside"), ERROR if broken else WARNING),
        **{"name": ERROR, "short": WARNING, "cut": NOTE, "no text": WARNING},
    }
    for kind, count in found.items():
        if count:
            shares = ", ".join(f"{split} {count[split]:,} of {number:,}" for split, number in clips.items())
            text = f"{count.total():,} of {total:,} clips ({count.total() / total:.2%}) {CLIP_FINDINGS[kind][1]}"
            if kind in ("missing", "empty"):
                text += "; they are left out" if left_out else "; add them, or leave the clips out: --allow_missing"
            yield Finding(severities[kind], kind, f"{text}: {shares}")


def _shared_captions(database: sqlite3.Connection) -> Iterator[Finding]:
    database.execute("CREATE TEMP TABLE shared (hash INTEGER PRIMARY KEY)")
    database.execute("INSERT INTO shared SELECT hash FROM caption GROUP BY hash HAVING min(split) < max(split)")
    (texts,) = database.execute("SELECT count(*) FROM shared").fetchone()
    if texts:
        counts = _in_each_split(database, "caption WHERE hash IN shared")
        shares = ", ".join(f"{count:,} captions of {split}" for split, count in counts.items())
        yield Finding(NOTE, "same caption", f"{texts:,} texts are captions in several splits: {shares}")


def _in_each_split(database: sqlite3.Connection, rows: str) -> dict[str, int]:
    """The numbers of rows in each split that has any."""
    counts = dict(database.execute(f"SELECT split, count(*) FROM {rows} GROUP BY split"))
    return {split: counts[split] for split in SPLITS if split in counts}


def _in_order(splits: str) -> str:
    return " and ".join(sorted(splits.split(","), key=SPLITS.index))


def _write_row(file: TextIO, *fields: Any) -> None:
    """Writes a line of the list of findings: kind, split, clip, media and detail."""
    file.write("\t".join(" ".join(str(field).split()) for field in fields) + "\n")
