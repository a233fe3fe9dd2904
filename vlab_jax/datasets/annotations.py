"""What an official data set is: entries read from the authors' files, and how many of them there must be."""

import csv
import dataclasses
import hashlib
import math
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from vlab_jax.data.schema import Question
from vlab_jax.datasets.text_files import AnyFile, TextFile, quoted, read_json, read_table, text_of
from vlab_jax.errors import InputError

# FOLDED vlab_jax/datasets/annotations.py: Readers of the official question files of video QA; each yields (video id,
# question) in the file's order.  Video ids are the file's own, as text. They name media thus:  - MSRVTT-QA: the
# number in MSR-VTT's `video7010`. - MSVD-QA: the 1-based place among MSVD's 1970 videos in the order of its caption
# splits: 1200 train, 100 validation,   670 test. The splits of MSVD-QA are others: its validation is 1201 to 1450,
# its test 1451 to 1970. - TGIF-QA: the name of the GIF, without `.gif`.  Texts lose surrounding space. The first
# thing that is wrong is an InputError of one line, with the line's number; in JSON, which has its questions on one
# line, with the question's place. A file without any question is cut short, and is refused too.

# The types by which MSRVTT-QA and MSVD-QA are reported (Xu et al., ACM Multimedia 2017).
QUESTION_WORDS = ("what", "who", "how", "when", "where")
# In the order of TGIF-QA's column `type`, 0 to 3.
FRAMEQA_TYPES = ("object", "number", "color", "location")
# Tasks of TGIF-QA (Jang et al., CVPR 2017), and how the `vid_id` of their questions begins.
TGIF_TASKS = {"frameqa": "FRAMEQA", "count": "COUNT", "action": "ACTION", "transition": "TRANS"}
_OPTIONS = ("a1", "a2", "a3", "a4", "a5")


def read_qa_json(path: AnyFile) -> list[tuple[str, Question]]:
    """MSRVTT-QA and MSVD-QA as published: a JSON list of objects with `video_id`, `question` and `answer`.

    The type of a question is its first word, if one of `QUESTION_WORDS`, else `other`.

    Raises:
        InputError: the file is missing, is not such a list, or has no question.
    """
    records = read_json(path)
    if not isinstance(records, list):
        raise InputError(f"{path} is JSON but no list; it must be a list of objects with video_id, question and answer")
    return _not_empty([_json_question(record, f"{path} question {i}") for i, record in enumerate(records, 1)], path)


def read_answer_list(path: AnyFile) -> tuple[str, ...]:
    """A closed list of answers: a JSON list of texts, as published beside MSRVTT-QA.

    Raises:
        InputError: the file is missing, or is not such a list.
    """
    answers = read_json(path)
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise InputError(f"{path} must be a JSON list of answers, each a text that is not empty")
    return tuple(answer.strip() for answer in answers)


def _json_question(record: Any, where: str) -> tuple[str, Question]:
    if not isinstance(record, dict):
        raise InputError(f"{where}: is no object; it must have video_id, question and answer")
    # A bool is an int to Python.
    video = record.get("video_id")
    texts = {**record, "video_id": str(video)} if type(video) is int else record
    return _open_question(texts, "video_id", where)


def read_qa_csv(path: AnyFile) -> list[tuple[str, Question]]:
    """MSVD-QA and MSRVTT-QA as HQGA has them: a comma-separated table with `video`, `question` and `answer`.

    Other columns are passed over. Types as in `read_qa_json`; HQGA's column `type` holds MSR-VTT's category.

    Raises:
        InputError: the file is missing, a column is, a line has more or fewer fields than the header, or there is
            no question.
    """
    rows = read_table(path, ("video", "question", "answer"), delimiter=",", strict=True)
    return _not_empty([_open_question(row, "video", where) for where, row in rows], path)


def read_tgif_qa(path: AnyFile, task: str) -> list[tuple[str, Question]]:
    """TGIF-QA as published: a tab-separated table, despite its name `Test_action_question.csv`.

    The answer of `frameqa` is open-ended, and the type of a question is one of `FRAMEQA_TYPES`. For the others the
    type is the task: the answer of `count` is a number in digits; those of `action` and `transition` are one of five
    options.

    Args:
        path: the file.
        task: one of `TGIF_TASKS`, and that of the file.

    Raises:
        InputError: as `read_qa_csv`; no such task, or a question of another task.
    """
    if task not in TGIF_TASKS:
        raise InputError(f"TGIF-QA has no task {task!r}; its tasks: {', '.join(TGIF_TASKS)}")
    columns = {"frameqa": ("type",), "count": ()}.get(task, _OPTIONS)
    # Nothing in these files is quoted: a quotation mark is part of a text.
    rows = read_table(
        path, ("gif_name", "question", *columns, "answer", "vid_id"), delimiter="\t", quoting=csv.QUOTE_NONE
    )
    return _not_empty([_tgif_question(row, task, where) for where, row in rows], path)


