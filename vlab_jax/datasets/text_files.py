"""Annotation files as text: JSON, tables and lists, plain or inside a zip archive, with errors that name file and line.

Everything but JSON is read line by line, so that memory does not grow with the file.
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


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file, or the member of that name of a zip archive."""

    path: pathlib.Path
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    @property
    def name(self) -> str:
        """The name without folders."""
        return pathlib.PurePosixPath(self.member or self.path.as_posix()).name

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The file's bytes.

        Raises:
          InputError: there is no such file, or the archive is damaged; while it is read, too.
        """
        try:
            if not self.member:
                with open(self.path, "rb") as file:
                    yield file
                return
            with zipfile.ZipFile(self.path) as archive:
                self._refuse_bomb(archive.getinfo(self.member))
                with archive.open(self.member) as file:
                    yield file
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(
                f"{self} cannot be read ({reason}); give the path of an official annotation file"
            ) from error
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
            # RuntimeError: the archive is encrypted, or compressed in a way that Python cannot undo.
            raise InputError(f"{self} cannot be read ({' '.join(str(error).split())}); get the archive anew") from error

    def _refuse_bomb(self, member: zipfile.ZipInfo) -> None:
        if member.file_size > max(_MOST_PACKED * member.compress_size, _HARMLESS):
            raise InputError(
                f"{self} is said to unpack from {member.compress_size:,} to {member.file_size:,} bytes, more than any "
                "text does; get the archive anew"
            )


# Texts become 3 to 30 times smaller in an archive, and at most 1,032 times.
_MOST_PACKED, _HARMLESS = 200, 100 * 2**20
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
AnyFile = TextFile | str | os.PathLike[str]


def as_text_file(file: AnyFile) -> TextFile:
    """A path as a file to read."""
    return file if isinstance(file, TextFile) else TextFile(pathlib.Path(file))


def read_json(file: AnyFile) -> Any:
    """The value of a JSON file.

    Raises:
      InputError: it cannot be read, or is not JSON in UTF-8; numbers must be numbers, and texts such as can be written.
    """
    file = as_text_file(file)
    with file.open() as opened:
        content = opened.read()
    try:
        value = json.loads(content.decode("utf-8-sig"), parse_constant=refuse_constant)
        if _SURROGATE_ESCAPE.search(content):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        place = content.lower().find(half.encode())
        raise InputError(
            f"{file} line {content.count(10, 0, place) + 1}: holds {half}, half of a surrogate pair, which is no text"
        ) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(file, content.count(b"\n", 0, error.start) + 1) from error
    except json.JSONDecodeError as error:
        where = f"{file} line {error.lineno}"
        raise InputError(f"{where}: is not JSON ({error.msg} at column {error.colno}); get the file anew") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON that can be read ({error}); get the file anew") from error


def refuse_constant(name: str) -> None:
    """For `json.loads`: NaN and infinities, which JSON does not have, raise ValueError."""
    raise ValueError(f"{name} is no number")


def read_json_list(file: AnyFile, keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each object of a JSON list stands, and the object; each has the `keys`.

    Raises:
      InputError: as `read_json`; it is no list of such objects, or an empty one.
    """
    records = read_json(file)
    must_be = f"a list of objects with {', '.join(keys)}"
    if not isinstance(records, list):
        raise InputError(f"{file} is JSON but no list; it must be {must_be}")
    if not records:
        raise InputError(f"{file} is an empty list; it must be {must_be}; get the file anew")
    for number, record in enumerate(records, start=1):
        lacks = not isinstance(record, dict) or [key for key in keys if key not in record]
        if lacks:
            what = "is no object" if lacks is True else f"lacks {', '.join(lacks)}"
            raise InputError(f"{file} entry {number}: {what}; the file must be {must_be}")
        yield f"{file} entry {number}", record


def read_lines(file: AnyFile) -> Iterator[str]:
    """The lines of a file, with their ends.

    Raises:
      InputError: it cannot be read, or a line is not UTF-8.
    """
    file = as_text_file(file)
    # Lines are decoded one by one, so that an error knows its line.
    with file.open() as opened:
        for number, line in enumerate(opened, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(file, number) from error


def read_list(file: AnyFile) -> Iterator[str]:
    """The lines of a file that are not empty, without surrounding space. Raises InputError as `read_lines`."""
    return filter(None, (line.strip() for line in read_lines(file)))


def read_table(file: AnyFile, columns: tuple[str, ...], **dialect: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """Where each row of a table stands, and its fields by column.

    Args:
      columns: those that the header must have; others may stand beside them.
      dialect: how `csv.reader` reads it.

    Raises:
      InputError: as `read_lines`; the header lacks a column or names one twice, or a row has more or fewer fields.
    """
    reader = csv.reader(read_lines(file), **dialect)
    header: list[str] = []
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{file} line {reader.line_num}: is no row of a table ({error}); mend the line") from error
        where = f"{file} line {reader.line_num}"
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


def quoted(value: Any, most: int = 60) -> str:
    """A value as messages show it: on one line, and not longer than a line."""
    shown = repr(value)
    return shown if len(shown) <= most else f"{shown[:most]}..."


def text_of(record: Any, key: str, where: str) -> str:
    """A text of a record, without surrounding space. Raises InputError where it is missing or empty."""
    value = _value(record, key, where)
    if not isinstance(value, str) or not value.strip():
        found = "is missing" if value is None else f"is {quoted(value)}"
        raise InputError(f"{where}: {key!r} {found}; it must be a text that is not empty")
    return value.strip()


def texts_of(record: Any, key: str, where: str) -> tuple[str, ...]:
    """The texts of a list, without surrounding space; one text is a list of one. Raises InputError as `text_of`."""
    value = _value(record, key, where)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values or not all(isinstance(text, str) and text.strip() for text in values):
        raise InputError(f"{where}: {key!r} is {quoted(value)}; it must be a list of texts that are not empty")
    return tuple(text.strip() for text in values)


def _value(record: Any, key: str, where: str) -> Any:
    if not isinstance(record, dict):
        raise InputError(f"{where}: is no object; it must have {key!r}")
    return record.get(key)


def _not_utf8(file: TextFile, line: int) -> InputError:
    return InputError(f"{file} line {line}: is not UTF-8; save the file in that encoding")
