"""Annotations of official data sets: clips read from the authors' files, and how many of them there must be."""

import dataclasses
import hashlib
import math
import pathlib
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from vlab_jax.data.schema import Question
from vlab_jax.datasets.text_files import TextFile
from vlab_jax.errors import InputError

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class AnnotationEntry:
    """A clip in the annotation files, before its media are looked up.

    Attributes:
      id: unique in its split.
      video: name of its media, without extension; with `/` in it, the folders are part of the name.
      split: one of `SPLITS`.
      start, end: seconds within the media; `end` is infinite if the clip ends with its media.
      aliases: other names of the same media.
      rows: rows of the annotation file whose texts are joined into one.
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
class Protocol:
    """A configuration of an official data set.

    Attributes:
      name: what follows the data set's name, as in `msrvtt/captioning`.
      description: whose protocol it is, and what each split is.
      files: the names of the annotation files that each split needs, separated by spaces; alternative names of a file
        by `|`, the preferred one first; a name may be a glob of several files, as in `train/*.parquet`. A split is left
        out if it lacks a file.
      read: yields the entries of a split, in the files' order, from the split's name, its files, and those in
        `optional`; raises `InputError`.
      expected: the official numbers of clips, videos, captions, questions and rows, as far as they are checked, of a
        split, or of several together, as in `train+validation`.
      optional: further files; `read` gets None for each that does not exist.
    """

    name: str
    description: str
    files: Mapping[str, str]
    read: Callable[..., Iterator[AnnotationEntry]]
    expected: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    optional: str = ""


class AnnotationSource:
    """The annotations of one configuration of a data set.

    Args:
      name: the data set with its configuration, as in `msrvtt/captioning`.
      folders: where annotation files and media are, in order of preference.

    Attributes:
      splits: the splits that have all their annotation files.
      left_out: the other splits, and the files that each lacks.
      paths: the annotation files that exist, or the archives that hold them, sorted.

    Raises:
      InputError: an archive in the folders is damaged.
    """

    def __init__(self, name: str, protocol: Protocol, folders: Sequence[pathlib.Path]) -> None:
        self.name, self.protocol, self.folders = name, protocol, tuple(folders)
        names = " ".join([*protocol.files.values(), protocol.optional]).split()
        self._found = {each: find_files(self.folders, each) for each in dict.fromkeys(names)}
        lacking = {
            split: [each.replace("|", " or ") for each in files.split() if not self._found[each]]
            for split, files in protocol.files.items()
        }
        self.splits = [split for split, files in lacking.items() if not files]
        self.left_out = {split: files for split, files in lacking.items() if files}
        self.paths = sorted({file.path for files in self._found.values() for file in files})

    def read(self, split: str, counts: Counter[str] | None = None) -> Iterator[AnnotationEntry]:
        """Yields the entries of a split. Raises `InputError`.

        Args:
          counts: gets the numbers of clips, captions, questions and rows, and of videos if that is checked.
        """
        counts = Counter() if counts is None else counts
        videos: set[str] = set()
        expected = self.protocol.expected.items()
        count_videos = any(split in joined.split("+") and "videos" in numbers for joined, numbers in expected)
        names = f"{self.protocol.files[split]} {self.protocol.optional}".split()
        files = [file for each in names for file in self._found[each] or (None,)]
        for entry in self.protocol.read(split, *files):
            counts["clips"] += 1
            counts["captions"] += len(entry.captions)
            counts["questions"] += len(entry.questions)
            counts["rows"] += entry.rows
            if count_videos:
                videos.add(entry.video)
                counts["videos"] = len(videos)
            yield entry

    def count_problems(self, counts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
        """Yields a line for each number that is not the official one; splits without counts are skipped."""
        for joined, expected in self.protocol.expected.items():
            splits = joined.split("+")
            if not set(splits) <= set(counts):
                continue
            names = " ".join(self.protocol.files[split] for split in splits).split()
            files = dict.fromkeys(str(file) for each in names for file in self._found[each])
            for name, wanted in expected.items():
                found = sum(counts[split][name] for split in splits)
                if found != wanted:
                    yield (
                        f"{joined} has {found:,} {name}, and the official files have {wanted:,}; "
                        f"get anew, as the authors ship it: {', '.join(files)}"
                    )


def find_files(folders: Iterable[pathlib.Path], names: str) -> list[TextFile]:
    """The files of the first of the alternative `names` that exists: all matches of a glob, sorted, or one file.

    It is looked for in the folders, one level deeper, and in the zip archives at either level.

    Raises:
      InputError: an archive is damaged.
    """
    for name in names.split("|"):
        for folder in folders:
            if found := _find_plain(folder, name) or _find_zipped(folder, name):
                return found
    return []


def _find_plain(folder: pathlib.Path, name: str) -> list[TextFile]:
    paths = sorted(filter(pathlib.Path.is_file, folder.glob(name)))
    if "*" not in name:
        paths = (paths or sorted(filter(pathlib.Path.is_file, folder.glob(f"*/{name}"))))[:1]
    return [TextFile(path, top=folder) for path in paths]


def _find_zipped(folder: pathlib.Path, name: str) -> list[TextFile]:
    """The member with this name, in any folder of the archive, in the first archive that has one."""
    for pattern in () if "*" in name else ("*.zip", "*/*.zip"):
        for path in sorted(folder.glob(pattern)):
            try:
                with zipfile.ZipFile(path) as archive:
                    members = archive.namelist()
            except (zipfile.BadZipFile, OSError) as error:
                message = f"{path} is no archive that can be read ({error}); get it anew, or move it away"
                raise InputError(message) from error
            for member in members:
                # macOS adds members of the same name when it zips a folder.
                if pathlib.PurePosixPath(member).match(name) and not member.startswith("__MACOSX/"):
                    return [TextFile(path, member, folder)]
    return []


def in_split(video: str, split: str, validation_share: float) -> bool:
    """Whether a video belongs to our `split`, where a share of the authors' training videos becomes validation.

    Validation videos are chosen by a hash of their names. Every video of the authors' test file is in `test`.
    """
    return split == "test" or (hash_share(video) < validation_share) == (split == "validation")


def hash_share(name: str) -> float:
    """A number from 0 to 1 (exclusive) that depends on the name alone, the same on every machine."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8


def question_entries(split: str, questions: Iterable[tuple[str, Question]]) -> Iterator[AnnotationEntry]:
    """Yields each video with all its questions, videos in the order of their first question."""
    by_video: dict[str, list[Question]] = {}
    for video, question in questions:
        by_video.setdefault(video, []).append(question)
    for video, of_video in by_video.items():
        yield AnnotationEntry(video, video, split, questions=tuple(of_video))