def by_video(questions: Iterable[tuple[str, Question]]) -> dict[str, tuple[Question, ...]]:
    """The questions of each video, videos in the order of their first question."""
    grouped: dict[str, list[Question]] = {}
    for video, question in questions:
        grouped.setdefault(video, []).append(question)
    return {video: tuple(asked) for video, asked in grouped.items()}


def _tgif_question(row: Mapping[str, str], task: str, where: str) -> tuple[str, Question]:
    if not row["vid_id"].startswith(TGIF_TASKS[task]):
        raise InputError(
            f"{where}: vid_id {quoted(row['vid_id'])} is of another task than {task!r}; give the file of {task!r}"
        )
    video, question, answer = (text_of(row, column, where) for column in ("gif_name", "question", "answer"))
    if task == "frameqa":
        return video, Question(question, answer, FRAMEQA_TYPES[_index(row, "type", FRAMEQA_TYPES, where)])
    if task == "count":
        if not re.fullmatch(r"[0-9]+", answer):
            raise InputError(f"{where}: the answer {quoted(answer)} is no count; it must be a number in digits")
        return video, Question(question, answer, task)
    options = tuple(text_of(row, column, where) for column in _OPTIONS)
    return video, Question(question, options[_index(row, "answer", options, where)], task, options)


def _open_question(row: Mapping[str, Any], video_column: str, where: str) -> tuple[str, Question]:
    video, question, answer = (text_of(row, column, where) for column in (video_column, "question", "answer"))
    first = re.match(r"[a-z]*", question.lower()).group()
    return video, Question(question, answer, first if first in QUESTION_WORDS else "other")


def _index(row: Mapping[str, str], column: str, choices: tuple[str, ...], where: str) -> int:
    value = row[column].strip()
    if value not in map(str, range(len(choices))):
        raise InputError(f"{where}: {column!r} is {quoted(value)}; it must be a number from 0 to {len(choices) - 1}")
    return int(value)


def _not_empty(questions: list[tuple[str, Question]], path: AnyFile) -> list[tuple[str, Question]]:
    if not questions:
        raise InputError(f"{path} line 1: the file has no question; get it anew")
    return questions


SPLITS = ("train", "validation", "test")
# Names of one file, best first; each may be a glob, as in `train/*.parquet`.
Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class AnnotationEntry:
    """A clip as the annotation files say it; its media are not looked up.

    Attributes:
      id: differs from that of every other entry of its split.
      video: name of its media, without extension; it may hold `/`, and the folders are then part of the name.
      split: one of `SPLITS`.
      start, end: seconds within the media; `end` is infinite where the clip ends with its media.
      aliases: other names that copies of the media go by.
      rows: of the annotation file: several, where their texts are one paragraph.
    """

    id: str
    video: str
    split: str
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    start: float = 0.0
    end: float = math.inf
    aliases: tuple[str, ...] = ()
    rows: int = 1


@dataclasses.dataclass(frozen=True)
class Counts:
    """How many there are of each; None: not checked."""

    clips: int | None = None
    videos: int | None = None
    captions: int | None = None
    questions: int | None = None
    rows: int | None = None


