"""The building of a data set cut into pieces that need nothing of each other: a list of clips each, and its shard.

Lists and what became of them are files in `work/` beside the shards, so pieces can be done by any number of machines
that see the same files, in any order, and what is done already is not done again: a build that was ended goes on.
"""

import base64
import dataclasses
import hashlib
import itertools
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from vlab_jax.data import schema
from vlab_jax.data.builders import records, store
from vlab_jax.data.builders.clip_builder import ClipBuilder
from vlab_jax.data.builders.options import BuildOptions
from vlab_jax.data.files import exists, put_file, read_file

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
            clip = store.store(_clip(line), options)
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


def _line(clip: schema.Clip, seen: Callable[[str], str]) -> str:
    fields = dataclasses.asdict(clip)
    if isinstance(clip.media, str):
        return json.dumps({**fields, "media": seen(clip.media)})
    return json.dumps({**fields, "media": None, "base64": base64.b64encode(clip.media).decode()})


def _clip(line: bytes) -> schema.Clip:
    fields = json.loads(line)
    encoded = fields.pop("base64", None)
    questions = tuple(schema.Question(**{**q, "options": tuple(q["options"])}) for q in fields.pop("questions"))
    media = fields.pop("media") if encoded is None else base64.b64decode(encoded)
    return schema.Clip(**{**fields, "media": media, "captions": tuple(fields["captions"]), "questions": questions})


def _remove_all_but(files: pathlib.Path, pieces: dict[str, list[Piece]]) -> None:
    """Removes the shards of an earlier plan, and those that killed workers left half written."""
    shards = {pathlib.PurePath(piece.shard).name for some in pieces.values() for piece in some}
    for path in files.glob("*.array_record-*"):
        if path.name not in shards:
            path.unlink()
