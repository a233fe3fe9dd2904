"""The `folder` data set: one's own clips, from a directory of videos and a file `annotations.jsonl` in it.

Each line of the file is a JSON object for one clip:

    {"video": "cooking/17.mp4", "start": 3.5, "end": 8, "captions": ["a man cuts an onion"],
     "questions": [{"question": "what is cut?", "answer": "an onion"}], "split": "train"}

`video` (a path within the directory) and `captions` are needed, the rest is optional. `id` is by default the
video with its interval; `start` and `end` are seconds. A question may have a `type`, for reports, and
`options`, of which the answer is one. Images serve as one-frame videos.

Splits: where no line names one, they follow from a hash of the video's path: about 80 % train, 10 %
validation, 10 % test, at least one video each if there are three, and all clips of one video together. Where
some line names one, lines without go to train.

Each clip is stored with the whole file that it is part of, or as frames of its own. The configuration's name
holds a hash of the annotations and of each file's size and time, so data that has changed is built anew, and
else what was built is used again.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import os
import pathlib
import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from vlab_jax.data import schema
from vlab_jax.data.schema import Question
from vlab_jax.datasets.annotations import hash_share
from vlab_jax.datasets.clip_builder import ClipBuilder
from vlab_jax.datasets.text_files import refuse_constant
from vlab_jax.errors import InputError

# FOLDED vlab_jax/datasets/folder.py: Reads and checks the `annotations.jsonl` of a `folder` data
# set, and reports all that is wrong at once.

ANNOTATIONS = "annotations.jsonl"
SPLITS = ("train", "validation", "test")
MOST_SHOWN = 50
_EXAMPLE = '{"video": "clip.mp4", "captions": ["a man cuts an onion"]}'
_KEYS = ("video", "id", "start", "end", "captions", "questions", "split")
_QUESTION_KEYS = ("question", "answer", "type", "options")
# What would break a line of a log or of a list; a name may not have it, a caption may.
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the annotations: a clip.

    `start` and `end` are seconds within the video; `split` is None where the line names none.
    """

    line: int
    id: str
    video: str
    captions: tuple[str, ...]
    questions: tuple[Question, ...] = ()
    start: float = 0.0
    end: float = math.inf
    split: str | None = None


def read_annotations(directory: str | pathlib.Path) -> list[Row]:
    """The rows of `annotations.jsonl` in `directory`, checked, with every video file in place.

    Raises:
      InputError: the directory or the file is missing, or anything in it is wrong: all problems in one
        message, one a line, each with its line number (at most 50 of them).
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise InputError(f"folder: there is no directory {str(directory)!r}; give the one that holds {ANNOTATIONS}")
    path = directory / ANNOTATIONS
    if not path.is_file():
        raise InputError(f"folder: {str(path)!r} is missing; it has one line for each clip, such as {_EXAMPLE}")
    rows: list[Row] = []
    problems: list[str] = []
    lines_of_ids: dict[str, int] = {}
    # Bytes are split, not text: JSON strings may hold characters that str.splitlines takes for line ends.
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        fields, found = _parse(line)
        if not found:
            found = [*_problems(fields, directory), *_duplicates(fields, number, lines_of_ids)]
        problems += [f"{ANNOTATIONS} line {number}: {problem}" for problem in found]
        rows += [] if found else [_row(fields, number)]
    if not problems and not rows:
        problems = [f"{ANNOTATIONS} has no line; a line for a clip is such as {_EXAMPLE}"]
    elif not problems and all(row.split in SPLITS[1:] for row in rows):
        problems = [f"{ANNOTATIONS}: no line is in the split 'train'; put some there, or name no split at all"]
    if problems:
        raise InputError(_report(problems, directory))
    return rows


def _report(problems: list[str], directory: pathlib.Path) -> str:
    """All problems in one message: one line if there is one, else a line each after a heading."""
    if len(problems) == 1:
        return f"folder {str(directory)!r}: {problems[0]}"
    more = [f"and {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else []
    return "\n".join([f"folder {str(directory)!r}: {len(problems)} problems", *problems[:MOST_SHOWN], *more])


def _parse(line: bytes) -> tuple[dict[str, Any], list[str]]:
    """The JSON object of a line, without its nulls, and what keeps the line from being one."""
    try:
        fields = json.loads(line.decode(), object_pairs_hook=_object, parse_constant=refuse_constant)
    except UnicodeDecodeError:
        return {}, ["is not UTF-8; save the file in that encoding"]
    except json.JSONDecodeError as error:
        return {}, [f"is not JSON ({error.msg} at column {error.colno}); a line is such as {_EXAMPLE}"]
    except (ValueError, RecursionError) as error:
        return {}, [f"is not JSON ({error})"]
    if not isinstance(fields, dict):
        return {}, [f"is {_called(fields)} and must be an object, such as {_EXAMPLE}"]
    return fields, []


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, without its nulls."""
    if len({key for key, _ in pairs}) < len(pairs):
        twice = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise ValueError(f"the key {_called(twice)} is given twice")
    return {key: value for key, value in pairs if value is not None}


