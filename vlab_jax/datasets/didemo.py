"""DiDeMo: descriptions of moments in Flickr videos of 25 to 30 seconds."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from vlab_jax.datasets.annotations import AnnotationEntry, AnnotationFolder, Counts, Names, Protocol
from vlab_jax.datasets.media_index import without_extension
from vlab_jax.datasets.official import Official
from vlab_jax.datasets.text_files import read_json_list, text_of
from vlab_jax.errors import InputError

_FILES: dict[str, Names] = {
    "train": ("train_data.json",),
    "validation": ("val_data.json",),
    "test": ("test_data.json",),
}
SEGMENT = 5.0  # seconds
# What was shown to the annotators of longer videos.
SHOWN = 30.0
_PARTS = math.lcm(*range(1, 13))  # of the whole; a moment has six segments at most


def read_paragraphs(folder: AnnotationFolder, split: str) -> Iterator[AnnotationEntry]:
    """Each video once, with its descriptions joined in the order of the file."""
    texts = defaultdict(list)
    for where, record in _records(folder, split):
        texts[_video(record, where)].append(text_of(record, "description", where))
    for name, joined in texts.items():
        yield AnnotationEntry(name, name, split, (" ".join(joined),), end=SHOWN, rows=len(joined))


def read_moments(folder: AnnotationFolder, split: str) -> Iterator[AnnotationEntry]:
    """Each description with the interval on which its annotators agree."""
    for where, record in _records(folder, split):
        name, identity = _video(record, where), record["annotation_id"]
        start, end = agreed_interval(_times(record, where))
        text = text_of(record, "description", where)
        yield AnnotationEntry(f"{name}:{identity}", name, split, (text,), start=start, end=end)


def agreed_interval(times: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Start and end in seconds of the interval that agrees best with all of them, as the others of the same moment do.

    Agreement is the sum of intersection over union; of equals, the earliest counts, and of these the shortest. Where
    most annotators name the same interval, it is that.

    Args:
      times: the first and the last segment of 5 s, as each annotator has marked them.
    """
    best = min(times, key=lambda time: (-sum(_overlap(time, other) for other in times), time))
    return SEGMENT * best[0], SEGMENT * (best[1] + 1)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> int:
    """Intersection over union, as a multiple of a small part: equals are equal in whatever order they are added."""
    shared = min(one[1], other[1]) - max(one[0], other[0]) + 1
    return max(shared, 0) * _PARTS // (max(one[1], other[1]) - min(one[0], other[0]) + 1)


def _records(folder: AnnotationFolder, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    return read_json_list(folder.need(_FILES[split]), ("video", "description", "times", "annotation_id"))


def _video(record: dict[str, Any], where: str) -> str:
    # The file calls some videos by several names that differ in their extension; without it, there are as many videos
    # as were published.
    return without_extension(text_of(record, "video", where))


def _times(record: dict[str, Any], where: str) -> list[tuple[int, int]]:
    times = record["times"]
    if not isinstance(times, list) or not times or not all(map(_is_interval, times)):
        raise InputError(f"{where}: 'times' is {str(times)[:60]}; it must be a list of first and last segments")
    return [tuple(time) for time in times]


def _is_interval(time: Any) -> bool:
    return isinstance(time, list) and [type(part) for part in time] == [int, int] and 0 <= time[0] <= time[1]


def _counts(videos: int, descriptions: int, *, moments: bool) -> Counts:
    return Counts(clips=descriptions if moments else videos, videos=videos, rows=descriptions)


def _expected(*, moments: bool) -> dict[str, Counts]:
    return {
        "train": _counts(8395, 33_005, moments=moments),
        "validation": _counts(1065, 4_180, moments=moments),
        "test": _counts(1004, 4_021, moments=moments),
    }


class Didemo(Official):
    """DiDeMo: 41,206 descriptions of moments in 10,464 Flickr videos of 25 to 30 seconds.

    Hendricks et al., *Localizing Moments in Video with Natural Language*, ICCV 2017. From the authors' repository
    `LisaAnne/LocalizingMoments`: `train_data.json`, `val_data.json` and `test_data.json` (33,005 / 4,180 / 4,021
    descriptions of 8,395 / 1,065 / 1,004 videos). Media are called as in the files, whatever their extension: the files
    call some videos by several names that differ in nothing else (1,094 names of the 1,065 of validation), and they are
    one video here. The videos have Creative Commons licences of their own (`video_licenses.txt`).

    - `paragraphs`: retrieval as CLIP4Clip describes it (arXiv 2104.08860): a video's descriptions are joined in the
      order of the file, and are one query. A video is shown to its 30th second, as it was to the annotators.
    - `moments`: each description with its own interval. Four or more annotators have marked each, in segments of 5 s
      (`times`); the one that agrees best with all of them is taken (`agreed_interval`).

    Videos are often a little shorter than their last segment. An interval that ends past the end of its video is cut to
    it when frames are chosen; one that lies wholly outside is named by `vlab_jax.datasets.check`, and cannot be decoded.
    """

    FOLDERS: ClassVar = ("didemo",)
    LICENSE: ClassVar = "videos: Creative Commons, each its own"
    HOMEPAGE: ClassVar = "https://github.com/LisaAnne/LocalizingMoments"
    PROTOCOLS: ClassVar = (
        Protocol(
            "paragraphs",
            "Paragraph-to-video retrieval: a video's descriptions are one text.",
            {split: (names,) for split, names in _FILES.items()},
            read_paragraphs,
            _expected(moments=False),
        ),
        Protocol(
            "moments",
            "Each description with its interval.",
            {split: (names,) for split, names in _FILES.items()},
            read_moments,
            _expected(moments=True),
        ),
    )
