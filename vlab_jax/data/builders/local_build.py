"""A data set is built on this machine: clips are stored by worker processes and written in the order they come."""

import contextlib
import functools
import os
import pathlib
import shutil
import sys
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from vlab_jax.data.builders import records, store
from vlab_jax.data.builders.clip_builder import ClipBuilder
from vlab_jax.data.builders.options import BuildOptions
from vlab_jax.data.builders.store import Stored
from vlab_jax.data.in_hand import ENDED
from vlab_jax.data.workers import map_in_order
from vlab_jax.errors import InputError


def build(builder: ClipBuilder, files: pathlib.Path, options: BuildOptions) -> None:
    """Writes the data set into the directory `files`, which appears when it is complete.

    Memory does not grow with the data set.

    Raises:
      InputError: as `builder.clips` raises it; no clip has media that can be decoded; two have one id; the directory is
        there already.
      RunStopped: worker processes cannot be started.
    """
    if files.exists():
        raise InputError(
            f"{files} holds an unfinished data set, begun with --beam; finish it with the same command, or remove it"
        )
    _clear_left_overs(files)
    everything = builder.clips()  # before the bar, since it may have much to say
    with _new_folder(files) as folder, _progress(builder, options) as bar:
        failures = records.Failures(folder)
        splits = []
        for split, clips in everything.items():
            stored = map_in_order(
                functools.partial(store.store, options=options),
                clips,
                _workers(options),
                lambda clip: store.without_media(clip, options, ENDED),
                options.limits.clock_seconds,
            )
            with contextlib.closing(stored):
                counted = _counted(stored, split, failures, bar)
                splits.append(records.write_split(counted, folder, builder.name, split))
        failures.finish(files)
        records.write_description(builder, options.variant, folder, splits)


@contextlib.contextmanager
def _new_folder(files: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder that becomes `files` if all goes well, and is removed if not."""
    folder = files.parent / f"incomplete.{os.getpid()}_{files.name}"
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(files)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _clear_left_overs(files: pathlib.Path) -> None:
    """Removes what killed builds left beside `files`; nobody else may be building it."""
    for left_over in files.parent.glob(f"incomplete.*_{files.name}"):
        shutil.rmtree(left_over)


def _progress(builder: ClipBuilder, options: BuildOptions) -> tqdm:
    total = getattr(builder.builder_config, "clips", None)
    seconds = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=builder.title(options), unit=" clips", mininterval=seconds)


def _workers(options: BuildOptions) -> int:
    """Files are read by this process; decoding takes as many as asked for, or one for each core."""
    if options.variant == "file":
        return 0
    return options.workers if options.workers >= 0 else os.cpu_count() or 1


def _counted(stored: Iterable[Stored], split: str, failures: records.Failures, bar: tqdm) -> Iterator[Stored]:
    for clip in stored:
        failures.count(split, 1, [(clip.id, clip.failure)] if clip.failure else [])
        yield clip
        bar.update()
