"""A prepared data set on a disk: ArrayRecord files, what TFDS needs to read them, and a list of what failed.

TFDS's own writer is not used: over a gigabyte a split it needs TensorFlow, and twice the room on the disk. The files
are the same: `tfds.builder_from_directory` reads them, and the clips of a shard are in the order in which TFDS shuffles
them. A clip whose media cannot be read or decoded is stored without media, so that every variant of a data set holds
the same clips; a run counts and names it, like a file that cannot be decoded.
"""

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core.constants import DATASET_INFO_FILENAME
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.hashing import Hasher
from tensorflow_datasets.core.naming import ShardedFileTemplate
from tqdm import tqdm

from vlab_jax.data import schema, video
from vlab_jax.data.crash_guard import CRASHED, map_in_order
from vlab_jax.data.media import DEFAULT_LIMITS, DecodeError, MediaLimits
from vlab_jax.errors import InputError

VARIANTS = ("file", "frames")
SHARD_BYTES = 1 << 30
# Beside the records: a line for each clip that is stored without media, with split, id and reason.
FAILURES = "failures.tsv"

_RANGES = {
    "frame_rate": (0.01, 1000.0),
    "short_side": (16, 65500),  # as much as JPEG allows
    "jpeg_quality": (1, 100),
    "workers": (-1, 1024),
}
_LOGGED_FAILURES = 10
_ENOUGH_TO_JUDGE = 100  # clips; if all of them fail, the build ends


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """How data sets are prepared.

    Attributes:
      directory: where prepared data sets are, made if missing; empty: TFDS's default (`TFDS_DATA_DIR`, or
        `~/tensorflow_datasets`).
      manual_dir: where official annotation files and media are: `<manual_dir>/<data set name>/`, or `manual_dir`
        itself.
      allow_missing: leave out clips whose media are missing, instead of refusing to build.
      variant: `file`: encoded files as obtained; `frames`: resized JPEG frames.
      frame_rate: frames a second, at most (variant `frames`).
      short_side: pixels of the short side, at most (variant `frames`).
      jpeg_quality: 1 to 100 (variant `frames`).
      workers: processes that decode (variant `frames`); -1: one for each core; 0: this process.
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
    def variant_suffix(self) -> str:
        """The end of a prepared data set's directory name, which differs by variant, rate, size and quality."""
        if self.variant == "file":
            return ""
        return f"-{self.variant}_{self.frame_rate:g}fps_{self.short_side}px_q{self.jpeg_quality}"

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "BuildOptions":
        """The options in the `data` fields of a config; other fields are ignored."""
        plain = {field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name != "limits"}
        return cls(**plain, limits=MediaLimits(**fields["limits"]))


@dataclasses.dataclass(frozen=True)
class ClipDataset:
    """One configuration of a data set, before it is prepared.

    Attributes:
      name, config, version: its files are in the directory `name/config/version`.
      clips: makes the clips of each split, one at a time; media may be paths. Raises `InputError`.
      num_clips: the number of clips in all splits, for a progress bar; None: unknown.
    """

    name: str
    config: str
    clips: Callable[[], dict[str, Iterator[schema.ClipRecord]]]
    description: str
    config_description: str | None = None
    version: str = "1.0.0"
    license: str = ""
    homepage: str = ""
    num_clips: int | None = None

    def files(self, options: BuildOptions) -> pathlib.Path:
        """The directory of the prepared files."""
        return pathlib.Path(options.directory, self.name, self.config + options.variant_suffix, self.version)

    def progress_title(self, options: BuildOptions) -> str:
        """The words before a progress bar."""
        as_frames = " as frames" if options.variant == "frames" else ""
        return f"preparing {self.name}/{self.config}/{self.version}{as_frames}"


