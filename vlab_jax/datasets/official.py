"""Builds official data sets: the authors' annotation files and the media come from a directory that the user names.

A data set is a subclass of `Official` that names its protocols. Before anything is written, every annotation is read
and counted, and every media file looked up: counts that differ from the official ones, and media that are missing, are
refused by name.

Files are looked for in `<manual_dir>/<data set>/` (and the folders of its relatives: the questions of MSR-VTT are on
MSR-VTT's videos), or in `manual_dir` itself where it is the folder of one data set. The configuration's name holds a
hash of the annotation files' and the media's sizes and times, so data that has changed is built anew. Where no
directory is named, the one version that was prepared before is opened, without a look at its sources.
"""

import dataclasses
import hashlib
import logging
import pathlib
from collections.abc import Iterator
from typing import ClassVar

import tensorflow_datasets as tfds

from vlab_jax.data import schema
from vlab_jax.datasets import records
from vlab_jax.datasets.annotations import AnnotationEntry, AnnotationFolder, Protocol, Tally
from vlab_jax.datasets.clip_builder import ClipBuilder
from vlab_jax.datasets.media_index import Media, MediaIndex
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.errors import InputError

_MISSING_NAMED = 3
_HASH = 12  # digits of the hash in a configuration's name


@dataclasses.dataclass(eq=False, kw_only=True)
class OfficialConfig(tfds.core.BuilderConfig):
    """One state of the files of one protocol; without `folders`, one that is prepared already."""

    protocol: str = ""
    folders: tuple[str, ...] = ()
    options: BuildOptions = dataclasses.field(default_factory=BuildOptions)


class Official(ClipBuilder, skip_registration=True):
    """A data set that others have published; see the module's text.

    Attributes:
      PROTOCOLS: its configurations, the default first.
      FOLDERS: names of the folders within `manual_dir` that its files may lie in, its own first.
      LICENSE, HOMEPAGE: as the authors state them.
    """

    PROTOCOLS: ClassVar[tuple[Protocol, ...]] = ()
    FOLDERS: ClassVar[tuple[str, ...]] = ()
    LICENSE: ClassVar[str] = ""
    HOMEPAGE: ClassVar[str] = ""

    @classmethod
    def protocol_of(cls, name: str) -> Protocol | None:
        """The protocol of a name; the default for an empty one."""
        return next((each for each in cls.PROTOCOLS if name in ("", each.name)), None)

    @classmethod
    def folders_of(cls, manual_dir: str) -> tuple[pathlib.Path, ...]:
        """The directories that hold the data set's files.

        Raises:
          InputError: there is none.
        """
        top = pathlib.Path(manual_dir).expanduser().absolute()
        if not top.is_dir():
            raise InputError(f"{cls.name}: there is no directory {manual_dir!r}; name the one that holds its files")
        own = tuple(top / name for name in cls.FOLDERS if (top / name).is_dir())
        others = [name for each in Official.__subclasses__() for name in each.FOLDERS if (top / name).is_dir()]
        if not own and others:
            raise InputError(
                f"{cls.name}: {manual_dir} holds folders of other data sets ({', '.join(dict.fromkeys(others))}) and "
                f"none of this; put its files into {top / cls.FOLDERS[0]}"
            )
        return own or (top,)

    @classmethod
    def config_of(cls, protocol: Protocol, options: BuildOptions) -> OfficialConfig:
        """The configuration for the files as they are now.

        Raises:
          InputError: there is no directory, or it lacks the annotation files of every split.
        """
        if not options.manual_dir:
            return cls._prepared(protocol, options)
        folders = cls.folders_of(options.manual_dir)
        annotations = AnnotationFolder(folders)
        cls.splits_of(protocol, annotations)
        digest = hashlib.sha256(f"{[*map(str, folders)]} {options.allow_missing}\n".encode())
        for file in sorted({file.path for split in protocol.files for file in protocol.sources(annotations, split)}):
            digest.update(f"{file}\0{file.stat().st_size}\0{file.stat().st_mtime_ns}\n".encode())
        digest.update(MediaIndex(folders).scan().fingerprint().encode())
        return OfficialConfig(
            name=f"{protocol.name}-{digest.hexdigest()[:_HASH]}",
            description=protocol.description,
            protocol=protocol.name,
            folders=tuple(map(str, folders)),
            options=options,
        )

    @classmethod
    def _prepared(cls, protocol: Protocol, options: BuildOptions) -> OfficialConfig:
        """The configuration that was prepared before, if it is the only one."""
        pattern = f"{protocol.name}-{'?' * _HASH}{options.form}/*"
        found = sorted(filter(records.is_prepared, pathlib.Path(options.directory, cls.name).glob(pattern)))
        there = [files.parent.name.removesuffix(options.form) for files in found]
        if len(there) == 1:
            return OfficialConfig(
                name=there[0], description=protocol.description, protocol=protocol.name, options=options
            )
        found = f"{', '.join(there)} are" if there else "none is"
        raise InputError(
            f"{cls.name}/{protocol.name}: say where its files lie, with data.manual_dir=<directory>, or prepare one "
            f"version of it ({found} prepared in {options.directory})"
        )

    @classmethod
    def splits_of(cls, protocol: Protocol, annotations: AnnotationFolder) -> list[str]:
        """The splits whose annotation files are there; those that are not are named in the log.

        Raises:
          InputError: there is none.
        """
        splits = protocol.splits(annotations)
        lacking = {split: protocol.missing(annotations, split) for split in protocol.files if split not in splits}
        named = "; ".join(f"{split} lacks {', '.join(names)}" for split, names in lacking.items())
        where = " and ".join(map(str, annotations.folders))
        if not splits:
            raise InputError(f"{cls.name}/{protocol.name}: no annotation files in {where}: {named}")
        if lacking:
            logging.info("%s/%s: %s in %s, and is left out", cls.name, protocol.name, named, where)
        return splits

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{type(self).__doc__}\n\n{self.builder_config.description}",
            features=schema.features(),
            license=self.LICENSE,
            homepage=self.HOMEPAGE or None,
        )

    def clips(self) -> dict[str, Iterator[schema.ClipRecord]]:
        """The clips of each split, made as they are asked for; their media are paths.

        Raises:
          InputError: annotations or media are not what they should be.
        """
        config = self.builder_config
        protocol = self.protocol_of(config.protocol)
        annotations = AnnotationFolder(tuple(map(pathlib.Path, config.folders)))
        index = MediaIndex(annotations.folders).scan()
        survey = survey_of(protocol, annotations, index)
        survey.refuse_wrong_counts(f"{self.name}/{protocol.name}")
        survey.refuse_missing(f"{self.name}/{protocol.name}", config)
        clips = {split: _clips(protocol, annotations, split, index) for split in survey.usable if survey.usable[split]}
        if not clips:
            raise InputError(f"{self.name}/{protocol.name}: no clip has a caption or a question")
        return clips


