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
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vlab_jax.data.schema import Question
from vlab_jax.errors import InputError

# The types by which MSRVTT-QA and MSVD-QA are reported (Xu et al., ACM Multimedia 2017).
QUESTION_WORDS = ("what", "who", "how", "when", "where")
# In the order of TGIF-QA's column `type`, 0 to 3.
FRAMEQA_TYPES = ("object", "number", "color", "location")
# Tasks of TGIF-QA (Jang et al., CVPR 2017), and how the `vid_id` of their questions begins.
TGIF_TASKS = {"frameqa": "FRAMEQA", "count": "COUNT", "action": "ACTION", "transition": "TRANS"}
_OPTIONS = ("a1", "a2", "a3", "a4", "a5")

_Path = str | os.PathLike[str]


def read_qa_json(path: _Path) -> list[tuple[str, Question]]:
    """MSRVTT-QA and MSVD-QA as published: a JSON list of objects with `video_id`, `question` and `answer`.

    The type of a question is its first word, if one of `QUESTION_WORDS`, else `other`.

    Raises:
        InputError: the file is missing, is not such a list, or has no question.
    """
    records = _json(path)
    if not isinstance(records, list):
        raise InputError(f"{path} is JSON but no list; it must be a list of objects with video_id, question and answer")
    return _not_empty([_json_question(record, f"{path} question {i}") for i, record in enumerate(records, 1)], path)


def read_answer_list(path: _Path) -> tuple[str, ...]:
    """A closed list of answers: a JSON list of texts, as published beside MSRVTT-QA.

    Raises:
        InputError: the file is missing, or is not such a list.
    """
    answers = _json(path)
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise InputError(f"{path} must be a JSON list of answers, each a text that is not empty")
    return tuple(answer.strip() for answer in answers)


def _json(path: _Path) -> Any:
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, content.count(b"\n", 0, error.start) + 1) from error
    except json.JSONDecodeError as error:
        where = f"{path} line {error.lineno}"
        raise InputError(f"{where}: is not JSON ({error.msg} at column {error.colno}); get the file anew") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON that can be read ({error}); get the file anew") from error


def _json_question(record: Any, where: str) -> tuple[str, Question]:
    if not isinstance(record, dict):
        raise InputError(f"{where}: is no object; it must have video_id, question and answer")
    # A bool is an int to Python.
    video = record.get("video_id")
    texts = {**record, "video_id": str(video)} if type(video) is int else record
    return _open_question(texts, "video_id", where)


def read_qa_csv(path: _Path) -> list[tuple[str, Question]]:
    """MSVD-QA and MSRVTT-QA as HQGA has them: a comma-separated table with `video`, `question` and `answer`.

    Other columns are passed over. Types as in `read_qa_json`; HQGA's column `type` holds MSR-VTT's category.

    Raises:
        InputError: the file is missing, a column is, a line has more or fewer fields than the header, or there is
            no question.
    """
    rows = _table(path, ("video", "question", "answer"), delimiter=",", strict=True)
    return _not_empty([_open_question(row, "video", where) for where, row in rows], path)


def read_tgif_qa(path: _Path, task: str) -> list[tuple[str, Question]]:
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
    rows = _table(path, ("gif_name", "question", *columns, "answer", "vid_id"), delimiter="\t", quoting=csv.QUOTE_NONE)
    return _not_empty([_tgif_question(row, task, where) for where, row in rows], path)


def _tgif_question(row: Mapping[str, str], task: str, where: str) -> tuple[str, Question]:
    if not row["vid_id"].startswith(TGIF_TASKS[task]):
        raise InputError(
            f"{where}: vid_id {row['vid_id']!r} is of another task than {task!r}; give the file of {task!r}"
        )
    video, question, answer = (_text(row, column, where) for column in ("gif_name", "question", "answer"))
    if task == "frameqa":
        return video, Question(question, answer, FRAMEQA_TYPES[_index(row, "type", FRAMEQA_TYPES, where)])
    if task == "count":
        if not re.fullmatch(r"[0-9]+", answer):
            raise InputError(f"{where}: the answer {answer!r} is no count; it must be a number in digits")
        return video, Question(question, answer, task)
    options = tuple(_text(row, column, where) for column in _OPTIONS)
    return video, Question(question, options[_index(row, "answer", options, where)], task, options)


def _open_question(row: Mapping[str, Any], video_column: str, where: str) -> tuple[str, Question]:
    video, question, answer = (_text(row, column, where) for column in (video_column, "question", "answer"))
    first = re.match(r"[a-z]*", question.lower()).group()
    return video, Question(question, answer, first if first in QUESTION_WORDS else "other")


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        found = "is missing" if value is None else f"is {value!r}"
        raise InputError(f"{where}: {column!r} {found}; it must be a text that is not empty")
    return value.strip()


def _index(row: Mapping[str, str], column: str, choices: tuple[str, ...], where: str) -> int:
    value = row[column].strip()
    if value not in map(str, range(len(choices))):
        raise InputError(f"{where}: {column!r} is {value!r}; it must be a number from 0 to {len(choices) - 1}")
    return int(value)


def _table(path: _Path, columns: tuple[str, ...], **dialect: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """Where each row stands, and its fields by column; line by line."""
    reader = csv.reader(_lines(path), **dialect)
    header: list[str] = []
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{path} line {reader.line_num}: is no row of a table ({error}); mend the line") from error
        where = f"{path} line {reader.line_num}"
        if fields is None:
            return
        if not fields:
            continue
        if not header:
            header = _checked_header(fields, columns, where)
        elif len(fields) != len(header):
            raise InputError(f"{where}: has {len(fields)} columns, and the header {len(header)}; mend the line")
        else:
            yield where, dict(zip(header, fields, strict=True))


def _checked_header(fields: list[str], columns: tuple[str, ...], where: str) -> list[str]:
    header = [field.strip() for field in fields]
    missing = [column for column in columns if column not in header]
    if missing:
        raise InputError(f"{where}: the header lacks {', '.join(missing)}; it must have {', '.join(columns)}")
    if len(set(header)) < len(header):
        raise InputError(f"{where}: the header names a column twice; each must have its own name")
    return header


def _lines(path: _Path) -> Iterator[str]:
    # Lines are decoded one by one, so that an error knows its line.
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise _not_utf8(path, number) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: _Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be read ({error.strerror}); give the path of an official question file")


def _not_utf8(path: _Path, line: int) -> InputError:
    return InputError(f"{path} line {line}: is not UTF-8; save the file in that encoding")


def _not_empty(questions: list[tuple[str, Question]], path: _Path) -> list[tuple[str, Question]]:
    if not questions:
        raise InputError(f"{path} line 1: the file has no question; get it anew")
    return questions
