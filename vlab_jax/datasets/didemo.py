"""DiDeMo: 41,206 descriptions of moments in 10,464 Flickr videos of 25 to 30 seconds.

Hendricks et al., *Localizing Moments in Video with Natural Language*, ICCV 2017. From the authors' repository
`LisaAnne/LocalizingMoments`: `train_data.json`, `val_data.json` and `test_data.json` (33,005 / 4,180 / 4,021
descriptions of 8,395 / 1,065 / 1,004 videos). Media have the names in these files, with any extension: the files call
some videos by several names that differ only in it (1,094 names of the 1,065 videos of validation), and these are one
video here. The videos have Creative Commons licences of their own (`video_licenses.txt`).

- `paragraphs`: retrieval as CLIP4Clip describes it (arXiv 2104.08860): a video's descriptions are joined in the order
  of the file into one query. A video is shown to its 30th second, as it was to the annotators.
- `moments`: each description with its own interval. Four or more annotators have marked each, in segments of 5 s
  (`times`); the interval that agrees best with all of them is taken (`agreed_interval`).

Videos are often a little shorter than their last segment. An interval that ends past the end of its video is cut to it
when frames are chosen; one that is wholly outside is named by `vlab_jax.datasets.check`, and cannot be decoded.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from vlab_jax.datasets.annotations import AnnotationEntry, Protocol
from vlab_jax.datasets.media_index import without_extension
from vlab_jax.datasets.official import OfficialDataset
from vlab_jax.datasets.text_files import TextFile, name_of, quoted, read_objects, text_of
from vlab_jax.errors import InputError

SEGMENT = 5.0  # seconds
SHOWN = 30.0  # seconds of longer videos that annotators saw
_PARTS = math.lcm(*range(1, 13))  # a moment has six segments at most, a union twelve


def read_paragraphs(split: str, file: TextFile) -> Iterator[AnnotationEntry]:
    """Each video once, with its descriptions joined in the order of the file."""
    texts = defaultdict(list)
    for where, record in read_objects(file):
        texts[_video(record, where)].append(text_of(record, "description", where))
    for name, joined in texts.items():
        yield AnnotationEntry(name, name, split, (" ".join(joined),), end=SHOWN, rows=len(joined))


def read_moments(split: str, file: TextFile) -> Iterator[AnnotationEntry]:
    """Each description with the interval on which its annotators agree."""
    for where, record in read_objects(file):
        name, text = _video(record, where), text_of(record, "description", where)
        times = record.get("times")
        if not isinstance(times, list) or not times or not all(map(_is_interval, times)):
            raise InputError(f"{where}: 'times' is {quoted(times)}; it must be a list of first and last segments")
        start, end = agreed_interval([tuple(time) for time in times])
        identity = f"{name}:{name_of(record, 'annotation_id', where)}"
        yield AnnotationEntry(identity, name, split, (text,), start=start, end=end)


def agreed_interval(times: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Start and end, in seconds, of the annotators' interval that agrees best with all of theirs.

    Agreement is the sum of intersection over union; among equals, the earliest interval is taken, then the shortest. An
    interval that most annotators chose always wins.

    Args:
      times: the first and the last segment of 5 s that each annotator marked.
    """
    first, last = min(times, key=lambda time: (-sum(_overlap(time, other) for other in times), time))
    return SEGMENT * first, SEGMENT * (last + 1)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> int:
    """Intersection over union in units of 1 / `_PARTS`: integers, so that sums do not depend on their order."""
    shared = min(one[1], other[1]) - max(one[0], other[0]) + 1
    return max(shared, 0) * _PARTS // (max(one[1], other[1]) - min(one[0], other[0]) + 1)


def _video(record: dict[str, Any], where: str) -> str:
    # Without extensions, there are as many videos as were published.
    return without_extension(text_of(record, "video", where))


def _is_interval(time: Any) -> bool:
    return isinstance(time, list) and [type(part) for part in time] == [int, int] and 0 <= time[0] <= time[1]


_FILES = {"train": "train_data.json", "validation": "val_data.json", "test": "test_data.json"}
_COUNTS = {
    "train": {"videos": 8395, "rows": 33_005},
    "validation": {"videos": 1065, "rows": 4_180},
    "test": {"videos": 1004, "rows": 4_021},
}

DIDEMO = OfficialDataset(
    name="didemo",
    description=__doc__,
    license="videos: Creative Commons, each its own",
    homepage="https://github.com/LisaAnne/LocalizingMoments",
    protocols=(
        Protocol(
            "paragraphs",
            "Paragraph-to-video retrieval: a video's descriptions are one text.",
            _FILES,
            read_paragraphs,
            _COUNTS,
        ),
        Protocol("moments", "Each description with its interval.", _FILES, read_moments, _COUNTS),
    ),
)
