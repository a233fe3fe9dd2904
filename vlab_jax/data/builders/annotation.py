"""What an official data set is: entries read from the authors' files, and how many of them there must be."""

import dataclasses
import hashlib
import math
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence

from vlab_jax.data.schema import Question
from vlab_jax.data.text_files import TextFile
from vlab_jax.errors import InputError

SPLITS = ("train", "validation", "test")
# Names of one file, best first; each may be a glob, as in `train/*.parquet`.
Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
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
    read: Callable[[AnnotationFolder, str], Iterator[Entry]]
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

    def add(self, entry: Entry) -> None:
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
