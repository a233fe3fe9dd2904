"""Batches of few sizes, so that few programs are compiled, and one of them always ahead, so that no device waits."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Shaped

A = TypeVar("A")
B = TypeVar("B")


def bucket(count: int, most: int, divisor: int = 1) -> int:
    """The size that `count` items are padded to: a power of two times `divisor`, or `most` where that is less.

    Args:
      most: the largest batch; at least `count`, and a multiple of `divisor`.
      divisor: what batches must be a multiple of.
    """
    size = divisor
    while size < count:
        size *= 2
    return min(size, most)


def padded(items: Sequence[np.ndarray], size: int) -> Shaped[np.ndarray, "size ..."]:
    """Items stacked, the last one repeated up to `size`: what is repeated costs the same as zeros, and is never odd."""
    return np.stack([*items, *[items[-1]] * (size - len(items))])


def parts(items: Iterable[A], most: int, counts: Callable[[A], bool]) -> Iterator[list[A]]:
    """Items in lists that hold `most` of those that count, but the last; others stay in their places."""
    part, full = [], 0
    for item in items:
        part.append(item)
        full += counts(item)
        if full == most:
            yield part
            part, full = [], 0
    if part:
        yield part


def one_ahead(dispatched: Iterable[Callable[[], B]]) -> Iterator[B]:
    """What each call returns, called when the next one is there: its work has been started meanwhile."""
    waiting: Callable[[], B] | None = None
    for fetch in dispatched:
        if waiting is not None:
            yield waiting()
        waiting = fetch
    if waiting is not None:
        yield waiting()
