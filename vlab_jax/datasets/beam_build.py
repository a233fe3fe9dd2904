"""Prepares a data set by an Apache Beam pipeline: on one machine, or on Dataflow, Flink or Spark.

The work is cut into pieces that need nothing of each other: a list of clips each, and its shard. Lists and results are
files in `work/` beside the shards, so any machines that share these files can do the pieces, in any order, and a build
that was ended continues with the pieces that are not done. No media pass between workers, as they would in TFDS's own
Beam writer, which groups all records by shard.
"""

import base64
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from vlab_jax.data import schema
from vlab_jax.datasets import records
from vlab_jax.datasets.records import BuildOptions, ClipDataset, beam_files, is_remote, read_file
from vlab_jax.errors import InputError, RunStopped

WORK = "work"


@dataclasses.dataclass(frozen=True)
class BeamOptions:
    """How a pipeline runs.

    Attributes:
      flags: flags of Beam and its runner, as in `--runner=FlinkRunner`; without a runner, Beam's own on this machine.
      clips_per_shard: clips of a shard, which is what one worker does at a time.
      paths: `here=there`, if workers have other paths than this machine: paths that begin with `here` begin with
        `there` for them, as in `/mnt/bucket=gs://bucket`. Empty: the paths are the same.
    """

    flags: tuple[str, ...] = ()
    clips_per_shard: int = 1000
    paths: str = ""

    def __post_init__(self) -> None:
        if self.clips_per_shard < 1:
            raise InputError(f"clips_per_shard is {self.clips_per_shard}; it must be at least 1")
        here, mark, there = self.paths.partition("=")
        if self.paths and not (mark and there and os.path.isabs(here)):
            raise InputError(f"paths is {self.paths!r}; it must be here=there, as in /mnt/bucket=gs://bucket")

    def worker_path(self, path: str) -> str:
        """A path of this machine as a worker sees it."""
        here, _, there = self.paths.partition("=")
        here, there = here.rstrip("/"), there.rstrip("/")
        return there + path.removeprefix(here) if here and path.startswith(f"{here}/") else path


class Piece(NamedTuple):
    """A piece of the work: the paths, as workers see them, of its list of clips, its shard and its result."""

    clips: str
    shard: str
    result: str


