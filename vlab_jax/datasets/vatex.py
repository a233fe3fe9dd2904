"""VATEX: 34,991 YouTube clips of ten seconds, with ten English captions each (and ten Chinese, not read here).

Wang et al., *VATEX: A Large-Scale, High-Quality Multilingual Dataset for Video-and-Language Research*, ICCV 2019. The
authors' files are `vatex_training_v1.0.json`, `vatex_validation_v1.0.json` and `vatex_public_test_english_v1.1.json`
(25,991 / 3,000 / 6,000 clips); lists called `train.json`, `val.json` and `test.json` with `video` and `caption` are
read, too. Media are called `<YouTube's name>_<start>_<end>`, in six digits, as in `G9zN5TTuGO4_000179_000189.mp4`.
Annotations: CC BY 4.0.

The one split serves captioning, with the public test, and retrieval. (Retrieval is also published on two halves of the
validation split, by a list of Chen et al., CVPR 2020; figures on those are not comparable with these.)
"""

from collections.abc import Iterator

from vlab_jax.datasets.annotations import AnnotationEntry, Protocol
from vlab_jax.datasets.official import OfficialDataset
from vlab_jax.datasets.text_files import TextFile, read_objects, text_of, texts_of


def read_captions(split: str, file: TextFile) -> Iterator[AnnotationEntry]:
    """The clips of a split with their English captions."""
    for where, record in read_objects(file):
        video, captions = ("videoID", "enCap") if "videoID" in record else ("video", "caption")
        name = text_of(record, video, where)
        yield AnnotationEntry(name, name, split, texts_of(record, captions, where))


VATEX = OfficialDataset(
    name="vatex",
    description=__doc__,
    license="annotations: CC BY 4.0",
    homepage="https://eric-xw.github.io/vatex-website/",
    protocols=(
        Protocol(
            "captions",
            "The official split, with the public test, for captioning and retrieval.",
            {
                "train": "vatex_training_v1.0.json|train.json",
                "validation": "vatex_validation_v1.0.json|val.json",
                "test": "vatex_public_test_english_v1.1.json|test.json",
            },
            read_captions,
            {
                "train": {"clips": 25_991, "videos": 25_991, "captions": 259_910},
                "validation": {"clips": 3_000, "videos": 3_000, "captions": 30_000},
                "test": {"clips": 6_000, "videos": 6_000, "captions": 60_000},
            },
        ),
    ),
)
