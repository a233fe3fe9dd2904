"""Readers of the official question files of video QA; each yields (video id, question) in the file's order.

Video ids are the file's own, as text. They name media thus:

- MSRVTT-QA: the number in MSR-VTT's `video7010`.
- MSVD-QA: the 1-based place among MSVD's 1970 videos in the order of its caption splits: 1200 train, 100 validation,
  670 test. The splits of MSVD-QA are others: its validation is 1201 to 1450, its test 1451 to 1970.
- TGIF-QA: the name of the GIF, without `.gif`.

Texts lose surrounding space. The first thing that is wrong is an InputError of one line, with the line's number; in
JSON, which has its questions on one line, with the question's place. A file without any question is cut short, and is
refused too.
"""

import csv
import re
from collections.abc import Iterable, Mapping
from typing import Any

from vlab_jax.data.schema import Question
from vlab_jax.data.text_files import AnyFile, quoted, read_json, read_table, text_of
from vlab_jax.errors import InputError

# The types by which MSRVTT-QA and MSVD-QA are reported (Xu et al., ACM Multimedia 2017).
QUESTION_WORDS = ("what", "who", "how", "when", "where")
# In the order of TGIF-QA's column `type`, 0 to 3.
FRAMEQA_TYPES = ("object", "number", "color", "location")
# Tasks of TGIF-QA (Jang et al., CVPR 2017), and how the `vid_id` of their questions begins.
TGIF_TASKS = {"frameqa": "FRAMEQA", "count": "COUNT", "action": "ACTION", "transition": "TRANS"}
_OPTIONS = ("a1", "a2", "a3", "a4", "a5")


def read_qa_json(path: AnyFile) -> list[tuple[str, Question]]:
    """MSRVTT-QA and MSVD-QA as published: a JSON list of objects with `video_id`, `question` and `answer`.

    The type of a question is its first word, if one of `QUESTION_WORDS`, else `other`.

    Raises:
        InputError: the file is missing, is not such a list, or has no question.
    """
    records = read_json(path)
    if not isinstance(records, list):
        raise InputError(f"{path} is JSON but no list; it must be a list of objects with video_id, question and answer")
    return _not_empty([_json_question(record, f"{path} question {i}") for i, record in enumerate(records, 1)], path)


def read_answer_list(path: AnyFile) -> tuple[str, ...]:
    """A closed list of answers: a JSON list of texts, as published beside MSRVTT-QA.

    Raises:
        InputError: the file is missing, or is not such a list.
    """
    answers = read_json(path)
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise InputError(f"{path} must be a JSON list of answers, each a text that is not empty")
    return tuple(answer.strip() for answer in answers)


def _json_question(record: Any, where: str) -> tuple[str, Question]:
    if not isinstance(record, dict):
        raise InputError(f"{where}: is no object; it must have video_id, question and answer")
    # A bool is an int to Python.
    video = record.get("video_id")
    texts = {**record, "video_id": str(video)} if type(video) is int else record
    return _open_question(texts, "video_id", where)


def read_qa_csv(path: AnyFile) -> list[tuple[str, Question]]:
    """MSVD-QA and MSRVTT-QA as HQGA has them: a comma-separated table with `video`, `question` and `answer`.

    Other columns are passed over. Types as in `read_qa_json`; HQGA's column `type` holds MSR-VTT's category.

    Raises:
        InputError: the file is missing, a column is, a line has more or fewer fields than the header, or there is
            no question.
    """
    rows = read_table(path, ("video", "question", "answer"), delimiter=",", strict=True)
    return _not_empty([_open_question(row, "video", where) for where, row in rows], path)


def read_tgif_qa(path: AnyFile, task: str) -> list[tuple[str, Question]]:
    """TGIF-QA as published: a tab-separated table, despite its name `Test_action_question.csv`.

    The answer of `frameqa` is open-ended, and the type of a question is one of `FRAMEQA_TYPES`. For the others the
    type is the task: the answer of `count` is a number in digits; those of `action` and `transition` are one of five
    options.

    Args:
        path: the file.
        task: one of `TGIF_TASKS`, and that of the file.

    Raises:
        InputError: as `read_qa_csv`; no such task, or a question of another task.
    """
    if task not in TGIF_TASKS:
        raise InputError(f"TGIF-QA has no task {task!r}; its tasks: {', '.join(TGIF_TASKS)}")
    columns = {"frameqa": ("type",), "count": ()}.get(task, _OPTIONS)
    # Nothing in these files is quoted: a quotation mark is part of a text.
    rows = read_table(
        path, ("gif_name", "question", *columns, "answer", "vid_id"), delimiter="\t", quoting=csv.QUOTE_NONE
    )
    return _not_empty([_tgif_question(row, task, where) for where, row in rows], path)


def by_video(questions: Iterable[tuple[str, Question]]) -> dict[str, tuple[Question, ...]]:
    """The questions of each video, videos in the order of their first question."""
    grouped: dict[str, list[Question]] = {}
    for video, question in questions:
        grouped.setdefault(video, []).append(question)
    return {video: tuple(asked) for video, asked in grouped.items()}


def _tgif_question(row: Mapping[str, str], task: str, where: str) -> tuple[str, Question]:
    if not row["vid_id"].startswith(TGIF_TASKS[task]):
        raise InputError(
            f"{where}: vid_id {quoted(row['vid_id'])} is of another task than {task!r}; give the file of {task!r}"
        )
    video, question, answer = (text_of(row, column, where) for column in ("gif_name", "question", "answer"))
    if task == "frameqa":
        return video, Question(question, answer, FRAMEQA_TYPES[_index(row, "type", FRAMEQA_TYPES, where)])
    if task == "count":
        if not re.fullmatch(r"[0-9]+", answer):
            raise InputError(f"{where}: the answer {quoted(answer)} is no count; it must be a number in digits")
        return video, Question(question, answer, task)
    options = tuple(text_of(row, column, where) for column in _OPTIONS)
    return video, Question(question, options[_index(row, "answer", options, where)], task, options)


def _open_question(row: Mapping[str, Any], video_column: str, where: str) -> tuple[str, Question]:
    video, question, answer = (text_of(row, column, where) for column in (video_column, "question", "answer"))
    first = re.match(r"[a-z]*", question.lower()).group()
    return video, Question(question, answer, first if first in QUESTION_WORDS else "other")


def _index(row: Mapping[str, str], column: str, choices: tuple[str, ...], where: str) -> int:
    value = row[column].strip()
    if value not in map(str, range(len(choices))):
        raise InputError(f"{where}: {column!r} is {quoted(value)}; it must be a number from 0 to {len(choices) - 1}")
    return int(value)


def _not_empty(questions: list[tuple[str, Question]], path: AnyFile) -> list[tuple[str, Question]]:
    if not questions:
        raise InputError(f"{path} line 1: the file has no question; get it anew")
    return questions