def build(dataset: ClipDataset, files: pathlib.Path, options: BuildOptions, beam: BeamOptions) -> None:
    """Writes the data set into the directory `files`, shard by shard; after an interruption, it continues from there.

    Raises:
      InputError: Beam is not installed, or no clip has media that can be decoded.
      RunStopped: the pipeline failed.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise InputError(f"--beam needs Apache Beam ({error}): pip install 'apache-beam>=2.77,<3'") from error
    title = dataset.progress_title(options)
    logging.info("%s: writing the lists of clips", title)
    pieces = plan_pieces(dataset, files, beam.clips_per_shard, beam.worker_path)
    all_pieces = list(itertools.chain(*pieces.values()))
    done = len(list((files / WORK).glob("*.json")))
    logging.info("%s: %d of %d shards were done before", title, done, len(all_pieces))
    try:
        with apache_beam.Pipeline(options=PipelineOptions(list(beam.flags))) as pipeline:
            _ = (
                pipeline
                | "Pieces" >> apache_beam.Create(all_pieces)
                | "Spread" >> apache_beam.Reshuffle()
                | "Store" >> apache_beam.Map(do_piece, options)
            )
    except Exception as error:  # each runner has its own
        logging.exception("the pipeline failed")
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RunStopped(f"the pipeline failed: {reason}; what is done is kept, the same command goes on") from error
    join_pieces(dataset, files, options, pieces)


def plan_pieces(
    dataset: ClipDataset, files: pathlib.Path, clips_per_shard: int, worker_path: Callable[[str], str]
) -> dict[str, list[Piece]]:
    """Writes the lists of clips into the directory `files`; returns the pieces of each split. Memory holds one list."""
    work = files / WORK
    work.mkdir(parents=True, exist_ok=True)
    pieces: dict[str, list[Piece]] = {}
    for split, clips in dataset.clips().items():
        lists = []
        while chunk := list(itertools.islice(clips, clips_per_shard)):
            lists.append(work / f"{split}-{len(lists):05d}.jsonl")
            lists[-1].write_text("".join(f"{_clip_to_line(clip, worker_path)}\n" for clip in chunk), encoding="utf-8")
        shards = records.split_info(files, dataset.name, split, [(0, 0)] * len(lists)).filepaths
        paths = zip(lists, shards, [path.with_suffix(".json") for path in lists], strict=True)
        pieces[split] = [Piece(*(worker_path(str(path)) for path in of_piece)) for of_piece in paths]
    return pieces


def do_piece(piece: Piece, options: BuildOptions) -> dict[str, Any]:
    """Writes the shard of a piece, unless it was written from the same list with the same options.

    Returns the content of `piece.result`: the `digest` of the list, `clips`, `bytes`, and `failures` (ids and reasons).
    """
    listed = read_file(piece.clips)
    digest = hashlib.sha256(listed + options.variant_suffix.encode()).hexdigest()
    if _exists(piece.result):
        result = json.loads(read_file(piece.result))
        if result["digest"] == digest and _exists(piece.shard):
            return result
    failures: list[tuple[str, str]] = []

    def encoded() -> Iterator[bytes]:
        for line in listed.splitlines():
            clip = records.encode_clip(_clip_from_line(line), options)
            if clip.failure:
                failures.append((clip.id, clip.failure))
            yield clip.record

    with tempfile.TemporaryDirectory() as folder:
        local = pathlib.Path(folder, "shard")
        clips, size = records.write_shard(local, encoded())
        _copy(local, piece.shard)
        result = {"digest": digest, "clips": clips, "bytes": size, "failures": failures}
        local.write_text(json.dumps(result), encoding="utf-8")
        _copy(local, piece.result)
    return result


def join_pieces(
    dataset: ClipDataset, files: pathlib.Path, options: BuildOptions, pieces: dict[str, list[Piece]]
) -> None:
    """Makes a data set of the shards, when all are there. Raises `InputError` if no clip has media."""
    (files / records.FAILURES).unlink(missing_ok=True)
    failures, splits = records.FailureLog(files), []
    for split, of_split in pieces.items():
        shards = []
        for piece in of_split:
            here = files / WORK / pathlib.PurePath(piece.result).name
            # A mounted store may be slow to show what others have put there.
            result = json.loads(here.read_bytes() if here.exists() else read_file(piece.result))
            failures.add(split, result["clips"], map(tuple, result["failures"]))
            shards.append((result["clips"], result["bytes"]))
        splits.append(records.split_info(files, dataset.name, split, shards))
    failures.finish(files)
    records.write_description(dataset, options.variant, files, splits)
    shards = {pathlib.PurePath(piece.shard).name for piece in itertools.chain(*pieces.values())}
    for path in files.glob("*.array_record-*"):  # also those of an earlier plan, and what killed workers left
        if path.name not in shards:
            path.unlink()
    shutil.rmtree(files / WORK)


def _clip_to_line(clip: schema.ClipRecord, worker_path: Callable[[str], str]) -> str:
    media = worker_path(clip.media) if isinstance(clip.media, str) else [base64.b64encode(clip.media).decode()]
    return json.dumps({**dataclasses.asdict(clip), "media": media})


def _clip_from_line(line: bytes) -> schema.ClipRecord:
    fields = json.loads(line)
    path = isinstance(fields["media"], str)
    fields["media"] = fields["media"] if path else base64.b64decode(*fields["media"])
    fields["captions"] = tuple(fields["captions"])
    fields["questions"] = tuple(
        schema.Question(**{**question, "options": tuple(question["options"])}) for question in fields["questions"]
    )
    return schema.ClipRecord(**fields)


def _exists(path: str) -> bool:
    return beam_files().exists(path) if is_remote(path) else os.path.exists(path)


def _copy(local: pathlib.Path, path: str) -> None:
    """Copies a local file to `path`, where it appears when it is complete."""
    if is_remote(path):
        with local.open("rb") as source, beam_files().create(path) as target:
            shutil.copyfileobj(source, target, 1 << 20)
        return
    partial = f"{path}.{uuid.uuid4().hex}.part"  # two machines may write the same shard
    shutil.copyfile(local, partial)
    os.replace(partial, path)
