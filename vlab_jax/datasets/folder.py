"""The `folder` data set: one's own clips, from a directory of videos with a file `annotations.jsonl`.

Each line of the file is a JSON object for one clip:

    {"video": "cooking/17.mp4", "start": 3.5, "end": 8, "captions": ["a man cuts an onion"],
     "questions": [{"question": "what is cut?", "answer": "an onion"}], "split": "train"}

`video` (a path within the directory) and `captions` are required. `id` is by default the video with its interval;
`start` and `end` are seconds. A question may have a `type`, for reports, and `options`, of which the answer is one.
Images serve as one-frame videos. If some lines name a split, the others go to train.
"""

import collections
import difflib
import hashlib
import json
import math
import os
import pathlib
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from vlab_jax.data.schema import ClipRecord, Question
from vlab_jax.datasets.annotations import SPLITS, AnnotationEntry, AnnotationSource, Protocol, hash_share
from vlab_jax.datasets.records import BuildOptions, ClipDataset
from vlab_jax.datasets.text_files import refuse_constant
from vlab_jax.errors import InputError

ANNOTATIONS = "annotations.jsonl"
MAX_PROBLEMS = 50  # in a report
_EXAMPLE = '{"video": "clip.mp4", "captions": ["a man cuts an onion"]}'
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# What would break a line of a log or of a list; a name may not have it, a caption may.
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


class FolderDataset:
    """The clips of a directory, which takes the place of a configuration in the spec: `folder:/my/videos`."""

    name = "folder"
    configs = ()

    def dataset(self, config: str, options: BuildOptions) -> ClipDataset:
        """The data set for the directory `config` as it is now.

        Raises:
          InputError: the directory is missing, or its annotations have errors (all of them in one message).
        """
        directory = pathlib.Path(config).expanduser().resolve()
        rows = read_annotations(directory)
        title = re.sub(r"\W+", "_", directory.name)

        def clip(row: AnnotationEntry) -> ClipRecord:
            media = str(directory / row.video)
            return ClipRecord(row.id, media, row.captions, row.questions, row.start, row.end)

        return ClipDataset(
            name=self.name,
            config=f"{title}-{_fingerprint(directory, rows)}",
            clips=lambda: {split: map(clip, some) for split, some in assign_splits(rows).items()},
            description=__doc__,
            config_description=f"The clips that {ANNOTATIONS} in {directory} names.",
            num_clips=len(rows),
        )

    def annotation_source(self, config: str, manual_dir: str = "") -> AnnotationSource:
        """The annotations of the directory `config`. Raises `InputError` as `dataset`."""
        directory = pathlib.Path(config).expanduser().absolute()
        splits = assign_splits(read_annotations(directory))
        protocol = Protocol("", "", dict.fromkeys(splits, ""), lambda split: iter(splits[split]))
        return AnnotationSource(f"{self.name}:{config}", protocol, [directory])


FOLDER = FolderDataset()


