"""WebVid: stock videos with a caption each, for pre-training.

Bain et al., *Frozen in Time*, ICCV 2021. The authors' files are `results_2M_train.csv` and `results_2M_val.csv` (2.5
million videos), or `results_10M_train.csv` and `results_10M_val.csv` (10.7 million), with columns `videoid`,
`contentUrl`, `duration`, `page_dir` and `name`. Media are called `<videoid>.mp4`; the authors' script puts them in
folders `page_dir`. The number of rows is not checked: copies differ by videos that were withdrawn, and the authors
state no exact number. The owner of the videos has had the data set withdrawn; no licence can be given here.
"""

from collections.abc import Iterator

from vlab_jax.datasets.annotations import AnnotationEntry, Protocol
from vlab_jax.datasets.official import OfficialDataset
from vlab_jax.datasets.text_files import TextFile, read_table, text_of


def read_captions(split: str, file: TextFile) -> Iterator[AnnotationEntry]:
    """The videos of a split, line by line. Those without a caption become no clips."""
    for where, row in read_table(file, ("videoid", "name")):
        name = text_of(row, "videoid", where)
        yield AnnotationEntry(name, name, split, tuple(filter(None, (row["name"].strip(),))))


def _protocol(size: str, description: str) -> Protocol:
    files = {"train": f"results_{size}_train.csv", "validation": f"results_{size}_val.csv"}
    return Protocol(size.lower(), description, files, read_captions)


WEBVID = OfficialDataset(
    name="webvid",
    description=__doc__,
    license="none; the terms of the videos' owner",
    homepage="https://github.com/m-bain/webvid",
    protocols=(
        _protocol("2M", "The subset of 2.5 million videos, and its validation."),
        _protocol("10M", "All 10.7 million videos, and their validation."),
    ),
)