def build(dataset: ClipDataset, files: pathlib.Path, options: BuildOptions) -> None:
    """Writes the data set into the directory `files`, which appears when it is complete.

    Worker processes encode the clips, and this process writes them in order. Memory does not grow with the data set.

    Raises:
      InputError: `dataset.clips` raises it; no clip has media that can be decoded; two clips have the same id; the
        directory exists already.
      RunStopped: worker processes cannot be started.
    """
    if files.exists():
        raise InputError(
            f"{files} holds an unfinished data set, begun with --beam; finish it with the same command, or remove it"
        )
    for leftover in files.parent.glob(f"incomplete.*_{files.name}"):  # of killed builds; only one build runs at a time
        shutil.rmtree(leftover)
    workers = options.workers if options.workers >= 0 else os.cpu_count() or 1
    clips_by_split = dataset.clips()  # before the bar, since it may log much
    folder = files.parent / f"incomplete.{os.getpid()}_{files.name}"
    folder.mkdir(parents=True)
    try:
        failures, splits = FailureLog(folder), []
        with progress_bar(dataset.progress_title(options), " clips", dataset.num_clips) as bar:
            for split, clips in clips_by_split.items():
                encoded = map_in_order(
                    functools.partial(encode_clip, options=options),
                    clips,
                    workers if options.variant == "frames" else 0,  # files are only read
                    functools.partial(encode_clip, options=options, failure=CRASHED),
                    options.limits.clock_seconds,
                )
                with contextlib.closing(encoded):
                    splits.append(write_split(_counted(encoded, split, failures, bar), folder, dataset.name, split))
        failures.finish(files)
        write_description(dataset, options.variant, folder, splits)
        folder.rename(files)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def progress_bar(title: str, unit: str, total: int | None = None) -> tqdm:
    """A bar that is redrawn twice a second in a terminal, and every ten seconds in a log."""
    return tqdm(desc=title, unit=unit, total=total, mininterval=0.5 if sys.stderr.isatty() else 10.0)


def is_prepared(files: pathlib.Path) -> bool:
    """Whether the directory holds a complete data set; its description is written last."""
    return (files / DATASET_INFO_FILENAME).exists()


class EncodedClip(NamedTuple):
    """A clip as a record, and the reason if it has no media."""

    id: str
    record: bytes
    failure: str = ""


def encode_clip(clip: schema.ClipRecord, options: BuildOptions, failure: str = "") -> EncodedClip:
    """The clip with its media read, or made into frames; without media if they fail, or for the reason `failure`."""
    media: bytes | tuple[bytes, ...] = b"" if options.variant == "file" else ()
    try:
        if not failure:
            media = _encode_media(clip, options)
    except (OSError, DecodeError) as error:
        failure = " ".join(str(error).split())
    features, serializer = _serializer(options.variant)
    example = features.encode_example(schema.to_example(dataclasses.replace(clip, media=media)))
    return EncodedClip(clip.id, serializer.serialize_example(example), failure)


def _encode_media(clip: schema.ClipRecord, options: BuildOptions) -> bytes | tuple[bytes, ...]:
    media = read_file(clip.media, options.limits.max_bytes) if isinstance(clip.media, str) else clip.media
    if options.variant == "file":
        return media
    stored = video.store_frames(
        media,
        start=clip.start,
        end=clip.end,
        frame_rate=options.frame_rate,
        short_side=options.short_side,
        quality=options.jpeg_quality,
        limits=options.limits,
    )
    return tuple(stored)


@functools.cache
def _serializer(variant: str) -> tuple[tfds.features.FeaturesDict, ExampleSerializer]:
    features = schema.features(variant)
    return features, ExampleSerializer(features.get_serialized_info())


def read_file(path: str, max_bytes: int | None = None) -> bytes:
    """The content of a file on a disk or in a store of Apache Beam (`gs://`, `s3://`, `hdfs://`).

    Raises `OSError`, also if the file has more than `max_bytes` bytes.
    """
    with beam_files().open(path) if is_remote(path) else open(path, "rb") as file:
        if max_bytes is None:
            return file.read()
        size = 0 if is_remote(path) else os.fstat(file.fileno()).st_size
        content = file.read(max_bytes + 1) if size <= max_bytes else b""
    if max(size, len(content)) > max_bytes:
        raise OSError(errno.EFBIG, f"is larger than {max_bytes:,} bytes, which data.limits.max_bytes allows", path)
    return content


def is_remote(path: str) -> bool:
    """Whether the path is that of a store, which Apache Beam opens."""
    return "://" in path


def beam_files() -> Any:
    """Apache Beam's `FileSystems`."""
    from apache_beam.io.filesystems import FileSystems  # an optional package, from which remote paths come

    return FileSystems


