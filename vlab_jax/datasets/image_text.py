"""Pairs of an image and its caption, by the million: CC3M, and other corpora in the same two formats."""

import os
from collections.abc import Iterable, Iterator

import pyarrow
import pyarrow.parquet

from vlab_jax.datasets.annotations import AnnotationEntry, Protocol
from vlab_jax.datasets.media_index import without_extension
from vlab_jax.datasets.official import OfficialDataset
from vlab_jax.datasets.text_files import TextFile, read_table, text_of
from vlab_jax.errors import InputError

# Alternative names of the columns, the preferred one first.
_PATHS = ("filepath", "image", "path")
_CAPTIONS = ("title", "caption", "text", "TEXT")


def read_pairs(split: str, *files: TextFile) -> Iterator[AnnotationEntry]:
    """The images of a split, row by row. Those without a caption become no clips."""
    for file in files:
        # Paths of images begin at the table, or at the folder of a parquet file.
        within = file.path.parent.relative_to(file.top).as_posix().removeprefix(".")
        for name, caption in _shard(file) if file.name.endswith(".parquet") else _listed(file):
            video = os.path.join(within, name)
            yield AnnotationEntry(video, video, split, tuple(filter(None, (caption.strip(),))))


def _listed(file: TextFile) -> Iterator[tuple[str, str]]:
    """Path and caption of each row of a tab-separated table, as OpenCLIP reads it."""
    for where, row in read_table(file, (), delimiter="\t"):
        path = text_of(row, _column(row, _PATHS, where), where)
        yield without_extension(path), row[_column(row, _CAPTIONS, where)]


def _shard(file: TextFile) -> Iterator[tuple[str, str]]:
    """Path and caption of each row of `00017.parquet`, whose images are in `00017/`."""
    shard = without_extension(file.path.stem)
    try:
        table = pyarrow.parquet.ParquetFile(file.path)
        key, caption = (_column(table.schema_arrow.names, names, str(file)) for names in (("key",), _CAPTIONS))
        for batch in table.iter_batches(columns=[key, caption]):
            for row in batch.to_pylist():
                yield f"{shard}/{row[key]}", row[caption] or ""
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file} cannot be read ({' '.join(str(error).split())}); get it anew") from error


def _column(columns: Iterable[str], names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in columns:
            return name
    raise InputError(f"{where}: there is no column {' or '.join(names)}; the columns are {', '.join(columns)[:200]}")


CC3M = OfficialDataset(
    name="cc3m",
    description="""CC3M, Conceptual Captions: 3.3 million web images with a cleaned caption each, for pre-training.

Sharma et al., *Conceptual Captions: A Cleaned, Hypernymed, Image Alt-text Dataset For Automatic Image Captioning*, ACL
2018. The authors ship captions and addresses (3,318,333 and 15,840), without names of files, so these come from the
program that downloads the images: `Train_GCC-training_output.csv` and `Validation_GCC-1.1.0-Validation_output.csv`,
separated by tabs, with columns `title` and `filepath`, as OpenCLIP's `gather_cc.py` writes them; or img2dataset's
folders of images with a parquet file beside each, in `train/` and `validation/`. The number of rows is not checked,
since it depends on how many addresses still answered. Free to use with credit to Google; the images are their owners'.
""",
    license="annotations: free to use with credit to Google LLC",
    homepage="https://ai.google.com/research/ConceptualCaptions/",
    protocols=(
        Protocol(
            "pairs",
            "Training and validation.",
            {
                "train": "Train_GCC-training_output.csv|train/*.parquet",
                "validation": "Validation_GCC-1.1.0-Validation_output.csv|validation/*.parquet|val/*.parquet",
            },
            read_pairs,
        ),
    ),
)


IMAGE_TEXT = OfficialDataset(
    name="image_text",
    description="""Images with a caption each, by the million, such as a part of LAION, for pre-training.

Two formats are read. Tables `train.tsv`, `validation.tsv` and `test.tsv`, separated by tabs, with a header: `filepath`
(or `image`, `path`), from the table's folder, and `title` (or `caption`, `text`). Or what img2dataset writes with
`--output_format files`: folders of images, each with a parquet file beside it that has columns `key` and `caption`; in
`train/`, `validation/` and `test/`, or all in one folder, which is then training. Rows whose download failed are
missing media. There is no number to check, and the licence is the images' own.
""",
    license="the images' own",
    protocols=(
        Protocol(
            "pairs",
            "The splits that have files.",
            {
                "train": "train.tsv|train/*.parquet|*.parquet",
                "validation": "validation.tsv|validation/*.parquet",
                "test": "test.tsv|test/*.parquet",
            },
            read_pairs,
        ),
    ),
)
