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
import hashlib
import pathlib
import re
from collections.abc import Iterator, Sequence

import tensorflow_datasets as tfds

from vlab_jax.data import schema
from vlab_jax.data.builders.annotation import hash_share
from vlab_jax.data.builders.clip_builder import ClipBuilder
from vlab_jax.data.builders.folder_annotations import ANNOTATIONS, Row, read_annotations


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

    def clips(self) -> dict[str, Iterator[schema.Clip]]:
        """The clips of each split, their videos as paths."""
        splits = assign_splits(self.builder_config.rows)
        return {split: map(self._clip, rows) for split, rows in splits.items()}

    def _clip(self, row: Row) -> schema.Clip:
        return schema.Clip(
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
