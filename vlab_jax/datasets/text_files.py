"""Annotation files as text: JSON, tables and lists, plain or in a zip archive, with errors that name file and line.

Everything but JSON is read line by line, so memory does not grow with the file.
"""

import contextlib
import csv
import dataclasses
import json
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

from vlab_jax.errors import InputError

# Texts shrink in an archive by a factor of 3 to 30, and of 1,032 at most.
_MAX_COMPRESSION, _HARMLESS_BYTES = 200, 100 * 2**20
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file, or the member of a zip archive, that was found in the folder `top` of a data set."""

    path: pathlib.Path
    member: str = ""
    top: pathlib.Path = dataclasses.field(default=pathlib.Path(), compare=False)

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    @property
    def name(self) -> str:
        """The name without folders."""
        return pathlib.PurePosixPath(self.member or self.path.as_posix()).name

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Opens the file. Raises `InputError` if it cannot be read, also while it is being read."""
        try:
            if not self.member:
                with open(self.path, "rb") as file:
                    yield file
                return
            with zipfile.ZipFile(self.path) as archive:
                member = archive.getinfo(self.member)
                if member.file_size > max(_MAX_COMPRESSION * member.compress_size, _HARMLESS_BYTES):
                    raise InputError(
                        f"{self} is said to unpack from {member.compress_size:,} to {member.file_size:,} bytes, more "
                        "than any text does; get the archive anew"
                    )
                with archive.open(member) as file:
                    yield file
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(
                f"{self} cannot be read ({reason}); give the path of an official annotation file"
            ) from error
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
            # RuntimeError: the archive is encrypted, or compressed by a method that Python does not have.
            raise InputError(f"{self} cannot be read ({' '.join(str(error).split())}); get the archive anew") from error


def read_json(file: TextFile) -> Any:
    """The value of a JSON file.

    Raises:
      InputError: it cannot be read, is not JSON in UTF-8, or holds NaN, infinities or halves of surrogate pairs.
    """
    content = "".join(read_lines(file))
    try:
        value = json.loads(content, parse_constant=refuse_constant)
        if _SURROGATE_ESCAPE.search(content):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise InputError(f"{file} holds {half}, half of a surrogate pair, which is no text; mend it") from error
    except json.JSONDecodeError as error:
        where = f"{file} line {error.lineno}"
        raise InputError(f"{where}: is not JSON ({error.msg} at column {error.colno}); get the file anew") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON that can be read ({error}); get the file anew") from error


def refuse_constant(name: str) -> None:
    """For `json.loads`: raises `ValueError` for NaN and infinities, which JSON does not have."""
    raise ValueError(f"{name} is no number")


def read_objects(file: TextFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of a JSON file, as `objects_of` yields them. Raises `InputError`, as `read_json` does, too."""
    return objects_of(read_json(file), str(file), "entry")


def objects_of(values: Any, file: str, noun: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of a list, each after its place as messages name it, as in `train.json entry 7`.

    Raises:
      InputError: it is no list, an empty one, or something in it is no object.
    """
    if not isinstance(values, list):
        raise InputError(f"{file} is JSON but no list; it must be a list of objects")
    if not values:
        raise InputError(f"{file} is a list without any {noun}; get the file anew")
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise InputError(f"{file} {noun} {number}: is no object; get the file anew")
        yield f"{file} {noun} {number}", value


def read_answer_list(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """A closed list of answers: a JSON list of texts, as published with MSRVTT-QA.

    Raises:
      InputError: the file is missing, or is not such a list.
    """
    answers = read_json(TextFile(pathlib.Path(path)))
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise InputError(f"{path} must be a JSON list of answers, each a text that is not empty")
    return tuple(answer.strip() for answer in answers)


def read_lines(file: TextFile) -> Iterator[str]:
    """Yields the lines of a file, with their ends.

    Raises:
      InputError: it cannot be read, or a line is not UTF-8.
    """
    # Each line is decoded by itself, so that an error can name it.
    with file.open() as opened:
        for number, line in enumerate(opened, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{file} line {number}: is not UTF-8; save the file in that encoding") from error


def read_list(file: TextFile) -> Iterator[str]:
    """Yields the lines that are not empty, stripped. Raises `InputError` as `read_lines`."""
    return filter(None, map(str.strip, read_lines(file)))


def read_table(file: TextFile, columns: tuple[str, ...], **dialect: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the rows of a table as fields by column, each after its place as messages name it.

    Args:
      columns: the columns that the header must have, among others.
      dialect: options of `csv.reader`.

    Raises:
      InputError: as `read_lines`; the header lacks a column or names one twice; a row has more or fewer fields; there
        is no row.
    """
    reader = csv.reader(read_lines(file), **dialect)
    header: list[str] = []
    rows = 0
    try:
        for fields in filter(None, reader):
            where = f"{file} line {reader.line_num}"
            if not header:
                header = [field.strip() for field in fields]
                missing = [column for column in columns if column not in header]
                if missing:
                    must = ", ".join(columns)
                    raise InputError(f"{where}: the header lacks {', '.join(missing)}; it must have {must}")
                if len(set(header)) < len(header):
                    raise InputError(f"{where}: the header names a column twice; each must have its own name")
            elif len(fields) != len(header):
                raise InputError(f"{where}: has {len(fields)} columns, and the header {len(header)}; mend the line")
            else:
                rows += 1
                yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise InputError(f"{file} line {reader.line_num}: is no row of a table ({error}); mend the line") from error
    if not rows:
        raise InputError(f"{file} line 1: the table has no row; get the file anew")


def quoted(value: Any) -> str:
    """A value as messages show it: on one line, and cut short."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def text_of(record: dict[str, Any], key: str, where: str) -> str:
    """A text of a record, stripped. Raises `InputError` if it is missing or empty."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        found = "is missing" if value is None else f"is {quoted(value)}"
        raise InputError(f"{where}: {key!r} {found}; it must be a text that is not empty")
    return value.strip()


def name_of(record: dict[str, Any], key: str, where: str) -> str:
    """A text of a record that may be stored as an integer. Raises `InputError` as `text_of`."""
    value = record.get(key)
    return str(value) if type(value) is int else text_of(record, key, where)  # a bool is an int to isinstance


def texts_of(record: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """The texts of a list, stripped; a single text counts as a list of one. Raises `InputError` as `text_of`."""
    value = record.get(key)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values or not all(isinstance(text, str) and text.strip() for text in values):
        raise InputError(f"{where}: {key!r} is {quoted(value)}; it must be a list of texts that are not empty")
    return tuple(text.strip() for text in values)
