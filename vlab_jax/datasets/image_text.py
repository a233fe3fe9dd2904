"""Pairs of an image and its caption by the million: CC3M, and whatever lies in the same two forms."""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import pyarrow
import pyarrow.parquet

from vlab_jax.datasets.annotations import AnnotationEntry, AnnotationFolder, Names, Protocol
from vlab_jax.datasets.media_index import without_extension
from vlab_jax.datasets.official import Official
from vlab_jax.datasets.text_files import TextFile, read_table
from vlab_jax.errors import InputError

# Columns of a table, and of a shard of img2dataset; the first that there is holds it.
_PATHS = ("filepath", "image", "path")
_CAPTIONS = ("title", "caption", "text", "TEXT")
_ROWS_AT_ONCE = 1024


def read_pairs(folder: AnnotationFolder, split: str, files: Mapping[str, Names]) -> Iterator[AnnotationEntry]:
    """The images of a split, row by row. One without a caption has none, and no clip is made of it."""
    for file in folder.find_all(files[split]):
        within = _within(file, folder)
        for name, caption in _shard(file) if file.name.endswith(".parquet") else _listed(file):
            video = os.path.join(within, name)
            yield AnnotationEntry(video, video, split, tuple(filter(None, (caption.strip(),))))


def _listed(file: TextFile) -> Iterator[tuple[str, str]]:
    """Path and caption of each row of a table that is separated by tabs, as OpenCLIP reads it."""
    for where, row in read_table(file, (), delimiter="\t"):
        path = row[_column(row, _PATHS, where)]
        if not path.strip():
            raise InputError(f"{where}: has no path of an image; mend the line")
        yield without_extension(path.strip()), row[_column(row, _CAPTIONS, where)]


def _shard(file: TextFile) -> Iterator[tuple[str, str]]:
    """Path and caption of each row of `00017.parquet`, whose images lie in `00017/`."""
    shard = without_extension(file.path.name.removesuffix(".parquet"))
    try:
        table = pyarrow.parquet.ParquetFile(file.path)
        caption = _column(dict.fromkeys(table.schema_arrow.names), _CAPTIONS, str(file))
        key = _column(dict.fromkeys(table.schema_arrow.names), ("key",), str(file))
        for batch in table.iter_batches(_ROWS_AT_ONCE, columns=[key, caption]):
            for row in batch.to_pylist():
                yield f"{shard}/{row[key]}", row[caption] or ""
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file} cannot be read ({' '.join(str(error).split())}); get it anew") from error


def _column(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in row:
            return name
    raise InputError(f"{where}: there is no column {' or '.join(names)}; the columns are {', '.join(row)[:200]}")


def _within(file: TextFile, folder: AnnotationFolder) -> str:
    """Where a file lies in the data set's folder: its images are called from there."""
    for each in folder.folders:
        if file.path.is_relative_to(each):
            return file.path.parent.relative_to(each).as_posix().removeprefix(".")
    return ""


_CC3M: dict[str, Names] = {
    "train": ("Train_GCC-training_output.csv", "train/*.parquet"),
    "validation": ("Validation_GCC-1.1.0-Validation_output.csv", "validation/*.parquet", "val/*.parquet"),
}
_ANY: dict[str, Names] = {
    "train": ("train.tsv", "train/*.parquet", "*.parquet"),
    "validation": ("validation.tsv", "validation/*.parquet"),
    "test": ("test.tsv", "test/*.parquet"),
}


def _protocol(description: str, files: Mapping[str, Names]) -> Protocol:
    of_split = {split: (names,) for split, names in files.items()}
    return Protocol("pairs", description, of_split, partial(read_pairs, files=files))


class Cc3m(Official):
    """CC3M, Conceptual Captions: 3.3 million images of the web with a cleaned caption each, for pre-training.

    Sharma et al., *Conceptual Captions: A Cleaned, Hypernymed, Image Alt-text Dataset For Automatic Image
    Captioning*, ACL 2018. The authors ship captions and addresses (3,318,333 and 15,840), without names of files, so
    these come from what downloads the images: `Train_GCC-training_output.csv` and
    `Validation_GCC-1.1.0-Validation_output.csv`, separated by tabs, with columns `title` and `filepath`, as
    OpenCLIP's `gather_cc.py` writes them; or img2dataset's folders of images with a parquet file beside each, in
    `train/` and `validation/`. How many rows there are is not checked: it is how many addresses still answered. Free
    to use with credit to Google; the images are their owners'.

    Read row by row: memory does not grow with the files.
    """

    FOLDERS: ClassVar = ("cc3m",)
    LICENSE: ClassVar = "annotations: free to use with credit to Google LLC"
    HOMEPAGE: ClassVar = "https://ai.google.com/research/ConceptualCaptions/"
    PROTOCOLS: ClassVar = (_protocol("Training and validation.", _CC3M),)


class ImageText(Official):
    """Images with a caption each, by the million, such as a part of LAION, for pre-training.

    Two forms are read. Tables `train.tsv`, `validation.tsv` and `test.tsv`, separated by tabs, with a header:
    `filepath` (or `image`, `path`), from the table's folder, and `title` (or `caption`, `text`). Or what img2dataset
    writes with `--output_format files`: folders of images, each with a parquet file beside it that has columns `key`
    and `caption`; in `train/`, `validation/` and `test/`, or all in one folder, which is then training. Rows whose
    download failed are missing media. There is no number to check, and the licence is the images' own.

    Read row by row: memory does not grow with the files.
    """

    FOLDERS: ClassVar = ("image_text",)
    LICENSE: ClassVar = "the images' own"
    PROTOCOLS: ClassVar = (_protocol("The splits there are.", _ANY),)
