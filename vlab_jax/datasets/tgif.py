"""TGIF and TGIF-QA: captions of animated GIFs, and questions on them."""

import csv
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import ClassVar

from vlab_jax.datasets import annotations
from vlab_jax.datasets.annotations import AnnotationEntry, AnnotationFolder, Counts, Names, Protocol, serves
from vlab_jax.datasets.official import Official
from vlab_jax.datasets.text_files import read_lines, read_list
from vlab_jax.errors import InputError

_CAPTIONS = ("tgif-v1.0.tsv",)
_SPLITS: dict[str, Names] = {
    "train": ("splits/train.txt", "train.txt"),
    "validation": ("splits/val.txt", "val.txt"),
    "test": ("splits/test.txt", "test.txt"),
}
# Of TGIF-QA's training GIFs, which have no validation split.
_VALIDATION_SHARE = 0.1


def read_captions(folder: AnnotationFolder, split: str) -> Iterator[AnnotationEntry]:
    """The GIFs of a split, in its order, each with all its captions."""
    urls = list(dict.fromkeys(read_list(folder.need(_SPLITS[split]))))
    captions = defaultdict(list, {url: [] for url in urls})
    file = folder.need(_CAPTIONS)
    for number, row in enumerate(csv.reader(read_lines(file), delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
        if len(row) != 2 or not row[1].strip():
            raise InputError(f"{file} line {number}: is not an address, a tab and a caption; get the file anew")
        if row[0].strip() in captions:
            captions[row[0].strip()].append(row[1].strip())
    for url in urls:
        name = _name(url)
        yield AnnotationEntry(name, name, split, tuple(captions[url]), rows=len(captions[url]))


def read_questions(folder: AnnotationFolder, split: str, task: str) -> Iterator[AnnotationEntry]:
    """The GIFs of a split, each with all its questions of a task."""
    file = folder.need(_question_file(split, task))
    for name, questions in annotations.by_video(annotations.read_tgif_qa(file, task)).items():
        if serves(name, split, _VALIDATION_SHARE):
            yield AnnotationEntry(name, name, split, questions=questions, rows=len(questions))


def _name(url: str) -> str:
    return url.rsplit("/", 1)[-1].removesuffix(".gif")


def _question_file(split: str, task: str) -> Names:
    part = "Test" if split == "test" else "Train"
    return f"{part}_{task}_question.csv", f"{part}_{task}_question.tsv"


def _protocol(task: str, description: str, train: int, test: int) -> Protocol:
    return Protocol(
        task,
        description,
        {split: (_question_file(split, task),) for split in _SPLITS},
        partial(read_questions, task=task),
        {"train+validation": Counts(questions=train), "test": Counts(questions=test)},
    )


class Tgif(Official):
    """TGIF: 102,068 animated GIFs of Tumblr, with a caption each for training and validation and three for test.

    Li et al., *TGIF: A New Dataset and Benchmark on Animated GIF Description*, CVPR 2016. From the authors' repository
    `raingo/TGIF-Release`: `tgif-v1.0.tsv` (address and caption) and `splits/train.txt`, `val.txt` and `test.txt`
    (addresses; 80,000 / 10,708 / 11,360). Media are called as at the end of their address, as in
    `tumblr_nd24xaX8e61qkfwvbo1_250.gif`. For approved non-commercial research.
    """

    FOLDERS: ClassVar = ("tgif",)
    LICENSE: ClassVar = "approved non-commercial research purposes"
    HOMEPAGE: ClassVar = "https://github.com/raingo/TGIF-Release"
    PROTOCOLS: ClassVar = (
        Protocol(
            "captions",
            "The authors' split, for captioning and retrieval.",
            {split: (_CAPTIONS, names) for split, names in _SPLITS.items()},
            read_captions,
            {"train": Counts(clips=80_000), "validation": Counts(clips=10_708), "test": Counts(clips=11_360)},
        ),
    )


class TgifQa(Official):
    """TGIF-QA: 165,165 questions on the GIFs of TGIF, in four tasks.

    Jang et al., *Video Question Answering with Spatio-Temporal Reasoning*, IJCV 2019 (first CVPR 2017). From the
    authors' repository `YunseokJANG/tgif-qa`: `Train_<task>_question.csv` and `Test_<task>_question.csv`,
    tab-separated. Media are TGIF's, and may lie in its folder. Free to use for academic purposes only.

    - `frameqa` (39,392 / 13,691 questions): open-ended; reported is the share of answers that are exactly right.
    - `action` (20,475 / 2,274) and `transition` (52,704 / 6,232): one of five options.
    - `count` (26,843 / 3,554): a number; reported is the mean squared error.

    There is no validation split, and many published runs select on test. Here a tenth of the training GIFs, by a hash
    of their names, is validation, and is taken out of training.
    """

    FOLDERS: ClassVar = ("tgif_qa", "tgif")
    LICENSE: ClassVar = "academic purposes only"
    HOMEPAGE: ClassVar = "https://github.com/YunseokJANG/tgif-qa"
    PROTOCOLS: ClassVar = (
        _protocol("frameqa", "Open-ended questions that a frame answers.", 39_392, 13_691),
        _protocol("action", "What is done so many times? One of five options.", 20_475, 2_274),
        _protocol("transition", "What is done before or after? One of five options.", 52_704, 6_232),
        _protocol("count", "How many times? A number.", 26_843, 3_554),
    )
