"""MSRVTT-QA and MSVD-QA: questions made by rule from the captions of MSR-VTT and MSVD."""

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

from vlab_jax.data.schema import Question
from vlab_jax.datasets import annotations
from vlab_jax.datasets.annotations import AnnotationEntry, AnnotationFolder, Counts, Names, Protocol
from vlab_jax.datasets.msvd import MAPPING, clip_names
from vlab_jax.datasets.official import Official

_FILES: dict[str, Names] = {
    "train": ("train_qa.json", "train.csv"),
    "validation": ("val_qa.json", "val.csv"),
    "test": ("test_qa.json", "test.csv"),
}


def read_msrvtt_qa(folder: AnnotationFolder, split: str) -> Iterator[AnnotationEntry]:
    """Each clip with all its questions."""
    for number, questions in _questions(folder, split).items():
        name = f"video{number.removeprefix('video')}"
        yield AnnotationEntry(name, name, split, questions=questions, rows=len(questions))


def read_msvd_qa(folder: AnnotationFolder, split: str) -> Iterator[AnnotationEntry]:
    """Each clip with all its questions; media may be called by number, or by name where a file tells the name."""
    names = clip_names(folder)
    for number, questions in _questions(folder, split).items():
        numbered = f"vid{number.removeprefix('vid')}"
        name = names.get(int(number)) if number.isdigit() else None
        yield AnnotationEntry(
            numbered, name or numbered, split, questions=questions, aliases=(numbered,), rows=len(questions)
        )


def _questions(folder: AnnotationFolder, split: str) -> dict[str, tuple[Question, ...]]:
    file = folder.need(_FILES[split])
    read = annotations.read_qa_json if file.name.endswith(".json") else annotations.read_qa_csv
    return annotations.by_video(read(file))


def _protocol(
    read: Callable[[AnnotationFolder, str], Iterator[AnnotationEntry]],
    expected: Mapping[str, Counts],
    optional: tuple[Names, ...] = (),
) -> Protocol:
    files = {split: (names,) for split, names in _FILES.items()}
    return Protocol("questions", "All questions of a clip together.", files, read, expected, optional)


class MsrvttQa(Official):
    """MSRVTT-QA: 243,680 questions on MSR-VTT's clips, in its official split.

    Xu et al., *Video Question Answering via Gradually Refined Attention over Appearance and Motion*, ACM Multimedia
    2017. The authors' archive holds `train_qa.json`, `val_qa.json` and `test_qa.json` (158,581 / 12,278 / 72,821
    questions); HQGA's `train.csv`, `val.csv` and `test.csv` are read, too. Media are MSR-VTT's, and may lie in its
    folder. The authors state no licence of the data. Reported is the share of answers that are exactly right.
    """

    FOLDERS: ClassVar = ("msrvtt_qa", "msrvtt")
    LICENSE: ClassVar = "not stated by the authors"
    HOMEPAGE: ClassVar = "https://github.com/xudejing/video-question-answering"
    PROTOCOLS: ClassVar = (
        _protocol(
            read_msrvtt_qa,
            {
                "train": Counts(clips=6513, questions=158_581),
                "validation": Counts(clips=497, questions=12_278),
                "test": Counts(clips=2990, questions=72_821),
            },
        ),
    )


class MsvdQa(Official):
    """MSVD-QA: 50,505 questions on MSVD's clips.

    Of the authors of MSRVTT-QA, with files of the same names (30,933 / 6,415 / 13,157 questions). Clips are numbered
    from 1 to 1970 in the order of `youtube_mapping.txt`. The split, 1 to 1200, 1201 to 1450 and 1451 to 1970, is not
    MSVD's own: its validation has 150 of MSVD's test clips; its test has none of MSVD's training clips. Media may be
    called by number (`vid1201.avi`), or by name (`bQJQGoJF7_k_162_169.avi`) where `youtube_mapping.txt` or MSVD's lists
    of captions, which have the same order, tell it; they may lie in MSVD's folder. No licence is stated. Reported is
    the share of answers that are exactly right.
    """

    FOLDERS: ClassVar = ("msvd_qa", "msvd")
    LICENSE: ClassVar = "not stated by the authors"
    HOMEPAGE: ClassVar = "https://github.com/xudejing/video-question-answering"
    PROTOCOLS: ClassVar = (
        _protocol(
            read_msvd_qa,
            {
                "train": Counts(questions=30_933),
                "validation": Counts(clips=245, questions=6_415),
                "test": Counts(clips=504, questions=13_157),
            },
            optional=(MAPPING, ("train.json",), ("val.json",), ("test.json",)),
        ),
    )
