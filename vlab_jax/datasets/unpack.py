"""Writes clips of a data set as files: videos to look at, to try a model on, or to make a data set of one's own from.

    python -m vlab_jax.datasets.unpack --dataset=motion --split=test --clips=24 --out=my_videos

Beside the media it writes `annotations.jsonl`, so that the directory is the data set `folder:my_videos`. Media that
several clips share are written for each.

Exit status: 0 done; 1 a fault of the program; 2 something to mend in the command or the data.
"""

import argparse
import json
import math
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlab_jax.errors import InputError, RunStopped

if TYPE_CHECKING:
    from vlab_jax.data.schema import ClipRecord

# How files begin, and the extension that they get; what begins otherwise becomes `.mpg`: FFmpeg looks inside, too.
_BEGINNINGS = (
    (re.compile(rb"....ftyp", re.DOTALL), "mp4"),
    (re.compile(rb"\x1aE\xdf\xa3"), "mkv"),
    (re.compile(rb"RIFF....AVI ", re.DOTALL), "avi"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "webp"),
    (re.compile(rb"GIF8"), "gif"),
    (re.compile(rb"\xff\xd8\xff"), "jpg"),
    (re.compile(rb"\x89PNG"), "png"),
)


def unpack(dataset: str, split: str, clips: int, out: pathlib.Path, directory: str = "", manual_dir: str = "") -> int:
    """Writes the first clips of a split into a new directory, which appears when it is complete.

    Args:
      dataset: as configs name it; it is prepared if it is not yet.
      clips: how many, at most; 0: all.
      directory, manual_dir: see `builders.options.BuildOptions`.

    Returns:
      How many were written.

    Raises:
      InputError: `out` exists or cannot be written, the data cannot be read, or they are stored as frames.
    """
    from vlab_jax.data import schema  # here, because all this takes seconds
    from vlab_jax.datasets import registry
    from vlab_jax.datasets.folder import ANNOTATIONS
    from vlab_jax.datasets.records import BuildOptions

    if out.exists():
        raise InputError(f"{out} exists already; name another directory, or remove it")
    source = registry.open_split(dataset, split, BuildOptions(directory, manual_dir))
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        count = min(len(source), clips or len(source))
        with open(partial / ANNOTATIONS, "w", encoding="utf-8") as annotations:
            for index in range(count):
                clip = schema.from_example(source[index])
                name = f"{re.sub(r'[^0-9A-Za-z_-]+', '_', clip.id)}.{extension(clip.media)}"
                (partial / name).write_bytes(clip.media)
                annotations.write(json.dumps(_row(clip, name, split), ensure_ascii=False) + "\n")
        os.replace(partial, out)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count


def extension(media: bytes | tuple[bytes, ...]) -> str:
    """The extension for the name of a media file."""
    if not isinstance(media, bytes):
        raise InputError("the data set is stored as frames; files are written of the variant 'file' alone")
    return next((name for beginning, name in _BEGINNINGS if beginning.match(media)), "mpg")


def _row(clip: "ClipRecord", name: str, split: str) -> dict:
    """The clip's line in the annotations of a folder."""
    part = {"start": clip.start} if clip.start else {}
    part |= {"end": clip.end} if clip.end < math.inf else {}
    asked = [
        {"question": q.question, "answer": q.answer, "type": q.type, **({"options": q.options} if q.options else {})}
        for q in clip.questions
    ]
    questions = {"questions": asked} if asked else {}
    return {"video": name, "id": clip.id, **part, "captions": clip.captions, **questions, "split": split}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vlab_jax.datasets.unpack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", required=True, help="as in motion, msrvtt/retrieval_9k or folder:/my/videos")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"), help="(default: test)")
    parser.add_argument("--clips", type=int, default=0, help="how many, at most (default: all)")
    parser.add_argument("--out", required=True, help="the directory to make")
    parser.add_argument("--directory", default="", help="where data sets are built (default: TFDS's)")
    parser.add_argument("--manual_dir", default="", help="where the files of official data sets lie")
    given = parser.parse_args(arguments)
    try:
        if given.clips < 0:
            raise InputError(f"--clips={given.clips} must be at least 1, or 0 for all")
        out = pathlib.Path(given.out)
        count = unpack(given.dataset, given.split, given.clips, out, given.directory, given.manual_dir)
    except (InputError, RunStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {count} clips into {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