class AnnotationFolder:
    """Where the annotation files of a data set lie: in its folders, one folder deeper, or in a zip archive of either.

    Args:
      folders: looked into in this order.
    """

    def __init__(self, folders: Sequence[pathlib.Path]) -> None:
        self.folders = tuple(folders)
        self._found: dict[Names, list[TextFile]] = {}

    def find_all(self, names: Names) -> list[TextFile]:
        """The files of the first of these names that there is, sorted; of a name that is no glob, one.

        Raises:
          InputError: an archive that was looked into is damaged.
        """
        if names not in self._found:
            looked = (_plain(folder, name) or _zipped(folder, name) for name in names for folder in self.folders)
            found = next(filter(None, looked), [])
            self._found[names] = found
        return self._found[names]

    def find(self, names: Names) -> TextFile | None:
        """The file of the first of these names that there is."""
        return next(iter(self.find_all(names)), None)

    def need(self, names: Names) -> TextFile:
        """The file of the first of these names that there is. Raises InputError where there is none."""
        found = self.find(names)
        if found is None:
            where = " or ".join(map(str, self.folders))
            raise InputError(f"{' or '.join(names)} is missing in {where}; put it there, zipped or not")
        return found


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One configuration of an official data set.

    Attributes:
      name: what it is called behind the data set's name, as in `msrvtt/captioning`.
      description: whose protocol it is, and which split is what.
      files: of each split, the annotation files that it is read from; a split without them is left out.
      read: the entries of a split, in the files' order, from the folder that holds the files; raises InputError.
      expected: the official counts of a split, or of several together, as in `train+validation`.
      optional: files that `read` takes into account where they are there.
    """

    name: str
    description: str
    files: Mapping[str, tuple[Names, ...]]
    read: Callable[[AnnotationFolder, str], Iterator[AnnotationEntry]]
    expected: Mapping[str, Counts] = dataclasses.field(default_factory=dict)
    optional: tuple[Names, ...] = ()

    def splits(self, folder: AnnotationFolder) -> list[str]:
        """The splits whose annotation files are all there."""
        return [split for split, files in self.files.items() if not self.missing(folder, split)]

    def missing(self, folder: AnnotationFolder, split: str) -> list[str]:
        """The names of the annotation files that a split lacks, alternatives joined."""
        return [" or ".join(names) for names in self.files[split] if folder.find(names) is None]

    def sources(self, folder: AnnotationFolder, split: str) -> list[TextFile]:
        """The annotation files of a split that are there."""
        return [file for names in (*self.files[split], *self.optional) for file in folder.find_all(names)]

    def tally(self, split: str) -> "Tally":
        """A counter for the entries of a split."""
        return Tally(videos=any(split in each.split("+") and counts.videos for each, counts in self.expected.items()))

    def problems(self, tallies: Mapping[str, "Tally"], folder: AnnotationFolder) -> Iterator[str]:
        """Each count that is not the official one, by name, in a line; splits that were not counted are passed over."""
        for joined, expected in self.expected.items():
            splits = joined.split("+")
            if not set(splits) <= set(tallies):
                continue
            names = [names for split in splits for names in self.files[split]]
            files = dict.fromkeys(str(file) for each in names for file in folder.find_all(each)[:3])
            for name, wanted in dataclasses.asdict(expected).items():
                found = sum(tallies[split].counts[name] for split in splits)
                if wanted is not None and found != wanted:
                    yield (
                        f"{joined} has {found:,} {name}, and the official files have {wanted:,}; "
                        f"get anew, as the authors ship it: {', '.join(files)}"
                    )


def held_out(video: str, share: float) -> bool:
    """Whether a training video serves as validation where the authors have no such split: by a hash of its name."""
    return hash_share(video) < share


def serves(video: str, split: str, share: float) -> bool:
    """Whether a video of the authors' files is of our `split`, where a `share` of training is `held_out`."""
    return split == "test" or held_out(video, share) == (split == "validation")


def hash_share(name: str) -> float:
    """A number from 0 to 1 (exclusive) that follows from the name alone, the same on every machine."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8


class Tally:
    """Counts the entries of a split as they go by.

    Args:
      videos: whether videos are counted, too; their names are kept for that.

    Attributes:
      counts: by the names of `Counts`.
    """

    def __init__(self, *, videos: bool = False) -> None:
        self.counts = {field.name: 0 for field in dataclasses.fields(Counts)}
        self._videos: set[str] | None = set() if videos else None

    def add(self, entry: AnnotationEntry) -> None:
        """Counts an entry."""
        self.counts["clips"] += 1
        self.counts["captions"] += len(entry.captions)
        self.counts["questions"] += len(entry.questions)
        self.counts["rows"] += entry.rows
        if self._videos is not None:
            self._videos.add(entry.video)
            self.counts["videos"] = len(self._videos)


def _plain(folder: pathlib.Path, name: str) -> list[TextFile]:
    """Files of a name in a folder, or else, if it is no glob, one folder deeper."""
    for pattern in (name,) if "*" in name else (name, f"*/{name}"):
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if found:
            return [TextFile(path) for path in (found if "*" in name else found[:1])]
    return []


def _zipped(folder: pathlib.Path, name: str) -> list[TextFile]:
    """The member of a name, in whatever folder, of the first archive that has one, in a folder or one folder deeper."""
    for pattern in () if "*" in name else ("*.zip", "*/*.zip"):
        for path in sorted(folder.glob(pattern)):
            for member in _members(path):
                # macOS adds members of the same name when it zips a folder.
                if pathlib.PurePosixPath(member).match(name) and not member.startswith("__MACOSX/"):
                    return [TextFile(path, member)]
    return []


def _members(path: pathlib.Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{path} is no archive that can be read ({error}); get it anew, or move it away") from error
