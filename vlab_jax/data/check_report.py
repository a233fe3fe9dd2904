"""What a check has found: a line for each kind of finding, and a file that lists every single one."""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from vlab_jax.data.builders.annotation import SPLITS
from vlab_jax.data.check_state import CheckState

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
