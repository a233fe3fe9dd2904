"""Official data sets: the authors' annotation files and the media come from a directory that the user names.

Before anything is written, every annotation is read and counted, and every media file looked up: counts that differ
from the official ones, and missing media, are refused by name.

Files are looked for in `<manual_dir>/<data set>/` (questions on the videos of another data set: in its folder, too), or
in `manual_dir` itself if it is the folder of one data set. The configuration's name holds a hash of the sizes and times
of the annotation files and media, so changed data is prepared anew. Without a directory, the one version that was
prepared before is opened, and its sources are not looked at.
"""

import dataclasses
import functools
import hashlib
import logging
import pathlib
from collections import Counter
from collections.abc import Iterator

from vlab_jax.data.schema import ClipRecord
from vlab_jax.datasets import records
from vlab_jax.datasets.annotations import AnnotationEntry, AnnotationSource, Protocol
from vlab_jax.datasets.media_index import Media, MediaIndex
from vlab_jax.datasets.records import BuildOptions, ClipDataset
from vlab_jax.errors import InputError

_HASH_DIGITS = 12
_NAMES: set[str] = set()  # of all official data sets


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfficialDataset:
    """A data set that others have published.

    Attributes:
      description: what it is, whose it is, which files it is read from, and what each protocol is.
      protocols: its configurations, the default first.
      media_of: another data set, if it is about the media of that one.
      license, homepage: as the authors state them.
    """

    name: str
    description: str
    protocols: tuple[Protocol, ...]
    license: str
    media_of: str = ""
    homepage: str = ""

    def __post_init__(self) -> None:
        _NAMES.add(self.name)

    @property
    def configs(self) -> tuple[str, ...]:
        """The names of its protocols."""
        return tuple(protocol.name for protocol in self.protocols)

    def protocol(self, config: str) -> Protocol:
        """The protocol with this name; the default if the name is empty."""
        return next(protocol for protocol in self.protocols if config in ("", protocol.name))

    def find_folders(self, manual_dir: str) -> tuple[pathlib.Path, ...]:
        """The directories that hold the data set's files. Raises `InputError` if there are none."""
        top = pathlib.Path(manual_dir).expanduser().absolute()
        if not top.is_dir():
            raise InputError(f"{self.name}: there is no directory {manual_dir!r}; name the one that holds its files")
        own = tuple(top / name for name in (self.name, self.media_of) if name and (top / name).is_dir())
        others = sorted(name for name in _NAMES if (top / name).is_dir())
        if not own and others:
            raise InputError(
                f"{self.name}: {manual_dir} holds folders of other data sets ({', '.join(others)}) and none of this; "
                f"put its files into {top / self.name}"
            )
        return own or (top,)

    def annotation_source(self, config: str, manual_dir: str) -> AnnotationSource:
        """The annotations of a configuration; splits without annotation files are named in the log.

        Raises:
          InputError: the directory is missing, or lacks the annotation files of every split.
        """
        if not manual_dir:
            raise InputError(f"say where the files of {self.name} lie: --manual_dir=<directory>")
        protocol = self.protocol(config)
        source = AnnotationSource(f"{self.name}/{protocol.name}", protocol, self.find_folders(manual_dir))
        lacking = "; ".join(f"{split} lacks {', '.join(names)}" for split, names in source.left_out.items())
        where = " and ".join(map(str, source.folders))
        if not source.splits:
            raise InputError(f"{source.name}: no annotation files in {where}: {lacking}")
        if lacking:
            logging.info("%s: %s in %s, and is left out", source.name, lacking, where)
        return source

    def dataset(self, config: str, options: BuildOptions) -> ClipDataset:
        """The data set for the files as they are now.

        Raises:
          InputError: the directory is missing, or lacks the annotation files of every split.
        """
        protocol = self.protocol(config)
        if options.manual_dir:
            source = self.annotation_source(config, options.manual_dir)
            index = MediaIndex(source.folders).scan()
            digest = hashlib.sha256(f"{[*map(str, source.folders)]} {options.allow_missing}\n".encode())
            for path in source.paths:
                digest.update(f"{path}\0{path.stat().st_size}\0{path.stat().st_mtime_ns}\n".encode())
            digest.update(index.fingerprint().encode())
            version = f"{protocol.name}-{digest.hexdigest()[:_HASH_DIGITS]}"
            clips = functools.partial(_clips_by_split, source, index, options)
        else:
            version, clips = self._prepared_version(protocol, options), dict  # nothing is built
        return ClipDataset(
            name=self.name,
            config=version,
            clips=clips,
            description=f"{self.description.strip()}\n\n{protocol.description}",
            config_description=protocol.description,
            license=self.license,
            homepage=self.homepage,
        )

    def _prepared_version(self, protocol: Protocol, options: BuildOptions) -> str:
        """The version that was prepared before. Raises `InputError` if there is none, or several."""
        pattern = f"{protocol.name}-{'?' * _HASH_DIGITS}{options.variant_suffix}/*"
        prepared = sorted(filter(records.is_prepared, pathlib.Path(options.directory, self.name).glob(pattern)))
        versions = [files.parent.name.removesuffix(options.variant_suffix) for files in prepared]
        if len(versions) != 1:
            found = f"{', '.join(versions)} are" if versions else "none is"
            raise InputError(
                f"{self.name}/{protocol.name}: say where its files lie, with data.manual_dir=<directory>, or prepare "
                f"one version of it ({found} prepared in {options.directory})"
            )
        return versions[0]


def _clips_by_split(
    source: AnnotationSource, index: MediaIndex, options: BuildOptions
) -> dict[str, Iterator[ClipRecord]]:
    """The clips of each split that have media and a text; media are paths.

    Raises:
      InputError: a count is not the official one, or media are missing.
    """
    counts = {split: Counter[str]() for split in source.splits}
    missing = Counter[str]()
    examples: list[str] = []
    for split in source.splits:
        for entry in source.read(split, counts[split]):
            if _find_media(entry, index) is None:
                missing[split] += 1
                examples += [entry.video] if len(examples) < 3 else []
    problems = list(source.count_problems(counts))
    if problems:
        raise InputError("\n".join(f"{source.name}: {problem}" for problem in problems))
    absent, total = missing.total(), sum(of_split["clips"] for of_split in counts.values())
    if absent:
        shares = ", ".join(f"{split} {missing[split]:,} of {counts[split]['clips']:,}" for split in counts)
        message = f"{source.name}: {absent:,} of {total:,} clips ({absent / total:.1%}) have no media: {shares}"
        if not options.allow_missing or absent == total:
            more = ", ..." if absent > len(examples) else ""
            or_not = ", or leave their clips out with data.allow_missing=True (--allow_missing)"
            raise InputError(
                f"{message} (missing: {', '.join(examples)}{more}) in {' and '.join(map(str, source.folders))}; put "
                f"them there{or_not if absent < total else ''}; python -m vlab_jax.datasets.check "
                f"--dataset={source.name} --manual_dir={options.manual_dir} lists them all"
            )
        logging.warning("%s; they are left out", message)
    return {split: _clips(source, split, index) for split in source.splits}


def _find_media(entry: AnnotationEntry, index: MediaIndex) -> Media | None:
    """The media of an entry; an empty file counts as missing."""
    media = index.find(entry.video, *entry.aliases)
    return media if media and media.size else None


def _clips(source: AnnotationSource, split: str, index: MediaIndex) -> Iterator[ClipRecord]:
    for entry in source.read(split):
        media = _find_media(entry, index)
        if media and (entry.captions or entry.questions):
            yield ClipRecord(entry.id, media.path, entry.captions, entry.questions, entry.start, entry.end)
