"""Folders of official data sets in small: annotation files in the authors' formats, and media."""

import functools
import json
import pathlib
from collections.abc import Iterator, Sequence

from vlab_jax.datasets.annotations import AnnotationEntry, AnnotationSource
from vlab_jax.datasets.motion.dataset import CONFIGS, video_clips
from vlab_jax.datasets.official import OfficialDataset
from vlab_jax.datasets.registry import find, known_specs


@functools.cache
def small_video(number: int = 0) -> bytes:
    """A video of two seconds; each number has its own."""
    clips = video_clips(CONFIGS["tiny"], "train")
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


def source_of(spec: str, manual_dir: pathlib.Path) -> AnnotationSource:
    """The annotations in a directory, which may lack files."""
    dataset, config = find(spec)
    return AnnotationSource(spec, dataset.protocol(config), dataset.find_folders(str(manual_dir)))


def entries(spec: str, manual_dir: pathlib.Path, split: str) -> Iterator[AnnotationEntry]:
    """The entries of a split, as its reader gives them; counts are not compared."""
    return source_of(spec, manual_dir).read(split)


def official() -> list[str]:
    """The specs of all official data sets with all configurations."""
    return [spec for spec in known_specs() if isinstance(find(spec)[0], OfficialDataset)]
