"""Writes clips of a data set as files: videos to look at, to try a model on, or to make a data set of one's own from.

    python -m vlab_jax.datasets.unpack --dataset=motion --split=test --clips=24 --out=my_videos

It writes `annotations.jsonl` beside the media, so the directory is the data set `folder:my_videos`. Media that several
clips share are written once for each.

Exit status: 0 done; 1 a bug in the program; 2 an error in the command or the data.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from vlab_jax.data import schema
from vlab_jax.datasets import registry
from vlab_jax.datasets.annotations import SPLITS
from vlab_jax.datasets.folder import ANNOTATIONS
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.errors import InputError, RunStopped

# The first bytes of files, by extension. Others become `.mpg`: FFmpeg looks into the file, too.
_FIRST_BYTES = {
    "mp4": rb"....ftyp",
    "mkv": rb"\x1aE\xdf\xa3",
    "avi": rb"RIFF....AVI ",
    "webp": rb"RIFF....WEBP",
    "gif": rb"GIF8",
    "jpg": rb"\xff\xd8\xff",
    "png": rb"\x89PNG",
}


def unpack(dataset: str, split: str, clips: int, out: pathlib.Path, options: BuildOptions) -> int:
    """Writes the first clips of a split into a new directory, which appears when it is complete; returns their number.

    Args:
      dataset: a spec; the data set is prepared if it is not yet.
      clips: the number of clips, at most; 0: all.

    Raises:
      InputError: `out` exists or cannot be written, the data cannot be read, or they are stored as frames.
    """
    if out.exists():
        raise InputError(f"{out} exists already; name another directory, or remove it")
    source = registry.open_split(dataset, split, options)
    partial, count = out.with_name(f"{out.name}.partial"), min(len(source), clips or len(source))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with open(partial / ANNOTATIONS, "w", encoding="utf-8") as annotations:
            for index in range(count):
                clip = schema.from_example(source[index])
                name = f"{re.sub(r'[^0-9A-Za-z_-]+', '_', clip.id)}.{extension(clip.media)}"
                while (partial / name).exists():  # `a.b` and `a_b` are two clips
                    name = f"{index}_{name}"
                (partial / name).write_bytes(clip.media)
                annotations.write(json.dumps(_annotation(clip, name, split), ensure_ascii=False) + "\n")
        os.replace(partial, out)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count


def extension(media: bytes | tuple[bytes, ...]) -> str:
    """The extension for the name of a media file. Raises `InputError` if it is stored as frames."""
    if not isinstance(media, bytes):
        raise InputError("the data set is stored as frames; only the variant 'file' has files to write")
    return next((name for name, first in _FIRST_BYTES.items() if re.match(first, media, re.DOTALL)), "mpg")


def _annotation(clip: schema.ClipRecord, name: str, split: str) -> dict[str, Any]:
    """The clip's line in the annotations of a folder, without empty fields."""
    questions = [{key: value for key, value in dataclasses.asdict(q).items() if value} for q in clip.questions]
    fields = {"video": name, "id": clip.id, "start": clip.start, "end": clip.end if clip.end < math.inf else None}
    fields |= {"captions": clip.captions, "questions": questions, "split": split}
    return {key: value for key, value in fields.items() if value}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vlab_jax.datasets.unpack",
        description=__doc__,
        epilog=registry.specs_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", required=True, help="as in motion, msrvtt/retrieval_9k or folder:/my/videos")
    add("--split", default="test", choices=SPLITS, help="(default: test)")
    add("--clips", type=int, default=0, help="the number of clips, at most (default: all)")
    add("--out", required=True, type=pathlib.Path, help="the directory to make")
    add("--directory", default="", help="directory of prepared data sets (default: TFDS's)")
    add("--manual_dir", default="", help="directory of the files of official data sets")
    flags = parser.parse_args(arguments)
    try:
        if flags.clips < 0:
            raise InputError(f"--clips={flags.clips} must be at least 1, or 0 for all")
        options = BuildOptions(flags.directory, flags.manual_dir)
        count = unpack(flags.dataset, flags.split, flags.clips, flags.out, options)
    except (InputError, RunStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {count} clips into {flags.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
