"""A prepared data set on a disk: ArrayRecord files, what TFDS needs to read them, and the list of what failed.

TFDS's own writer is not used: over a gigabyte a split it needs TensorFlow, and twice the room on the disk. What is
written is the same: `tfds.builder_from_directory` reads it, and the clips of a shard are in the order in which TFDS
shuffles them.
"""

import dataclasses
import errno
import functools
import logging
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core.constants import DATASET_INFO_FILENAME
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.hashing import Hasher
from tensorflow_datasets.core.naming import ShardedFileTemplate

from vlab_jax.data import frames, schema, video
from vlab_jax.data.media import DEFAULT_LIMITS, MediaLimits
from vlab_jax.errors import InputError

# FOLDED vlab_jax/datasets/records.py: Where data sets are read from and written to, and in which form: what
# `prepare` needs to know besides a spec.

VARIANTS = ("file", "frames")
_RANGES = {
    "frame_rate": (0.01, 1000.0),
    "short_side": (16, 65500),  # as much as JPEG allows
    "jpeg_quality": (1, 100),
    "workers": (-1, 1024),
}


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """How data sets are prepared.

    Attributes:
      directory: where prepared data sets live, made if missing; empty: TFDS's default (`TFDS_DATA_DIR`, or
        `~/tensorflow_datasets`).
      manual_dir: where official annotation files and media lie: `<manual_dir>/<data set name>/`, or `manual_dir`
        itself.
      allow_missing: leave out clips whose media are missing, instead of refusing to build.
      variant: `file`: encoded files as obtained; `frames`: resized JPEG frames.
      frame_rate: of the frames variant: frames a second, at most.
      short_side: of the frames variant: pixels of the short side, at most.
      jpeg_quality: of the frames variant: 1 to 100.
      workers: of the frames variant: processes that decode; -1: one for each core; 0: this process.
      limits: what reading and decoding one clip may take.
    """

    directory: str = ""
    manual_dir: str = ""
    allow_missing: bool = False
    variant: str = "file"
    frame_rate: float = 4.0
    short_side: int = 256
    jpeg_quality: int = 90
    workers: int = -1
    limits: MediaLimits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise InputError(f"variant is {self.variant!r}; it must be one of {', '.join(VARIANTS)}")
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name} is {getattr(self, name)}; it must be from {low} to {high}")

    @property
    def form(self) -> str:
        """What a directory's name ends with, so that each form has its own; nothing for the variant `file`."""
        if self.variant == "file":
            return ""
        return f"-{self.variant}_{self.frame_rate:g}fps_{self.short_side}px_q{self.jpeg_quality}"

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "BuildOptions":
        """The options that the `data` fields of a config say (`config.build_fields`); other fields are passed over."""
        plain = {field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name != "limits"}
        return cls(**plain, limits=MediaLimits.from_fields(fields["limits"]))


# FOLDED vlab_jax/datasets/records.py: Whole files, on a disk or, where their path has `://` in it, in a store that Apache
# Beam knows (gs, s3, hdfs).


def read_file(path: str, most: int | None = None) -> bytes:
    """What the file holds. Raises `OSError`, also where it is more than `most` bytes."""
    with _file_systems().open(path) if _is_remote(path) else open(path, "rb") as file:
        if most is None:
            return file.read()
        size = 0 if _is_remote(path) else os.fstat(file.fileno()).st_size
        content = file.read(most + 1) if size <= most else b""
    if max(size, len(content)) > most:
        raise OSError(errno.EFBIG, f"is larger than {most:,} bytes, which data.limits.max_bytes allows", path)
    return content


def exists(path: str) -> bool:
    """Whether there is such a file."""
    return _file_systems().exists(path) if _is_remote(path) else os.path.exists(path)


def put_file(local: pathlib.Path, path: str) -> None:
    """Copies a local file to `path`, where it appears when it is complete. Raises `OSError`."""
    if _is_remote(path):
        with local.open("rb") as source, _file_systems().create(path) as target:
            shutil.copyfileobj(source, target, 1 << 20)
        return
    beside = f"{path}.{uuid.uuid4().hex}.part"  # two machines may write the same
    shutil.copyfile(local, beside)
    os.replace(beside, path)


def _is_remote(path: str) -> bool:
    return "://" in path


def _file_systems() -> Any:
    from apache_beam.io.filesystems import FileSystems  # an optional package, which such paths come from

    return FileSystems


SHARD_BYTES = 1 << 30
# Beside the records: a line for each clip that is stored without media, of split, id and reason.
FAILURES = "failures.tsv"
# FOLDED vlab_jax/datasets/records.py: How a clip is stored: its media read, or made into frames, and all of it
# as one record.  A clip whose media cannot be read or decoded is stored without any, so that every variant of a
# data set holds the same clips: whoever reads it is told, counts it, and names it, as with a file that cannot be
# decoded.


class Stored(NamedTuple):
    """A clip as a record, and why it has no media, where it has none."""

    id: str
    record: bytes
    failure: str = ""


def store(clip: schema.ClipRecord, options: BuildOptions) -> Stored:
    """The clip in the form that `options` say."""
    try:
        media = read(clip.media, options.limits.max_bytes)
        if options.variant == "frames" and isinstance(media, bytes):
            form = {"frame_rate": options.frame_rate, "short_side": options.short_side, "quality": options.jpeg_quality}
            media = tuple(frames.store(media, start=clip.start, end=clip.end, limits=options.limits, **form))
    except (OSError, video.DecodeError) as error:
        return without_media(clip, options, " ".join(str(error).split()))
    return _stored(clip, media, options.variant)


def without_media(clip: schema.ClipRecord, options: BuildOptions, failure: str) -> Stored:
    """The clip without the media that cannot be had, for the reason `failure`."""
    return _stored(clip, b"" if options.variant == "file" else (), options.variant)._replace(failure=failure)


def read(media: bytes | tuple[bytes, ...] | str, most: int | None = None) -> bytes | tuple[bytes, ...]:
    """The media of a clip that is not stored yet: given, or those of a file, of `most` bytes. Raises `OSError`."""
    return read_file(media, most) if isinstance(media, str) else media


def _stored(clip: schema.ClipRecord, media: bytes | tuple[bytes, ...], variant: str) -> Stored:
    features, serializer = _serializer(variant)
    example = schema.to_example(dataclasses.replace(clip, media=media))
    return Stored(clip.id, serializer.serialize_example(features.encode_example(example)))


@functools.cache
def _serializer(variant: str) -> tuple[tfds.features.FeaturesDict, ExampleSerializer]:
    features = schema.features(variant)
    return features, ExampleSerializer(features.get_serialized_info())


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
