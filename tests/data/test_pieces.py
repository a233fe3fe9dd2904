"""Pieces of batches, joined, are the batches."""

from typing import Any

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlab_jax.data.pieces import Pieces, join, stack


def element(index: int) -> dict[str, Any]:
    """An element of evaluation, which can be told from others."""
    return {
        "video": np.full((2, 3), index % 251, np.uint8),
        "index": np.int32(index),
        "valid": index % 3 > 0,
        "failures": [f"{index} is broken"] * (index % 3 == 0),
    }


def whole(clips: int, size: int, number: int) -> dict[str, Any]:
    """A batch at once: the last is filled up with clips like its last, which are not valid."""
    elements = [element(index) for index in range(number * size, min((number + 1) * size, clips))]
    filler = {**elements[-1], "valid": False, "index": np.int32(-1), "failures": []}
    return stack(elements + [filler] * (size - len(elements)))


@settings(max_examples=200, deadline=None)
@given(clips=st.integers(1, 60), size=st.integers(1, 13), piece=st.integers(1, 15), data=st.data())
def test_pieces_joined_are_whole_batches_for_any_sizes(clips, size, piece, data):
    numbers = range(-(-clips // size))
    every = data.draw(st.integers(1, 3))
    numbers = numbers[data.draw(st.integers(0, 2)) :: every]
    if not numbers:
        return
    pieces = Pieces(grain.MapDataset.range(clips).map(element), size, piece, numbers[0], every)
    done = data.draw(st.integers(0, len(numbers) - 1))  # as after a worker's death
    left = iter(pieces[done * pieces.of_batch :].to_iter_dataset(grain.ReadOptions(0, 0)))
    for number in numbers[done:]:
        batch, expected = join(left, size), whole(clips, size, number)
        assert batch.keys() == expected.keys()
        for key, value in expected.items():
            assert type(batch[key]) is type(value) and np.array_equal(batch[key], value), key
            assert isinstance(value, list) or batch[key].dtype == value.dtype
    with pytest.raises(StopIteration):
        join(left, size)


def test_one_piece_at_a_time_is_held_while_a_batch_is_joined():
    held = 0

    class Counted(dict):
        def __init__(self, **fields: Any) -> None:
            nonlocal held
            super().__init__(fields)
            held += 1

        def __del__(self) -> None:
            nonlocal held
            held -= 1

    def pieces():
        for number in range(4):
            assert held == 0
            yield Counted(clip=np.array([number]))

    assert join(pieces(), 4)["clip"].tolist() == [0, 1, 2, 3]