def _fingerprint(directory: pathlib.Path, rows: Sequence[AnnotationEntry]) -> str:
    """A short hash of the annotations and of each file's size and time: changed data is prepared anew."""
    digest = hashlib.sha256(f"{directory}\n".encode())
    digest.update((directory / ANNOTATIONS).read_bytes())
    for video in sorted({row.video for row in rows}):
        stat = (directory / video).stat()
        digest.update(f"{video}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def assign_splits(rows: Sequence[AnnotationEntry]) -> dict[str, list[AnnotationEntry]]:
    """The rows of each split that has any, as the lines say.

    If no line names a split, they follow from a hash of the video's path: about 80 % train, 10 % validation, 10 % test,
    at least one video each if there are three, and all clips of one video together.
    """
    hashed = {} if any(row.split for row in rows) else _hashed_splits({row.video for row in rows})
    splits: dict[str, list[AnnotationEntry]] = {split: [] for split in SPLITS}
    for row in rows:
        splits[row.split or hashed.get(row.video, "train")].append(row)
    return {split: some for split, some in splits.items() if some}


def _hashed_splits(videos: set[str]) -> dict[str, str]:
    """A split for each video, the same on every machine, and for most videos whatever other videos there are."""
    ordered = sorted(videos, key=lambda video: (hash_share(video), video))
    if len(ordered) < 3:
        return dict.fromkeys(ordered, "train")
    validation = max(1, sum(hash_share(video) < 0.1 for video in ordered))
    test = max(1, sum(0.1 <= hash_share(video) < 0.2 for video in ordered))
    while validation + test >= len(ordered):
        validation, test = (validation - 1, test) if validation > test else (validation, test - 1)
    names = ["validation"] * validation + ["test"] * test + ["train"] * (len(ordered) - validation - test)
    return dict(zip(ordered, names, strict=True))


def read_annotations(directory: str | pathlib.Path) -> list[AnnotationEntry]:
    """The lines of `annotations.jsonl` in `directory`, checked, with every video file in place.

    The split of a line that names none is empty.

    Raises:
      InputError: the directory or the file is missing, or its content has problems: all in one message, one a line,
        each with its line number (at most `MAX_PROBLEMS`).
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise InputError(f"folder: there is no directory {str(directory)!r}; give the one that holds {ANNOTATIONS}")
    path = directory / ANNOTATIONS
    if not path.is_file():
        raise InputError(f"folder: {str(path)!r} is missing; it has one line for each clip, such as {_EXAMPLE}")
    rows: dict[str, AnnotationEntry] = {}
    lines: dict[str, int] = {}  # by id
    problems: list[str] = []
    # Bytes are split, not text: JSON strings may hold characters that str.splitlines takes for line ends.
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = _parse(line)
        except ValueError as error:
            found = [str(error)]
        else:
            found = list(_clip_problems(fields, directory))
        if not found:
            row = _entry(fields)
            if lines.setdefault(row.id, number) != number:
                hint = "" if "id" in fields else "; give each clip of a video its own 'id', or its 'start' and 'end'"
                found = [f"id {row.id!r} is already that of line {lines[row.id]}{hint}"]
            rows[row.id] = row
        problems += [f"{ANNOTATIONS} line {number}: {problem}" for problem in found]
    if not problems and not rows:
        problems = [f"{ANNOTATIONS} has no line; a line for a clip is such as {_EXAMPLE}"]
    elif not problems and all(row.split in SPLITS[1:] for row in rows.values()):
        problems = [f"{ANNOTATIONS}: no line is in the split 'train'; put some there, or name no split at all"]
    if len(problems) > 1:
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        problems = ["\n".join([f"{len(problems)} problems", *problems[:MAX_PROBLEMS], *more])]
    if problems:
        raise InputError(f"folder {str(directory)!r}: {problems[0]}")
    return list(rows.values())


def _parse(line: bytes) -> dict[str, Any]:
    """The JSON object of a line, without its nulls. Raises `ValueError` if it is none."""
    try:
        fields = json.loads(line.decode(), object_pairs_hook=_object, parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8; save the file in that encoding") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg} at column {error.colno}); a line is such as {_EXAMPLE}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"is {_shown(fields)} and must be an object, such as {_EXAMPLE}")
    return fields


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, count in collections.Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"the key {_shown(key)} is given twice")
    return {key: value for key, value in pairs if value is not None}


def _entry(fields: dict[str, Any]) -> AnnotationEntry:
    video = posixpath.normpath(fields["video"])
    interval = f":{fields.get('start', 0)}-{fields.get('end', 'end')}" if {"start", "end"} & set(fields) else ""
    questions = (Question(**{**q, "options": tuple(q.get("options", ()))}) for q in fields.get("questions", []))
    return AnnotationEntry(
        id=fields.get("id", video + interval),
        video=video,
        split=fields.get("split", ""),
        captions=tuple(fields["captions"]),
        questions=tuple(questions),
        start=float(fields.get("start", 0)),
        end=float(fields.get("end", math.inf)),
    )


def _is_text(value: Any) -> bool:
    """Whether it is a text that is not empty and can be written; half of a surrogate pair cannot."""
    return isinstance(value, str) and bool(value.strip()) and not _SURROGATE.search(value)


def _is_name(value: Any) -> bool:
    return _is_text(value) and not _CONTROL.search(value)


def _is_seconds(value: Any) -> bool:
    # bool is an int to Python; 1e999 is an infinity to json, and some integers are too long for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12


# Yields what is wrong with the value of a key.
_Check = Callable[[str, Any], Iterator[str]]


def _must(is_right: Callable[[Any], bool], be: str) -> _Check:
    def check(key: str, value: Any) -> Iterator[str]:
        if not is_right(value):
            yield f"'{key}' is {_shown(value)} and must be {be}{suggest(value, SPLITS) if key == 'split' else ''}"

    return check


def _check_texts(key: str, value: Any) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"'{key}' is {_shown(value)} and must be a list of texts"
    elif not value:
        yield f"'{key}' is empty; give at least one text"
    else:
        for index, text in enumerate(value, start=1):
            if not _is_text(text):
                yield f"number {index} of '{key}' is {_shown(text)} and must be a text that is not empty"


_FIELDS: dict[str, _Check] = {
    "video": _must(_is_name, "the path of a file in the folder, without control characters"),
    "id": _must(_is_name, "a text that is not empty, without control characters"),
    **dict.fromkeys(("start", "end"), _must(_is_seconds, "a number of seconds, 0 or more")),
    "captions": _check_texts,
    "questions": _must(lambda value: isinstance(value, list), "a list of objects"),
    "split": _must(lambda value: value in SPLITS, f"one of {', '.join(SPLITS)}"),
}
_QUESTION_FIELDS: dict[str, _Check] = {
    **dict.fromkeys(("question", "answer", "type"), _must(_is_text, "a text that is not empty")),
    "options": _check_texts,
}


def _field_problems(fields: dict[str, Any], known: Mapping[str, _Check], required: Sequence[str]) -> Iterator[str]:
    """Unknown and missing keys, and values that are not what they must be."""
    for key, value in fields.items():
        if key in known:
            yield from known[key](key, value)
        else:
            yield f"unknown key {key!r}{suggest(key, known)}; known: {', '.join(known)}"
    yield from (f"'{key}' is missing" for key in required if key not in fields)


def _clip_problems(fields: dict[str, Any], directory: pathlib.Path) -> Iterator[str]:
    """Everything that is wrong with one line by itself."""
    yield from _field_problems(fields, _FIELDS, ("video", "captions"))
    video, start, end = fields.get("video"), fields.get("start", 0), fields.get("end", math.inf)
    if _is_name(video):
        yield from _video_problems(video, directory)
    if _is_seconds(start) and (end == math.inf or _is_seconds(end)) and not start < end:
        yield f"'start' {start} is not before 'end' {end}"
    questions = fields.get("questions", [])
    for index, question in enumerate(questions if isinstance(questions, list) else [], start=1):
        yield from (f"question {index}: {problem}" for problem in _question_problems(question))


def _video_problems(video: str, directory: pathlib.Path) -> Iterator[str]:
    if posixpath.isabs(video) or ".." in pathlib.PurePosixPath(video).parts:
        yield f"video {video!r} leaves the folder; give a path within it, without '..'"
    elif not os.path.isfile(directory / video):  # unlike Path.is_file, it takes names that are too long
        yield f"video {video!r} is not in the folder"
    elif not (directory / video).stat().st_size:
        yield f"video {video!r} is an empty file"


def _question_problems(question: Any) -> Iterator[str]:
    if not isinstance(question, dict):
        yield f"is {_shown(question)} and must be an object with 'question' and 'answer'"
        return
    problems = list(_field_problems(question, _QUESTION_FIELDS, ("question", "answer")))
    if not problems and "options" in question and question["answer"] not in question["options"]:
        problems = ["'answer' is not among 'options'"]
    yield from problems


def _shown(value: Any) -> str:
    """A value as JSON writes it, cut short."""
    spelled = _SURROGATE.sub(lambda found: f"\\u{ord(found.group()):04x}", json.dumps(value, ensure_ascii=False))
    return spelled if len(spelled) <= 40 else f"{spelled[:40]}..."


def suggest(word: Any, known: Iterable[str]) -> str:
    """The end of a message: the one of the `known` words that is nearest, if any is near."""
    # Loose enough for abbreviations such as "val".
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.45)
    return f" (did you mean {near[0]!r}?)" if near else ""