@dataclasses.dataclass
class Survey:
    """What the annotation files hold, and how much of it has media.

    Attributes:
      tallies: the counts of each split.
      problems: counts that differ from the official ones, a line each.
      missing: clips of each split without media.
      usable: clips of each split with media and a text.
      named: the first that lack media.
    """

    tallies: dict[str, Tally] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    missing: dict[str, int] = dataclasses.field(default_factory=dict)
    usable: dict[str, int] = dataclasses.field(default_factory=dict)
    named: list[str] = dataclasses.field(default_factory=list)

    def refuse_wrong_counts(self, name: str) -> None:
        """Raises InputError, with all differences, where a count is not the official one."""
        if self.problems:
            raise InputError("\n".join([f"{name}: {problem}" for problem in self.problems]))

    def refuse_missing(self, name: str, config: OfficialConfig) -> None:
        """Raises InputError where media are missing, unless that is allowed; all of them may never be."""
        clips = {split: tally.counts["clips"] for split, tally in self.tallies.items()}
        missing, total = sum(self.missing.values()), sum(clips.values())
        if not missing:
            return
        shares = ", ".join(f"{split} {self.missing[split]:,} of {clips[split]:,}" for split in clips)
        told = f"{name}: {missing:,} of {total:,} clips ({missing / total:.1%}) have no media: {shares}"
        if config.options.allow_missing and missing < total:
            logging.warning("%s; they are left out", told)
            return
        more = ", ..." if missing > len(self.named) else ""
        remedy = "put them there"
        if missing < total:
            remedy += ", or leave their clips out with data.allow_missing=True (--allow_missing)"
        raise InputError(
            f"{told} (missing: {', '.join(self.named)}{more}) in {' and '.join(config.folders)}; {remedy}; "
            f"python -m vlab_jax.datasets.check --dataset={name} --manual_dir={config.options.manual_dir} lists them all"
        )


def survey_of(protocol: Protocol, annotations: AnnotationFolder, index: MediaIndex) -> Survey:
    """Reads all annotations of a protocol, and looks up the media of each clip."""
    survey = Survey()
    for split in protocol.splits(annotations):
        tally = survey.tallies[split] = protocol.tally(split)
        survey.missing[split] = survey.usable[split] = 0
        for entry, media in _with_media(protocol, annotations, split, index):
            tally.add(entry)
            if media is None:
                survey.missing[split] += 1
                survey.named += [entry.video] if len(survey.named) < _MISSING_NAMED else []
            elif entry.captions or entry.questions:
                survey.usable[split] += 1
    survey.problems += protocol.problems(survey.tallies, annotations)
    return survey


def _with_media(
    protocol: Protocol, annotations: AnnotationFolder, split: str, index: MediaIndex
) -> Iterator[tuple[AnnotationEntry, Media | None]]:
    """The entries of a split with their media; an empty file is none."""
    for entry in protocol.read(annotations, split):
        media = index.find(entry.video, *entry.aliases)
        yield entry, media if media and media.size else None


def _clips(
    protocol: Protocol, annotations: AnnotationFolder, split: str, index: MediaIndex
) -> Iterator[schema.ClipRecord]:
    """The clips of a split that have media and a text."""
    for entry, media in _with_media(protocol, annotations, split, index):
        if media and (entry.captions or entry.questions):
            yield schema.ClipRecord(entry.id, media.path, entry.captions, entry.questions, entry.start, entry.end)
