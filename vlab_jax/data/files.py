"""Whole files, on a disk or, where their path has `://` in it, in a store that Apache Beam knows (gs, s3, hdfs)."""

import errno
import os
import pathlib
import shutil
import uuid
from typing import Any


def read_file(path: str, most: int | None = None) -> bytes:
    """What the file holds. Raises `OSError`, also where it is more than `most` bytes."""
    with _file_systems().open(path) if _is_remote(path) else open(path, "rb") as file:
        if most is None:
            return file.read()
        size = 0 if _is_remote(path) else os.fstat(file.fileno()).st_size
        content = file.read(most + 1) if size <= most else b""
    if max(size, len(content)) > most:
        raise OSError(errno.EFBIG, f"is larger than {most:,} bytes, which data.limits.max_bytes allows", path)
    return content


def exists(path: str) -> bool:
    """Whether there is such a file."""
    return _file_systems().exists(path) if _is_remote(path) else os.path.exists(path)


def put_file(local: pathlib.Path, path: str) -> None:
    """Copies a local file to `path`, where it appears when it is complete. Raises `OSError`."""
    if _is_remote(path):
        with local.open("rb") as source, _file_systems().create(path) as target:
            shutil.copyfileobj(source, target, 1 << 20)
        return
    beside = f"{path}.{uuid.uuid4().hex}.part"  # two machines may write the same
    shutil.copyfile(local, beside)
    os.replace(beside, path)


def _is_remote(path: str) -> bool:
    return "://" in path


def _file_systems() -> Any:
    from apache_beam.io.filesystems import FileSystems  # an optional package, which such paths come from

    return FileSystems
