"""What the builders of all data sets have in common: they say which clips there are."""

import abc
import base64
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from tqdm import tqdm

from vlab_jax.data import schema
from vlab_jax.data.crash_guard import ENDED, map_in_order
from vlab_jax.datasets import records
from vlab_jax.datasets.records import BuildOptions, Stored, exists, put_file, read, read_file
from vlab_jax.errors import InputError


class ClipBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set of clips. `clips` names them; how they are stored is not its business.

    Its configuration may have an attribute `clips`: examples in all splits, for a progress bar.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}
    # Nothing is downloaded. TFDS would look for checksums with `importlib_resources`, which it does not
    # install.
    url_infos = None

    @abc.abstractmethod
    def clips(self) -> dict[str, Iterator[schema.ClipRecord]]:
        """The clips of each split, made as they are asked for; media may be paths."""

    def title(self, options: BuildOptions) -> str:
        """What a progress bar says is being prepared."""
        return f"preparing {self.info.full_name}{' as frames' if options.variant == 'frames' else ''}"

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        """For TFDS's own tools."""
        return {split: self._generate_examples(clips) for split, clips in self.clips().items()}

    def _generate_examples(self, clips: Iterator[schema.ClipRecord]) -> Iterator[tuple[str, dict[str, Any]]]:
        for clip in clips:
            yield clip.id, schema.to_example(dataclasses.replace(clip, media=read(clip.media)))


# FOLDED vlab_jax/datasets/clip_builder.py: The building of a data set cut into pieces that need nothing of each
# other: a list of clips each, and its shard.  Lists and what became of them are files in `work/` beside the shards,
# so pieces can be done by any number of machines that see the same files, in any order, and what is done already is
# not done again: a build that was ended goes on.

WORK = "work"


@dataclasses.dataclass(frozen=True)
class Piece:
    """Paths, as those who do the work see them, of a list of clips, of its shard, and of what came of it."""

    clips: str
    shard: str
    done: str


def plan(
    builder: ClipBuilder, files: pathlib.Path, clips_per_shard: int, seen: Callable[[str], str]
) -> dict[str, list[Piece]]:
    """Writes the lists of clips; returns the pieces of each split. Memory holds one list.

    Args:
      files: the directory of the data set, made if missing.
      seen: what a path here is to those who do the work.
    """
    work = files / WORK
    work.mkdir(parents=True, exist_ok=True)
    pieces: dict[str, list[Piece]] = {}
    for split, clips in builder.clips().items():
        lists = []
        while chunk := list(itertools.islice(clips, clips_per_shard)):
            lists.append(work / f"{split}-{len(lists):05d}.jsonl")
            lists[-1].write_text("".join(f"{_line(clip, seen)}\n" for clip in chunk), encoding="utf-8")
        info = records.split_info(files, builder.name, split, [(0, 0)] * len(lists))
        pieces[split] = [
            Piece(
                seen(str(path)),
                seen(str(records.shard_path(info, shard, len(lists)))),
                seen(str(path.with_suffix(".json"))),
            )
            for shard, path in enumerate(lists)
        ]
    _remove_all_but(files, pieces)
    return pieces


def do(piece: Piece, options: BuildOptions) -> dict[str, Any]:
    """Writes the shard of a piece, unless it is there, from the same list.

    Returns:
      What `piece.done` says: the list's `digest`, `clips` and `bytes` of the shard, and `failures`, an id and a reason
      each.
    """
    listed = read_file(piece.clips)
    digest = hashlib.sha256(listed + options.form.encode()).hexdigest()
    if exists(piece.done):
        said = json.loads(read_file(piece.done))
        if said["digest"] == digest and exists(piece.shard):
            return said
    failures: list[tuple[str, str]] = []

    def stored() -> Iterator[bytes]:
        for line in listed.splitlines():
            clip = records.store(_clip(line), options)
            if clip.failure:
                failures.append((clip.id, clip.failure))
            yield clip.record

    with tempfile.TemporaryDirectory() as folder:
        local = pathlib.Path(folder, "shard")
        clips, size = records.write_shard(local, stored())
        put_file(local, piece.shard)
        said = {"digest": digest, "clips": clips, "bytes": size, "failures": failures}
        local.write_text(json.dumps(said), encoding="utf-8")
        put_file(local, piece.done)
    return said


def finish(builder: ClipBuilder, files: pathlib.Path, options: BuildOptions, pieces: dict[str, list[Piece]]) -> None:
    """Makes a data set of the shards, when all are there.

    Raises `InputError` where no clip has media that can be decoded.
    """
    (files / records.FAILURES).unlink(missing_ok=True)
    failures, splits = records.Failures(files), []
    for split, some in pieces.items():
        shards = []
        for piece in some:
            here = files / WORK / pathlib.PurePath(piece.done).name
            # A mounted store may be slow to show what others have put there.
            said = json.loads(here.read_bytes() if here.exists() else read_file(piece.done))
            failures.count(split, said["clips"], [*map(tuple, said["failures"])])
            shards.append((said["clips"], said["bytes"]))
        splits.append(records.split_info(files, builder.name, split, shards))
    failures.finish(files)
    records.write_description(builder, options.variant, files, splits)
    _remove_all_but(files, pieces)
    shutil.rmtree(files / WORK)


def _line(clip: schema.ClipRecord, seen: Callable[[str], str]) -> str:
    fields = dataclasses.asdict(clip)
    if isinstance(clip.media, str):
        return json.dumps({**fields, "media": seen(clip.media)})
    return json.dumps({**fields, "media": None, "base64": base64.b64encode(clip.media).decode()})


def _clip(line: bytes) -> schema.ClipRecord:
    fields = json.loads(line)
    encoded = fields.pop("base64", None)
    questions = tuple(schema.Question(**{**q, "options": tuple(q["options"])}) for q in fields.pop("questions"))
    media = fields.pop("media") if encoded is None else base64.b64decode(encoded)
    return schema.ClipRecord(
        **{**fields, "media": media, "captions": tuple(fields["captions"]), "questions": questions}
    )


def _remove_all_but(files: pathlib.Path, pieces: dict[str, list[Piece]]) -> None:
    """Removes the shards of an earlier plan, and those that killed workers left half written."""
    shards = {pathlib.PurePath(piece.shard).name for some in pieces.values() for piece in some}
    for path in files.glob("*.array_record-*"):
        if path.name not in shards:
            path.unlink()


# FOLDED vlab_jax/datasets/clip_builder.py: A data set is built on this machine: clips are stored by worker
# processes and written in the order they come.


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
                functools.partial(records.store, options=options),
                clips,
                _workers(options),
                lambda clip: records.without_media(clip, options, ENDED),
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