def _problems(fields: dict[str, Any], directory: pathlib.Path) -> Iterator[str]:
    """Everything that is wrong with one line, apart from other lines."""
    yield from _unknown_keys(fields, _KEYS)
    yield from _video_problems(fields, directory)
    yield from _interval_problems(fields)
    if "captions" not in fields:
        yield "'captions' is missing: a list of at least one text"
    else:
        yield from _text_list_problems(fields["captions"], "captions")
    if "id" in fields and (not _is_text(fields["id"]) or _CONTROL.search(fields["id"])):
        yield f"'id' is {_called(fields['id'])} and must be a text that is not empty, without control characters"
    if "split" in fields and fields["split"] not in SPLITS:
        nearest = _nearest(fields["split"], SPLITS)
        yield f"'split' is {_called(fields['split'])} and must be one of {', '.join(SPLITS)}{nearest}"
    asked = fields.get("questions", [])
    if not isinstance(asked, list):
        yield f"'questions' is {_called(asked)} and must be a list of objects"
        return
    for index, question in enumerate(asked, start=1):
        yield from (f"question {index}: {problem}" for problem in _question_problems(question))


def _video_problems(fields: dict[str, Any], directory: pathlib.Path) -> Iterator[str]:
    if "video" not in fields:
        yield "'video' is missing: the path of a file in the folder"
        return
    video = fields["video"]
    if not _is_text(video) or _CONTROL.search(video):
        yield f"'video' is {_called(video)} and must be the path of a file in the folder, without control characters"
    elif posixpath.isabs(video) or ".." in pathlib.PurePosixPath(video).parts:
        yield f"video {video!r} leaves the folder; give a path within it, without '..'"
    elif not os.path.isfile(directory / video):  # which takes names that are too long, too
        yield f"video {video!r} is not in the folder"
    elif not (directory / video).stat().st_size:
        yield f"video {video!r} is an empty file"


def _interval_problems(fields: dict[str, Any]) -> Iterator[str]:
    ends = {key: fields[key] for key in ("start", "end") if key in fields}
    wrong = {key: value for key, value in ends.items() if not _is_seconds(value)}
    for key, value in wrong.items():
        yield f"'{key}' is {_called(value)} and must be a number of seconds, 0 or more"
    if not wrong and not fields.get("start", 0) < fields.get("end", math.inf):
        yield f"'start' {fields.get('start', 0)} is not before 'end' {fields['end']}"


def _question_problems(question: Any) -> Iterator[str]:
    if not isinstance(question, dict):
        yield f"is {_called(question)} and must be an object with 'question' and 'answer'"
        return
    yield from _unknown_keys(question, _QUESTION_KEYS)
    for key in ("question", "answer", "type"):
        if key not in question and key != "type":
            yield f"'{key}' is missing"
        elif key in question and not _is_text(question[key]):
            yield f"'{key}' is {_called(question[key])} and must be a text that is not empty"
    if "options" in question:
        wrong = list(_text_list_problems(question["options"], "options"))
        yield from wrong
        if not wrong and question.get("answer") not in question["options"]:
            yield "'answer' is not among 'options'"


def _text_list_problems(value: Any, name: str) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"'{name}' is {_called(value)} and must be a list of texts"
    elif not value:
        yield f"'{name}' is empty; give at least one text"
    else:
        for index, text in enumerate(value, start=1):
            if not _is_text(text):
                yield f"number {index} of '{name}' is {_called(text)} and must be a text that is not empty"


def _unknown_keys(fields: dict[str, Any], known: tuple[str, ...]) -> Iterator[str]:
    for key in fields:
        if key not in known:
            yield f"unknown key {key!r}{_nearest(key, known)}; known: {', '.join(known)}"


def _duplicates(fields: dict[str, Any], number: int, lines_of_ids: dict[str, int]) -> Iterator[str]:
    """Tells of an id that an earlier line has, and notes the ids that it sees in `lines_of_ids`."""
    if not all(_is_text(fields[key]) for key in ("video", "id") if key in fields) or "video" not in fields:
        return
    identity = _id(fields)
    if lines_of_ids.setdefault(identity, number) != number:
        hint = "" if "id" in fields else "; give each clip of a video its own 'id', or its 'start' and 'end'"
        yield f"id {identity!r} is already that of line {lines_of_ids[identity]}{hint}"


def _id(fields: dict[str, Any]) -> str:
    """The clip's id: its own, or its video with the interval if it has one."""
    interval = f":{fields.get('start', 0)}-{fields.get('end', 'end')}" if {"start", "end"} & set(fields) else ""
    return fields.get("id", posixpath.normpath(fields["video"]) + interval)