def write_split(clips: Iterable[EncodedClip], folder: pathlib.Path, name: str, split: str) -> tfds.core.SplitInfo:
    """Writes the shards of a split, one after the other; memory holds one shard.

    Raises `InputError` if two clips of a shard have the same id.
    """
    hasher = Hasher(split)
    shards: dict[pathlib.Path, tuple[int, int]] = {}
    pending: dict[int, bytes] = {}
    size = 0

    def flush() -> None:
        path = folder / f"{split}-{len(shards):05d}.part"
        shards[path] = write_shard(path, (pending[key] for key in sorted(pending)))
        pending.clear()

    for clip in clips:
        key = hasher.hash_key(clip.id)
        if key in pending:
            raise InputError(f"data set {name}: two clips of split {split} have the id {clip.id!r}; ids must differ")
        pending[key] = clip.record
        size += len(clip.record)
        if size >= SHARD_BYTES:
            flush()
            size = 0
    if pending:
        flush()
    info = split_info(folder, name, split, list(shards.values()))
    for part, path in zip(shards, info.filepaths, strict=True):
        part.rename(path)
    return info


def write_shard(path: pathlib.Path, records: Iterable[bytes]) -> tuple[int, int]:
    """Writes an ArrayRecord file; returns the numbers of records and of their bytes."""
    clips = size = 0
    writer = ArrayRecordWriter(str(path), "group_size:1")  # each record is read by itself
    for record in records:
        writer.write(record)
        clips, size = clips + 1, size + len(record)
    writer.close()
    return clips, size


def split_info(folder: pathlib.Path, name: str, split: str, shards: Sequence[tuple[int, int]]) -> tfds.core.SplitInfo:
    """A split of data set `name` as TFDS describes it, from the numbers of clips and of bytes of each shard."""
    template = ShardedFileTemplate(epath.Path(folder), dataset_name=name, split=split, filetype_suffix="array_record")
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=[clips for clips, _ in shards],
        num_bytes=sum(size for _, size in shards),
        filename_template=template,
    )


def write_description(
    dataset: ClipDataset, variant: str, folder: pathlib.Path, splits: Sequence[tfds.core.SplitInfo]
) -> None:
    """Writes the files that make a TFDS data set of the shards in `folder`; splits without clips are left out.

    Raises `InputError` if no split has clips.
    """
    splits = [split for split in splits if split.num_examples]
    if not splits:
        raise InputError(f"no clip of data set {dataset.name}/{dataset.config} has a caption or a question")
    identity = DatasetIdentity(
        name=dataset.name,
        version=tfds.core.Version(dataset.version),
        data_dir=str(folder),
        module_name="",
        config_name=dataset.config,
        config_description=dataset.config_description,
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description=dataset.description,
        features=schema.features(variant),
        homepage=dataset.homepage or None,
        license=dataset.license or None,
    )
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(folder)


class FailureLog:
    """Counts the clips that are stored without media, and lists them in the file `FAILURES` in `folder`."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._clips = self._failed = 0
        self._file = folder / FAILURES
        self._last = ""

    def add(self, split: str, clips: int, failures: Iterable[tuple[str, str]]) -> None:
        """Counts clips of a split; `failures` are the ids of those without media, and the reasons.

        Raises `InputError` if none of the first hundred clips has media.
        """
        self._clips += clips
        for name, reason in failures:
            self._failed += 1
            self._last = f"{name}: {reason}"
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{split}\t{name}\t{reason}\n")
            if self._failed <= _LOGGED_FAILURES:
                logging.warning("stored without media: %s", self._last)
        if self._clips >= _ENOUGH_TO_JUDGE:
            self._refuse_if_all_failed()

    def finish(self, files: pathlib.Path) -> None:
        """Logs the number of failures, and that the list will be in `files`.

        Raises `InputError` if no clip has media.
        """
        self._refuse_if_all_failed()
        if self._failed:
            message = "%d of %d clips are stored without media; listed in %s"
            logging.warning(message, self._failed, self._clips, files / FAILURES)

    def _refuse_if_all_failed(self) -> None:
        if self._failed and self._failed == self._clips:
            raise InputError(f"none of {self._clips} clips has media that can be decoded; the last, {self._last}")


def _counted(clips: Iterable[EncodedClip], split: str, failures: FailureLog, bar: tqdm) -> Iterator[EncodedClip]:
    for clip in clips:
        failures.add(split, 1, [(clip.id, clip.failure)] if clip.failure else [])
        yield clip
        bar.update()
