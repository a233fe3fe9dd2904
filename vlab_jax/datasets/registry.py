"""The data sets by name, and one door to each: prepared on first use, then read at random.

A data set is named by its spec: `motion`, `msrvtt/captioning` (a configuration), `folder:/path/to/clips`.
"""

import contextlib
import dataclasses
import difflib
import fcntl
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core.constants import get_default_data_dir

from vlab_jax.data.sources import Patient
from vlab_jax.datasets import clip_builder, records
from vlab_jax.datasets.activitynet import Activitynet
from vlab_jax.datasets.clip_builder import ClipBuilder
from vlab_jax.datasets.didemo import Didemo
from vlab_jax.datasets.folder import Folder
from vlab_jax.datasets.image_text import Cc3m, ImageText
from vlab_jax.datasets.motion.builder import Motion
from vlab_jax.datasets.msrvtt import Msrvtt
from vlab_jax.datasets.msvd import Msvd
from vlab_jax.datasets.official import Official
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.datasets.tgif import Tgif, TgifQa
from vlab_jax.datasets.vatex import Vatex
from vlab_jax.datasets.webvid import Webvid
from vlab_jax.datasets.xu_qa import MsrvttQa, MsvdQa
from vlab_jax.errors import InputError

BUILDERS: dict[str, type[ClipBuilder]] = {
    each.name: each
    for each in (
        Motion,
        Folder,
        Msrvtt,
        MsrvttQa,
        Msvd,
        MsvdQa,
        Tgif,
        TgifQa,
        Didemo,
        Activitynet,
        Vatex,
        Webvid,
        Cc3m,
        ImageText,
    )
}
# Writes the files of a data set into a directory.
Build = Callable[[ClipBuilder, pathlib.Path, BuildOptions], None]


def prepare(spec: str, options: BuildOptions, build: Build = clip_builder.build) -> tfds.core.DatasetBuilder:
    """The builder of a data set, its files written below `options.directory` if they are not there yet.

    Processes that ask for the same data at once wait for the first of them to build it.

    Args:
      spec: `name`, `name/configuration` or `folder:directory`.
      options: where from, where to, in which form.
      build: what writes the files.

    Raises:
      InputError: no such data set or configuration, or its source has errors.
    """
    directory = pathlib.Path(options.directory or get_default_data_dir()).expanduser().resolve()
    options = dataclasses.replace(options, directory=str(directory))
    builder = _builder(spec, options)
    files = _files(builder, options)
    if not records.is_prepared(files):
        with _lock(files):
            if not records.is_prepared(files):
                build(builder, files, options)
    return tfds.builder_from_directory(files)


def _files(builder: ClipBuilder, options: BuildOptions) -> pathlib.Path:
    """Where the data set is: of the frames variant, in a directory for each rate, size and quality."""
    files = pathlib.Path(builder.data_dir)
    return files.parent.with_name(files.parent.name + options.form) / files.name


def open_split(spec: str, split: str, options: BuildOptions, retry_seconds: float | None = None) -> Any:
    """A split as a `tfds.data_source`: a sequence of examples as dictionaries; random access; can be pickled.

    Args:
      retry_seconds: how long its files may be out of reach when they are read (`patience.Patient`); None: not at all.

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
    return Patient(source, retry_seconds, f"split {split!r} of {spec!r} in {builder.data_dir}")


def _builder(spec: str, options: BuildOptions) -> ClipBuilder:
    """The builder that `spec` names, not yet built."""
    builder_class, rest = find(spec)
    if builder_class is Folder:
        config = Folder.config_of(rest)
    elif issubclass(builder_class, Official):
        config = builder_class.config_of(builder_class.protocol_of(rest), options)
    else:
        config = rest or None
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # TFDS prints each configuration that is not in its own list
    try:
        return builder_class(config=config, data_dir=options.directory, file_format="array_record")
    finally:
        logging.set_verbosity(verbosity)


def find(spec: str) -> tuple[type[ClipBuilder], str]:
    """The builder's class and what follows its name: a configuration, empty for the default, or a directory.

    Raises:
      InputError: no such data set or configuration.
    """
    name, mark, rest = re.fullmatch(r"([^:/]*)([:/]?)(.*)", spec, re.DOTALL).groups()
    if name not in BUILDERS:
        raise InputError(f"there is no data set {name!r}{_nearest(name, BUILDERS)}; known: {', '.join(_known())}")
    builder_class = BUILDERS[name]
    if builder_class is Folder:
        if mark != ":" or not rest:
            raise InputError(f"data set {spec!r} lacks its directory; write {name}:path/to/directory")
        return builder_class, rest
    if issubclass(builder_class, Official):
        configs = [protocol.name for protocol in builder_class.PROTOCOLS]
    else:
        configs = list(builder_class.builder_configs)
    if mark == ":" or (mark and rest not in configs):
        near = _nearest(rest, configs)
        raise InputError(f"data set {spec!r}: {name} has no configuration {rest!r}{near}; it has: {', '.join(configs)}")
    return builder_class, rest


def _known() -> list[str]:
    return [f"{name}:path/to/directory" if each is Folder else name for name, each in BUILDERS.items()]


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


@contextlib.contextmanager
def _lock(files: pathlib.Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of a process that dies."""
    files.parent.mkdir(parents=True, exist_ok=True)
    with open(files.parent / f".{files.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
