"""ActivityNet Captions: about 100,000 sentences on 20,000 YouTube videos of up to some minutes.

Krishna et al., *Dense-Captioning Events in Videos*, ICCV 2017. The authors' `captions.zip` holds `train.json`,
`val_1.json` and `val_2.json` (10,009 / 4,917 / 4,885 videos). Media are called `v_<YouTube's name>`, or by YouTube's
name alone. The authors state no licence; the videos are their uploaders'.

- `paragraphs`: paragraph-to-video retrieval as published (CLIP4Clip, arXiv 2104.08860): a video's sentences are joined
  into one query, and `val_1` is test (4,917). `val_2` is on the same videos and therefore no validation: a twentieth of
  the training videos, chosen by a hash of their names, is, and is taken out of training.
- `paragraphs_all`: all 10,009 training videos, `val_1` as test, and no validation: for runs that report their last
  checkpoint.
"""

from collections.abc import Iterator

from vlab_jax.datasets.annotations import AnnotationEntry, Protocol, in_split
from vlab_jax.datasets.official import OfficialDataset
from vlab_jax.datasets.text_files import TextFile, read_json, texts_of
from vlab_jax.errors import InputError

_VALIDATION_SHARE = 0.05  # of the training videos
_TRAIN_COUNTS = {"clips": 10_009, "rows": 37_421}
_TEST_COUNTS = {"clips": 4_917, "rows": 17_505}


def read_all(split: str, file: TextFile) -> Iterator[AnnotationEntry]:
    """Each video once, with its sentences joined in the order of the file, which is chronological."""
    videos = read_json(file)
    if not isinstance(videos, dict) or not all(isinstance(video, dict) for video in videos.values()):
        raise InputError(f"{file} must be an object of videos, each with 'duration', 'timestamps' and 'sentences'")
    for name, video in videos.items():
        sentences = texts_of(video, "sentences", f"{file}, video {name}")
        # Many copies keep YouTube's names, without ActivityNet's `v_`.
        aliases = (name.removeprefix("v_"),)
        yield AnnotationEntry(name, name, split, (" ".join(sentences),), aliases=aliases, rows=len(sentences))


def read_paragraphs(split: str, file: TextFile) -> Iterator[AnnotationEntry]:
    """Like `read_all`, with validation taken out of training."""
    return (entry for entry in read_all(split, file) if in_split(entry.video, split, _VALIDATION_SHARE))


ACTIVITYNET = OfficialDataset(
    name="activitynet",
    description=__doc__,
    license="not stated by the authors",
    homepage="https://cs.stanford.edu/people/ranjaykrishna/densevid/",
    protocols=(
        Protocol(
            "paragraphs",
            "Paragraph-to-video retrieval; val_1 is test.",
            {"train": "train.json", "validation": "train.json", "test": "val_1.json"},
            read_paragraphs,
            {"train+validation": _TRAIN_COUNTS, "test": _TEST_COUNTS},
        ),
        Protocol(
            "paragraphs_all",
            "Paragraph-to-video retrieval; val_1 is test, and all of train is training.",
            {"train": "train.json", "test": "val_1.json"},
            read_all,
            {"train": _TRAIN_COUNTS, "test": _TEST_COUNTS},
        ),
    ),
)
