"""A mixture of data sets: how it is spelled, and which of its clips are the same clip."""

import hashlib
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from vlab_jax.errors import InputError


def parse_mixture(entries: Sequence[str]) -> list[tuple[str, float]]:
    """Data sets with their weights: `('motion@0.7', 'folder:/a/directory')`; the weight is 1 where none is given.

    A number behind the last '@' is a weight, unless it ends the name of a directory that is there: so
    `folder:/videos@2024` is that directory, and `folder:/videos@2024@0.5` gives it a weight.

    Raises:
      InputError: there is no entry, or a weight is not positive and finite.
    """
    if not entries:
        raise InputError("no data set to train on; name one, as in data.train=('motion',)")
    mixture = []
    for entry in entries:
        spec, at, weight = entry.rpartition("@")
        try:
            pair = (spec, float(weight)) if at and not _is_folder(entry) else (entry, 1.0)
        except ValueError:
            pair = (entry, 1.0)  # an '@' within a path
        if not 0 < pair[1] < math.inf:
            raise InputError(f"the weight of data set {entry!r} must be positive and finite")
        mixture.append(pair)
    return mixture


def _is_folder(spec: str) -> bool:
    """Whether the spec of a data set is `folder:` with a directory that is there."""
    kind, _, path = spec.partition(":")
    return kind == "folder" and pathlib.Path(path).expanduser().is_dir()


def dataset_names(specs: Sequence[str]) -> tuple[str, ...]:
    """The data set that each spec is of: configurations of one (`msrvtt/captioning`) are on the same clips, two
    directories are not."""
    return tuple(spec if spec.startswith("folder:") else spec.partition("/")[0] for spec in specs)


def identity(name: str, dataset: str = "") -> np.int32:
    """A clip as a number that is the same in every process: its id, in a data set.

    Args:
      dataset: empty for the first data set of a mixture, and for the only one.
    """
    known = f"{dataset}\0{name}" if dataset else name
    digest = hashlib.blake2b(known.encode(), digest_size=4).digest()
    return np.int32(int.from_bytes(digest, "little", signed=True))
