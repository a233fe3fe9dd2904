"""The one schema of all data sets, so that nothing downstream asks which data set it reads."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


@dataclasses.dataclass(frozen=True)
class Question:
    """A question on a clip: with `options`, `answer` is one of them; without, it is open-ended.

    `type` groups questions for reports.
    """

    question: str
    answer: str
    type: str = "open"
    options: tuple[str, ...] = ()


_QUESTION = tuple(field.name for field in dataclasses.fields(Question))


@dataclasses.dataclass(frozen=True)
class ClipRecord:
    """A clip with its texts.

    `media` is the original encoded file (a video, or an image: a one-frame video), or, in the `frames` variant, one
    JPEG per frame in display order; before a clip is stored, it may be the file's path. `start` and `end` are seconds
    within the original media; `end` is `math.inf` where the clip ends with its media.
    """

    id: str
    media: bytes | tuple[bytes, ...] | str
    captions: tuple[str, ...]
    questions: tuple[Question, ...] = ()
    start: float = 0.0
    end: float = math.inf


def features(variant: str = "file") -> tfds.features.FeaturesDict:
    """The TFDS features of a data set; `variant` is `file` (encoded files) or `frames` (lists of JPEGs).

    `options` is a JSON list in one string, because TFDS without TensorFlow cannot write a list of lists of strings.
    """
    encoded = tfds.features.Tensor(shape=(), dtype=np.object_)
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "media": encoded if variant == "file" else tfds.features.Sequence(encoded),
            "start": np.float32,
            "end": np.float32,
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "questions": tfds.features.Sequence({column: tfds.features.Text() for column in _QUESTION}),
        }
    )


def to_example(clip: ClipRecord) -> dict[str, Any]:
    """The clip as the dictionary that a TFDS builder yields; its media are bytes, not a path."""
    return {
        "id": clip.id,
        "media": clip.media if isinstance(clip.media, bytes) else list(clip.media),
        "start": clip.start,
        "end": clip.end,
        "captions": list(clip.captions),
        "questions": [{**dataclasses.asdict(q), "options": json.dumps(list(q.options))} for q in clip.questions],
    }


def from_example(example: Mapping[str, Any]) -> ClipRecord:
    """The clip of a dictionary that a `tfds.data_source` of this schema yields."""
    columns = [example["questions"][column] for column in _QUESTION]
    media = example["media"]
    return ClipRecord(
        id=example["id"].decode(),
        media=media if isinstance(media, bytes) else tuple(media),
        captions=tuple(caption.decode() for caption in example["captions"]),
        questions=tuple(
            Question(question.decode(), answer.decode(), kind.decode(), tuple(json.loads(options)))
            for question, answer, kind, options in zip(*columns, strict=True)
        ),
        start=float(example["start"]),
        end=float(example["end"]),
    )
