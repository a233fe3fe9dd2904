"""Batches are made in pieces: each of some clips in a row, so that all workers take part in a batch, within a bound."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

Batch = dict[str, Any]


class Pieces(grain.MapDataset):
    """Every batch of some clips, piece by piece. The last piece of a batch may have fewer clips.

    Args:
      clips: the elements, each a dictionary.
      batch: clips of a batch.
      piece: clips of a piece, at most.
      first, every: the batches: this one, and each so many later.
    """

    def __init__(self, clips: grain.MapDataset, batch: int, piece: int, first: int = 0, every: int = 1) -> None:
        super().__init__(clips)
        self._batch, self._piece, self._first, self._every = batch, piece, first, every
        self.of_batch = -(-batch // piece)  # pieces

    def __len__(self) -> int:
        clips = len(self._parent)
        batches = range(self._first, -(-clips // self._batch), self._every)
        if not batches or (batches[-1] + 1) * self._batch <= clips:
            return len(batches) * self.of_batch
        rest = clips - batches[-1] * self._batch
        return (len(batches) - 1) * self.of_batch - (-rest // self._piece)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, place = divmod(index, self.of_batch)
        begin = (self._first + batch * self._every) * self._batch
        start = begin + place * self._piece
        stop = min(start + self._piece, begin + self._batch, len(self._parent))
        return stack([self._parent[clip] for clip in range(start, stop)])


def stack(elements: Sequence[Mapping[str, Any]]) -> Batch:
    """Elements to a batch: arrays are stacked, lists (of failures, of ids) are joined."""
    lists = [key for key in elements[0] if isinstance(elements[0][key], list)]
    batch = {key: np.stack([e[key] for e in elements]) for key in elements[0] if key not in lists}
    return batch | {key: [each for e in elements for each in e[key]] for key in lists}


def join(pieces: Iterator[Batch], size: int, check: Callable[[], None] = lambda: None) -> Batch:
    """Takes the pieces of a batch, and copies each as it comes, so that no more than one of them is held.

    Args:
      size: clips of the batch. Where the pieces end before, as in the last batch of an evaluation, it is filled up with
        clips that are not `valid`.
      check: called before each piece is taken; what it raises is raised.

    Raises:
      StopIteration: there is no piece.
    """
    batch: Batch = {}
    done = 0
    while done < size:
        check()
        try:
            piece = next(pieces)
        except StopIteration:
            if not done:
                raise
            _pad(batch, done)
            return batch
        done += _append(batch, piece, done, size)
        del piece  # before the next is waited for: it may lie in shared memory
    return batch


def _append(batch: Batch, piece: Batch, done: int, size: int) -> int:
    """Copies a piece to its place in a batch; how many clips it has."""
    count = next(len(value) for value in piece.values() if not isinstance(value, list))
    for key, value in piece.items():
        if isinstance(value, list):
            batch.setdefault(key, []).extend(value)
            continue
        if key not in batch:
            batch[key] = np.empty((size, *value.shape[1:]), value.dtype)
        batch[key][done : done + count] = value
    return count


def _pad(batch: Batch, done: int) -> None:
    for value in batch.values():
        if not isinstance(value, list):
            value[done:] = value[done - 1]
    batch["valid"][done:], batch["index"][done:] = False, -1
