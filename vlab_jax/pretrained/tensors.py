"""The tensors of safetensors files: their names and shapes at once, their values when asked for."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import safetensors

from vlab_jax.errors import InputError

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor is, and what its file's header says of it."""

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: F32, BF16


class Tensors(Mapping[str, tuple[int, ...]]):
    """Names and shapes of a checkpoint's tensors, in one file or several.

    Raises:
      InputError: a file is no whole safetensors file, or a tensor is in two files.
    """

    def __init__(self, files: Sequence[pathlib.Path]):
        self._entries: dict[str, Entry] = {}
        for file in files:
            for name, entry in _entries(file):
                if name in self._entries:
                    raise InputError(f"the tensor {name} is in {self._entries[name].file.name} and in {file.name}")
                self._entries[name] = entry

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def __iter__(self):
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, names: Iterable[str]) -> list[np.ndarray]:
        """The values of some tensors, in the types they are stored in.

        Files are opened for each call: what was mapped into memory for the one before is let go of.

        Raises:
          InputError: a tensor is not of a floating-point type, or its file has changed.
        """
        return [self._read(name) for name in names]

    def _read(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        if entry.dtype not in FLOATS:
            raise InputError(f"the tensor {name} in {entry.file} is of type {entry.dtype}; it must be floating point")
        try:
            with safetensors.safe_open(entry.file, "numpy") as file:
                return file.get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{entry.file} has changed while it was read: {error}") from error


def _entries(file: pathlib.Path) -> Iterable[tuple[str, Entry]]:
    try:
        with safetensors.safe_open(file, "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                part = opened.get_slice(name)
                yield name, Entry(file, tuple(part.get_shape()), part.get_dtype())
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise InputError(f"{file} is not a whole safetensors file ({_reason(file, error)}); fetch it again") from error


def _reason(file: pathlib.Path, error: Exception) -> str:
    with file.open("rb") as opened:
        if opened.read(24).startswith(b"version https://git-lfs"):
            return "it is the pointer that Git LFS leaves in its place"
    return str(error).rpartition(": ")[2]


def read_json(file: pathlib.Path) -> dict:
    """The object in a JSON file.

    Raises:
      InputError: it cannot be read, or is no object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} holds a {type(value).__name__}; it must be a JSON object")
    return value
