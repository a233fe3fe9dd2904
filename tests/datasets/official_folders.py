"""Folders of official data sets in small: annotation files in the authors' formats, and media."""

import functools
import json
import pathlib
from collections.abc import Iterator, Sequence

from vlab_jax.datasets.annotations import AnnotationEntry, AnnotationFolder
from vlab_jax.datasets.motion.builder import Motion, video_clips
from vlab_jax.datasets.registry import BUILDERS, find


@functools.cache
def small_video(number: int = 0) -> bytes:
    """A video of two seconds; each number has its own."""
    clips = video_clips(Motion.builder_configs["tiny"], "train")
    return next(clip.media for place, clip in enumerate(clips) if place == number)


def write_media(folder: pathlib.Path, *names: str) -> None:
    """Videos of these names, each with bytes of its own."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(small_video(number))


def write_webvid(folder: pathlib.Path, train: Sequence[tuple[str, str]], val: Sequence[tuple[str, str]] = ()) -> None:
    """WebVid's annotations: rows of a video's id and its caption; no file for a split without rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("val", val)):
        lines = [f'{video},https://example.org/{video}.mp4,PT00H00M02S,000001_000050,"{text}"' for video, text in rows]
        if rows:
            header = "videoid,contentUrl,duration,page_dir,name"
            (folder / f"results_2M_{split}.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")


def write_json(folder: pathlib.Path, name: str, value: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def entries(spec: str, manual_dir: pathlib.Path, split: str) -> Iterator[AnnotationEntry]:
    """The entries of a split, as its reader gives them; counts are not compared."""
    builder_class, configuration = find(spec)
    folder = AnnotationFolder(builder_class.folders_of(str(manual_dir)))
    return builder_class.protocol_of(configuration).read(folder, split)


def official() -> list[str]:
    """All official data sets, each with each configuration."""
    return [f"{name}/{each.name}" for name, builder in BUILDERS.items() for each in getattr(builder, "PROTOCOLS", ())]
