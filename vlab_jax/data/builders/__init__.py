"""The data sets by name, and one door to each: prepared on first use, then read at random.

A data set is named by its spec: `motion`, `msrvtt/captioning` (a configuration), `folder:/path/to/clips`.
"""

import contextlib
import dataclasses
import difflib
import fcntl
import functools
import io
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core.constants import get_default_data_dir
from tqdm import tqdm

from vlab_jax.data.builders.activitynet import Activitynet
from vlab_jax.data.builders.didemo import Didemo
from vlab_jax.data.builders.folder import Folder
from vlab_jax.data.builders.image_text import Cc3m, ImageText
from vlab_jax.data.builders.motion import Motion
from vlab_jax.data.builders.msrvtt import Msrvtt
from vlab_jax.data.builders.msvd import Msvd
from vlab_jax.data.builders.official import Official
from vlab_jax.data.builders.options import BuildOptions
from vlab_jax.data.builders.tgif import Tgif, TgifQa
from vlab_jax.data.builders.vatex import Vatex
from vlab_jax.data.builders.webvid import Webvid
from vlab_jax.data.builders.xu_qa import MsrvttQa, MsvdQa
from vlab_jax.errors import InputError

BUILDERS: dict[str, type[tfds.core.DatasetBuilder]] = {
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


def prepare(spec: str, options: BuildOptions) -> tfds.core.DatasetBuilder:
    """The builder of a data set, its files written below `options.directory` if they are not there yet.

    Processes that ask for the same data at once wait for the first of them to build it.

    Args:
      spec: `name`, `name/configuration` or `folder:directory`.
      options: where from, where to, in which form.

    Raises:
      InputError: no such data set or configuration, or its source has errors.
    """
    directory = pathlib.Path(options.directory or get_default_data_dir()).expanduser().resolve()
    builder = _builder(spec, dataclasses.replace(options, directory=str(directory)))
    files = pathlib.Path(builder.data_dir)
    if files.exists():
        return builder
    with _lock(files):
        if not files.exists():
            _clear_left_overs(files)
            _build(builder)
    # Made again: only a builder that finds the files has read what they hold.
    return _made(type(builder), builder.builder_config, str(directory))


def open_split(spec: str, split: str, options: BuildOptions) -> Any:
    """A split as a `tfds.data_source`: a sequence of examples as dictionaries; random access; can be pickled.

    Raises:
      InputError: as `prepare`; no such split.
    """
    builder = prepare(spec, options)
    if split not in builder.info.splits:
        known = ", ".join(builder.info.splits)
        raise InputError(f"data set {spec!r} has no split {split!r}; it has: {known}")
    return builder.as_data_source(split=split)


def _builder(spec: str, options: BuildOptions) -> tfds.core.DatasetBuilder:
    """The builder that `spec` names, not yet built."""
    builder_class, rest = find(spec)
    if builder_class is Folder:
        config = Folder.config_of(rest)
    elif issubclass(builder_class, Official):
        config = builder_class.config_of(builder_class.protocol_of(rest), options)
    else:
        config = rest or None
    return _made(builder_class, config, options.directory)


def _made(builder_class: type[tfds.core.DatasetBuilder], config: Any, directory: str) -> tfds.core.DatasetBuilder:
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # TFDS prints each configuration that is not in its own list
    try:
        return builder_class(config=config, data_dir=directory, file_format="array_record")
    finally:
        logging.set_verbosity(verbosity)


def find(spec: str) -> tuple[type[tfds.core.DatasetBuilder], str]:
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


def _clear_left_overs(files: pathlib.Path) -> None:
    """Removes what a killed build left beside `files`; to be called under the lock."""
    for left_over in files.parent.glob(f"incomplete.*_{files.name}"):
        shutil.rmtree(left_over)


def _build(builder: tfds.core.DatasetBuilder) -> None:
    """Writes the data set, with one progress bar instead of TFDS' many."""
    total = getattr(builder.builder_config, "clips", None)
    with (
        tqdm(
            total=total,
            desc=f"preparing {builder.info.full_name}",
            unit=" clips",
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        ) as bar,
        _quiet(),
    ):
        builder._split_generators = _counted(builder._split_generators, bar)
        builder.download_and_prepare()


def _counted(split_generators: Callable[..., dict[str, Any]], bar: tqdm) -> Callable[..., dict[str, Any]]:
    """`split_generators` with examples that move the bar on as they are made (Beam's are left alone)."""

    def count(examples: Any) -> Any:
        if not isinstance(examples, Iterator):
            return examples
        return _ticking(examples, bar)

    # TFDS looks at the signature, which `wraps` keeps.
    @functools.wraps(split_generators)
    def counted(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {split: count(examples) for split, examples in split_generators(*args, **kwargs).items()}

    return counted


def _ticking(examples: Iterator[Any], bar: tqdm) -> Iterator[Any]:
    for example in examples:
        yield example
        bar.update()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no words from TFDS."""
    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)
