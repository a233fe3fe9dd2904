"""MSRVTT-QA and MSVD-QA: questions made by rule from the captions of MSR-VTT and MSVD.

Xu et al., *Video Question Answering via Gradually Refined Attention over Appearance and Motion*, ACM Multimedia 2017.
MSRVTT-QA calls a video by the number in MSR-VTT's `video7010`; MSVD-QA by its place, from 1, among MSVD's 1970 videos.
"""

import dataclasses
import re
from collections.abc import Iterator

from vlab_jax.data.schema import Question
from vlab_jax.datasets.annotations import AnnotationEntry, Protocol, question_entries
from vlab_jax.datasets.msvd import clip_names
from vlab_jax.datasets.official import OfficialDataset
from vlab_jax.datasets.text_files import TextFile, name_of, read_objects, read_table, text_of

# The types by which the authors report; all other questions are of type `other`.
QUESTION_WORDS = ("what", "who", "how", "when", "where")
_FILES = {"train": "train_qa.json|train.csv", "validation": "val_qa.json|val.csv", "test": "test_qa.json|test.csv"}


def read_xu_qa(file: TextFile) -> Iterator[tuple[str, Question]]:
    """The questions with the file's names of their videos, in the file's order; texts are stripped.

    The type of a question is its first word, if one of `QUESTION_WORDS`, else `other`.

    Args:
      file: one of the authors', a JSON list of objects with `video_id`, `question` and `answer`; or of HQGA's, a
        comma-separated table with `video`, `question` and `answer` (its `type` is MSR-VTT's category, and ignored).

    Raises:
      InputError: as `read_objects` or `read_table`; a text is missing.
    """
    if file.name.endswith(".json"):
        video, rows = "video_id", read_objects(file)
    else:
        video, rows = "video", read_table(file, ("video", "question", "answer"), strict=True)
    for where, row in rows:
        question, answer = text_of(row, "question", where), text_of(row, "answer", where)
        first = re.match(r"[a-z]*", question.lower()).group()
        yield name_of(row, video, where), Question(question, answer, first if first in QUESTION_WORDS else "other")


def read_msrvtt_qa(split: str, file: TextFile) -> Iterator[AnnotationEntry]:
    """Each clip with all its questions."""
    questions = ((f"video{number.removeprefix('video')}", question) for number, question in read_xu_qa(file))
    return question_entries(split, questions)


def read_msvd_qa(split: str, file: TextFile, *names: TextFile | None) -> Iterator[AnnotationEntry]:
    """Each clip with all its questions; media may be called by number, or by name if one of `names` has the name."""
    name_of_number = {f"vid{number}": name for number, name in clip_names(*names).items()}
    questions = ((f"vid{number.removeprefix('vid')}", question) for number, question in read_xu_qa(file))
    for entry in question_entries(split, questions):
        yield dataclasses.replace(entry, video=name_of_number.get(entry.id, entry.id), aliases=(entry.id,))


MSRVTT_QA = OfficialDataset(
    name="msrvtt_qa",
    description="""MSRVTT-QA: 243,680 questions on MSR-VTT's clips, in its official split.

Xu et al., *Video Question Answering via Gradually Refined Attention over Appearance and Motion*, ACM Multimedia 2017.
The authors' archive holds `train_qa.json`, `val_qa.json` and `test_qa.json` (158,581 / 12,278 / 72,821 questions);
HQGA's `train.csv`, `val.csv` and `test.csv` are read, too. Media are MSR-VTT's, and may be in its folder. The authors
state no licence of the data. The metric is the share of answers that are exactly right.
""",
    media_of="msrvtt",
    license="not stated by the authors",
    homepage="https://github.com/xudejing/video-question-answering",
    protocols=(
        Protocol(
            "questions",
            "All questions of a clip together.",
            _FILES,
            read_msrvtt_qa,
            {
                "train": {"clips": 6513, "questions": 158_581},
                "validation": {"clips": 497, "questions": 12_278},
                "test": {"clips": 2990, "questions": 72_821},
            },
        ),
    ),
)

MSVD_QA = OfficialDataset(
    name="msvd_qa",
    description="""MSVD-QA: 50,505 questions on MSVD's clips.

By the authors of MSRVTT-QA, with files of the same names (30,933 / 6,415 / 13,157 questions). Clips are numbered from 1
to 1970 in the order of `youtube_mapping.txt`. The split, 1 to 1200, 1201 to 1450 and 1451 to 1970, is not MSVD's own:
its validation has 150 of MSVD's test clips; its test has none of MSVD's training clips. Media may be called by number
(`vid1201.avi`), or by name (`bQJQGoJF7_k_162_169.avi`) if `youtube_mapping.txt`, or MSVD's lists of captions, which
have the same order, are there; they may be in MSVD's folder. No licence is stated. The metric is the share of answers
that are exactly right.
""",
    media_of="msvd",
    license="not stated by the authors",
    homepage="https://github.com/xudejing/video-question-answering",
    protocols=(
        Protocol(
            "questions",
            "All questions of a clip together.",
            _FILES,
            read_msvd_qa,
            {
                "train": {"questions": 30_933},
                "validation": {"clips": 245, "questions": 6_415},
                "test": {"clips": 504, "questions": 13_157},
            },
            optional="youtube_mapping.txt train.json val.json test.json",
        ),
    ),
)
