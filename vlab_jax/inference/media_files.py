"""The files that a name stands for: itself, or the videos and images in a folder and the folders in it."""

import os
import pathlib
from collections.abc import Iterator

from vlab_jax.data.builders.media import IMAGES, VIDEOS
from vlab_jax.errors import InputError

EXTENSIONS = frozenset(f".{extension}" for extension in f"{VIDEOS}|{IMAGES}".split("|"))


def media_files(name: str) -> list[str]:
    """The file, or a folder's media files, in the order of their paths; hidden files and folders are passed by.

    Raises:
      InputError: it is a folder without any, or one that cannot be read.
    """
    if not os.path.isdir(name):
        return [name]
    found = list(_walk(name))
    if not found:
        raise InputError(f"{name} holds no video and no image (known by names such as clip.mp4)")
    return found


def readable(name: str) -> str:
    """A name as any terminal takes it, also one that is not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _walk(folder: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error

    for where, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and pathlib.PurePath(name).suffix.lower() in EXTENSIONS:
                yield os.path.join(where, name)
