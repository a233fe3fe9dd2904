"""WebVid: millions of stock videos with the caption that they are offered with."""

from collections.abc import Iterator
from functools import partial
from typing import ClassVar

from vlab_jax.datasets.annotations import AnnotationEntry, AnnotationFolder, Names, Protocol
from vlab_jax.datasets.official import Official
from vlab_jax.datasets.text_files import read_table, text_of


def read_captions(folder: AnnotationFolder, split: str, files: dict[str, Names]) -> Iterator[AnnotationEntry]:
    """The videos of a split, line by line. One without a caption has none, and no clip is made of it."""
    for where, row in read_table(folder.need(files[split]), ("videoid", "name")):
        name = text_of(row, "videoid", where)
        yield AnnotationEntry(name, name, split, tuple(filter(None, (row["name"].strip(),))))


def _protocol(size: str, description: str) -> Protocol:
    files = {"train": (f"results_{size}_train.csv",), "validation": (f"results_{size}_val.csv",)}
    return Protocol(
        size.lower(),
        description,
        {split: (names,) for split, names in files.items()},
        partial(read_captions, files=files),
    )


class Webvid(Official):
    """WebVid: stock videos with a caption each, for pre-training.

    Bain et al., *Frozen in Time*, ICCV 2021. The authors' files are `results_2M_train.csv` and `results_2M_val.csv`
    (2.5 million videos), or `results_10M_train.csv` and `results_10M_val.csv` (10.7 million), with columns `videoid`,
    `contentUrl`, `duration`, `page_dir` and `name`. Media are called `<videoid>.mp4`, by the authors' script in a
    folder `page_dir`. How many rows there are is not checked: copies differ by videos that were withdrawn, and the
    authors state no exact number. The videos' owner has had the data set withdrawn; no licence can be given here.

    The files are read line by line: memory does not grow with them.
    """

    FOLDERS: ClassVar = ("webvid",)
    LICENSE: ClassVar = "none; the terms of the videos' owner"
    HOMEPAGE: ClassVar = "https://github.com/m-bain/webvid"
    PROTOCOLS: ClassVar = (
        _protocol("2M", "The subset of 2.5 million videos, and its validation."),
        _protocol("10M", "All 10.7 million videos, and their validation."),
    )
