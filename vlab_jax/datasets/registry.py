"""The data sets by name, which are prepared on first use, and then read at random.

A data set is named by its spec: `motion`, `msrvtt/captioning` (a configuration), `folder:/path/to/clips`. To add one,
write its file and add it to `_OFFICIAL`.
"""

import dataclasses
import pathlib
import re
import textwrap
from collections.abc import Callable
from typing import Any

import filelock
import tensorflow_datasets as tfds
from tensorflow_datasets.core.constants import get_default_data_dir

from vlab_jax.data.sources import RetryingSource
from vlab_jax.datasets import records
from vlab_jax.datasets.activitynet import ACTIVITYNET
from vlab_jax.datasets.didemo import DIDEMO
from vlab_jax.datasets.folder import FOLDER, FolderDataset, suggest
from vlab_jax.datasets.image_text import CC3M, IMAGE_TEXT
from vlab_jax.datasets.motion.dataset import MOTION, MotionDataset
from vlab_jax.datasets.msrvtt import MSRVTT
from vlab_jax.datasets.msvd import MSVD
from vlab_jax.datasets.official import OfficialDataset
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.datasets.tgif import TGIF, TGIF_QA
from vlab_jax.datasets.vatex import VATEX
from vlab_jax.datasets.webvid import WEBVID
from vlab_jax.datasets.xu_qa import MSRVTT_QA, MSVD_QA
from vlab_jax.errors import InputError

# Each has a `name`; `configs`, the names of its configurations, the default first (none if any directory is one, as in
# `folder:/path/to/clips`); `dataset(config, options)` to be prepared; `annotation_source(config, manual_dir)` to be
# checked.
DatasetFamily = MotionDataset | FolderDataset | OfficialDataset
_OFFICIAL = (MSRVTT, MSRVTT_QA, MSVD, MSVD_QA, TGIF, TGIF_QA, DIDEMO, ACTIVITYNET, VATEX, WEBVID, CC3M, IMAGE_TEXT)
DATASETS: dict[str, DatasetFamily] = {family.name: family for family in (MOTION, FOLDER, *_OFFICIAL)}


def known_specs() -> list[str]:
    """The specs of all data sets with all configurations, and `folder:path/to/directory`."""
    return [
        f"{name}/{config}" if config else f"{name}:path/to/directory"
        for name, family in DATASETS.items()
        for config in family.configs or ("",)
    ]


def specs_help() -> str:
    """The end of the help text of commands with a flag `--dataset`."""
    names = textwrap.fill(", ".join(known_specs()), 116, break_on_hyphens=False)
    return f"Data sets (the first configuration of each is its default):\n\n{textwrap.indent(names, '    ')}"


def find(spec: str) -> tuple[DatasetFamily, str]:
    """The data set that a spec names, and its configuration (empty for the default) or directory.

    Raises:
      InputError: no such data set or configuration.
    """
    name, mark, config = re.fullmatch(r"([^:/]*)([:/]?)(.*)", spec, re.DOTALL).groups()
    if name not in DATASETS:
        known = ", ".join(name if family.configs else f"{name}:path/to/directory" for name, family in DATASETS.items())
        raise InputError(f"there is no data set {name!r}{suggest(name, DATASETS)}; known: {known}")
    family = DATASETS[name]
    if not family.configs:
        if mark != ":" or not config:
            raise InputError(f"data set {spec!r} lacks its directory; write {name}:path/to/directory")
    elif mark == ":" or (mark and config not in family.configs):
        raise InputError(
            f"data set {spec!r}: {name} has no configuration {config!r}{suggest(config, family.configs)}; "
            f"it has: {', '.join(family.configs)}"
        )
    return family, config


def prepare(spec: str, options: BuildOptions, build: Callable[..., None] = records.build) -> tfds.core.DatasetBuilder:
    """A prepared data set; `build` writes its files below `options.directory` if they do not exist yet.

    Processes that want the same data at once wait for the first of them to build it.

    Raises:
      InputError: no such data set or configuration, or its sources have errors.
    """
    directory = pathlib.Path(options.directory or get_default_data_dir()).expanduser().resolve()
    options = dataclasses.replace(options, directory=str(directory))
    family, config = find(spec)
    dataset = family.dataset(config, options)
    files = dataset.files(options)
    if not records.is_prepared(files):
        files.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(files.parent / f".{files.name}.lock"):
            if not records.is_prepared(files):
                build(dataset, files, options)
    return tfds.builder_from_directory(files)


def open_split(spec: str, split: str, options: BuildOptions, retry_seconds: float | None = None) -> Any:
    """A split as a `tfds.data_source`: a sequence of examples as dictionaries, with random access, that can be pickled.

    Args:
      retry_seconds: how long reads are retried while the files are out of reach (`RetryingSource`); None: not at all.

    Raises:
      InputError: as `prepare`; no such split.
    """
    builder = prepare(spec, options)
    if split not in builder.info.splits:
        known = ", ".join(builder.info.splits)
        raise InputError(f"data set {spec!r} has no split {split!r}; it has: {known}")
    source = builder.as_data_source(split=split)
    if retry_seconds is None:
        return source
    return RetryingSource(source, retry_seconds, f"split {split!r} of {spec!r} in {builder.data_dir}")
