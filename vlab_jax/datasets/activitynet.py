"""ActivityNet Captions: paragraphs on YouTube videos of two minutes."""

from collections.abc import Iterator
from typing import ClassVar

from vlab_jax.datasets.annotations import AnnotationEntry, AnnotationFolder, Counts, Names, Protocol, serves
from vlab_jax.datasets.official import Official
from vlab_jax.datasets.text_files import read_json, texts_of
from vlab_jax.errors import InputError

_TRAIN: Names = ("train.json",)
_TEST: Names = ("val_1.json",)
# Of the training videos.
_VALIDATION_SHARE = 0.05


def read_all(folder: AnnotationFolder, split: str) -> Iterator[AnnotationEntry]:
    """Each video once, with its sentences joined in the order of the file, which is that of time."""
    file = folder.need(_TEST if split == "test" else _TRAIN)
    videos = read_json(file)
    if not isinstance(videos, dict) or not all(isinstance(video, dict) for video in videos.values()):
        raise InputError(f"{file} must be an object of videos, each with 'duration', 'timestamps' and 'sentences'")
    for name, video in videos.items():
        sentences = texts_of(video, "sentences", f"{file}, video {name}")
        # Many keep the videos under YouTube's name, without ActivityNet's `v_`.
        yield AnnotationEntry(
            name, name, split, (" ".join(sentences),), aliases=(name.removeprefix("v_"),), rows=len(sentences)
        )


def read_paragraphs(folder: AnnotationFolder, split: str) -> Iterator[AnnotationEntry]:
    """As `read_all`; validation is taken out of training."""
    for entry in read_all(folder, split):
        if serves(entry.video, split, _VALIDATION_SHARE):
            yield entry


_TRAIN_COUNTS = Counts(clips=10_009, rows=37_421)
_TEST_COUNTS = Counts(clips=4_917, rows=17_505)


class Activitynet(Official):
    """ActivityNet Captions: about 100,000 sentences on 20,000 YouTube videos of up to some minutes.

    Krishna et al., *Dense-Captioning Events in Videos*, ICCV 2017. The authors' `captions.zip` holds `train.json`,
    `val_1.json` and `val_2.json` (10,009 / 4,917 / 4,885 videos). Media are called `v_<YouTube's name>`, or by
    YouTube's name alone. The authors state no licence; the videos are their uploaders'.

    - `paragraphs`: paragraph-to-video retrieval as published (CLIP4Clip, arXiv 2104.08860): a video's sentences are
      joined and are one query, and `val_1` is test (4,917). `val_2` is on the same videos and therefore no validation:
      a twentieth of the training videos, by a hash of their names, is, and is taken out of training.
    - `paragraphs_all`: all 10,009 training videos, `val_1` as test, and no validation: for runs that report their last
      checkpoint.
    """

    FOLDERS: ClassVar = ("activitynet",)
    LICENSE: ClassVar = "not stated by the authors"
    HOMEPAGE: ClassVar = "https://cs.stanford.edu/people/ranjaykrishna/densevid/"
    PROTOCOLS: ClassVar = (
        Protocol(
            "paragraphs",
            "Paragraph-to-video retrieval; val_1 is test.",
            {"train": (_TRAIN,), "validation": (_TRAIN,), "test": (_TEST,)},
            read_paragraphs,
            {"train+validation": _TRAIN_COUNTS, "test": _TEST_COUNTS},
        ),
        Protocol(
            "paragraphs_all",
            "Paragraph-to-video retrieval; val_1 is test, and all of train is training.",
            {"train": (_TRAIN,), "test": (_TEST,)},
            read_all,
            {"train": _TRAIN_COUNTS, "test": _TEST_COUNTS},
        ),
    )
