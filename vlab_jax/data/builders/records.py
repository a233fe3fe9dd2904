"""A prepared data set on a disk: ArrayRecord files, what TFDS needs to read them, and the list of what failed.

TFDS's own writer is not used: over a gigabyte a split it needs TensorFlow, and twice the room on the disk. What is
written is the same: `tfds.builder_from_directory` reads it, and the clips of a shard are in the order in which TFDS
shuffles them.
"""

import logging
import pathlib
from collections.abc import Iterable, Sequence

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core.constants import DATASET_INFO_FILENAME
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tensorflow_datasets.core.hashing import Hasher
from tensorflow_datasets.core.naming import ShardedFileTemplate

from vlab_jax.data import schema
from vlab_jax.data.builders.store import Stored
from vlab_jax.errors import InputError

SHARD_BYTES = 1 << 30
# Beside the records: a line for each clip that is stored without media, of split, id and reason.
FAILURES = "failures.tsv"
_NAMED_IN_LOG = 10
_HOPELESS = 100


def is_prepared(files: pathlib.Path) -> bool:
    """Whether the directory holds a data set that is complete; its description is written last."""
    return (files / DATASET_INFO_FILENAME).exists()


def split_info(folder: pathlib.Path, name: str, split: str, shards: Sequence[tuple[int, int]]) -> tfds.core.SplitInfo:
    """What TFDS needs to know of a split of data set `name`: clips and bytes of each of its shards."""
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=[clips for clips, _ in shards],
        num_bytes=sum(size for _, size in shards),
        filename_template=ShardedFileTemplate(
            epath.Path(folder), dataset_name=name, split=split, filetype_suffix="array_record"
        ),
    )


def shard_path(split: tfds.core.SplitInfo, shard: int, shards: int) -> pathlib.Path:
    """The file of one of so many shards of a split."""
    return pathlib.Path(split.filename_template.sharded_filepath(shard_index=shard, num_shards=shards))


def write_shard(path: pathlib.Path, records: Iterable[bytes]) -> tuple[int, int]:
    """Writes an ArrayRecord file; returns how many records, and their bytes."""
    clips = size = 0
    writer = ArrayRecordWriter(str(path), "group_size:1")  # each record is read by itself
    for record in records:
        writer.write(record)
        clips, size = clips + 1, size + len(record)
    writer.close()
    return clips, size


def write_split(stored: Iterable[Stored], folder: pathlib.Path, name: str, split: str) -> tfds.core.SplitInfo:
    """Writes the shards of a split, one after the other; memory holds a shard.

    Raises `InputError` where two clips of a shard have one id.
    """
    hasher = Hasher(split)
    written: list[tuple[int, int]] = []
    pending: dict[int, bytes] = {}
    size = 0

    def write() -> None:
        path = folder / f"{split}-{len(written):05d}.part"
        written.append(write_shard(path, (pending[key] for key in sorted(pending))))
        pending.clear()

    for clip in stored:
        key = hasher.hash_key(clip.id)
        if key in pending:
            raise InputError(f"data set {name}: two clips of split {split} have the id {clip.id!r}; ids must differ")
        pending[key] = clip.record
        size += len(clip.record)
        if size >= SHARD_BYTES:
            write()
            size = 0
    if pending:
        write()
    info = split_info(folder, name, split, written)
    for shard in range(len(written)):
        (folder / f"{split}-{shard:05d}.part").rename(shard_path(info, shard, len(written)))
    return info


def write_description(
    builder: tfds.core.DatasetBuilder, variant: str, folder: pathlib.Path, splits: Sequence[tfds.core.SplitInfo]
) -> None:
    """Writes what makes the files in `folder` a data set of TFDS; splits without clips are left out.

    Raises `InputError` where no split has any.
    """
    splits = [split for split in splits if split.num_examples]
    if not splits:
        raise InputError(f"data set {builder.info.full_name} has no clip at all")
    described = builder.info
    identity = DatasetIdentity.from_builder(builder)
    identity.data_dir, identity.module_name = str(folder), ""
    info = tfds.core.DatasetInfo(
        builder=identity,
        description=described.description,
        features=schema.features(variant),
        homepage=next(iter(described.as_proto.location.urls), None),  # `homepage` makes one up
        citation=described.citation,
        license=described.redistribution_info.license,
    )
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(folder)


class Failures:
    """Counts the clips that are stored without media, and lists them in a file.

    Attributes:
      clips, failed: of all splits, so far.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.clips = self.failed = 0
        self._file = folder / FAILURES
        self._last = ""

    def count(self, split: str, clips: int, failures: Sequence[tuple[str, str]]) -> None:
        """Counts clips of a split; `failures` are the ids of those without media, and the reasons.

        Raises `InputError` where none of the first hundred has any.
        """
        self.clips += clips
        for name, reason in failures:
            self.failed += 1
            self._last = f"{name}: {reason}"
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{split}\t{name}\t{reason}\n")
            if self.failed <= _NAMED_IN_LOG:
                logging.warning("stored without media: %s", self._last)
        if self.clips >= _HOPELESS:
            self._refuse_if_all()

    def finish(self, files: pathlib.Path) -> None:
        """Says where the list will be: in `files`.

        Raises `InputError` where no clip has media.
        """
        self._refuse_if_all()
        if self.failed:
            told = (self.failed, self.clips, files / FAILURES)
            logging.warning("%d of %d clips are stored without media; listed in %s", *told)

    def _refuse_if_all(self) -> None:
        if self.failed and self.failed == self.clips:
            raise InputError(f"none of {self.clips} clips has media that can be decoded; the last, {self._last}")