def _row(fields: dict[str, Any], number: int) -> Row:
    """The row of a line that has no problems."""
    asked = fields.get("questions", [])
    return Row(
        line=number,
        id=_id(fields),
        video=posixpath.normpath(fields["video"]),
        captions=tuple(fields["captions"]),
        questions=tuple(Question(**{**q, "options": tuple(q.get("options", ()))}) for q in asked),
        start=float(fields.get("start", 0)),
        end=float(fields.get("end", math.inf)),
        split=fields.get("split"),
    )


def _is_text(value: Any) -> bool:
    """Whether it is a text that is not empty, and can be written down: half of a surrogate pair cannot."""
    return isinstance(value, str) and bool(value.strip()) and not _SURROGATE.search(value)


def _is_seconds(value: Any) -> bool:
    # bool is an int to Python; 1e999 is an infinity to json; integers too long for a float cannot be asked.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value < 1e12


def _called(value: Any) -> str:
    """A value as JSON spells it, cut short."""
    spelled = _SURROGATE.sub(lambda found: f"\\u{ord(found.group()):04x}", json.dumps(value, ensure_ascii=False))
    return spelled if len(spelled) <= 40 else f"{spelled[:40]}..."


def _nearest(word: Any, known: tuple[str, ...]) -> str:
    # Loose enough for abbreviations such as "val".
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.45)
    return f" (did you mean {near[0]!r}?)" if near else ""


@dataclasses.dataclass(eq=False, kw_only=True)
class FolderConfig(tfds.core.BuilderConfig):
    """One state of one directory: its `rows`, read and checked."""

    directory: str = ""
    rows: tuple[Row, ...] = ()

    @property
    def clips(self) -> int:
        """Examples in all splits, for a progress bar."""
        return len(self.rows)


class Folder(ClipBuilder):
    """The clips of a directory; see the module's text."""

    @classmethod
    def config_of(cls, path: str) -> FolderConfig:
        """The configuration for the directory `path` as it is now.

        Raises:
          InputError: the directory is missing, or its annotations have errors (all of them in one message).
        """
        directory = pathlib.Path(path).expanduser().resolve()
        rows = read_annotations(directory)
        title = re.sub(r"\W+", "_", directory.name)
        return FolderConfig(
            name=f"{title}-{_fingerprint(directory, rows)}",
            description=f"The clips that {ANNOTATIONS} in {directory} names.",
            directory=str(directory),
            rows=tuple(rows),
        )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, description=__doc__, features=schema.features())

    def clips(self) -> dict[str, Iterator[schema.ClipRecord]]:
        """The clips of each split, their videos as paths."""
        splits = assign_splits(self.builder_config.rows)
        return {split: map(self._clip, rows) for split, rows in splits.items()}

    def _clip(self, row: Row) -> schema.ClipRecord:
        return schema.ClipRecord(
            id=row.id,
            media=str(pathlib.Path(self.builder_config.directory, row.video)),
            captions=row.captions,
            questions=row.questions,
            start=row.start,
            end=row.end,
        )


def assign_splits(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each split that has any: as the lines say, or else by a hash of the video's path."""
    if any(row.split for row in rows):
        split_of = {row: row.split or "train" for row in rows}
    else:
        by_video = _hashed_splits({row.video for row in rows})
        split_of = {row: by_video[row.video] for row in rows}
    found = {split: [row for row in rows if split_of[row] == split] for split in ("train", "validation", "test")}
    return {split: some for split, some in found.items() if some}


def _hashed_splits(videos: set[str]) -> dict[str, str]:
    """A split for each video, the same on every machine, and for most videos whatever else is there."""
    ranks = {video: hash_share(video) for video in videos}
    ordered = sorted(videos, key=lambda video: (ranks[video], video))
    if len(ordered) < 3:
        return dict.fromkeys(ordered, "train")
    validation = max(1, sum(rank < 0.1 for rank in ranks.values()))
    test = max(1, sum(0.1 <= rank < 0.2 for rank in ranks.values()))
    while validation + test >= len(ordered):
        validation, test = (validation - 1, test) if validation > test else (validation, test - 1)
    names = ["validation"] * validation + ["test"] * test + ["train"] * (len(ordered) - validation - test)
    return dict(zip(ordered, names, strict=True))


def _fingerprint(directory: pathlib.Path, rows: Sequence[Row]) -> str:
    """A short hash of where the data is, what the annotations say and which files they name."""
    digest = hashlib.sha256(f"{directory}\n".encode())
    digest.update((directory / ANNOTATIONS).read_bytes())
    for video in sorted({row.video for row in rows}):
        stat = (directory / video).stat()
        digest.update(f"{video}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]
