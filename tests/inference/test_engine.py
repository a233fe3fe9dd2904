"""Batches have few sizes, and the work on one is started before the results of the one before it are fetched."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlab_jax.errors import InputError
from vlab_jax.inference.clips import DecodedClip
from vlab_jax.inference.engine import bucket_size, one_ahead, pad_batch, split_batches


@given(st.data(), st.integers(1, 8), st.integers(1, 16))
def test_a_bucket_holds_the_items_and_there_are_few_sizes(data, divisor, times):
    largest = divisor * times
    sizes = {count: bucket_size(count, largest, divisor) for count in range(1, largest + 1)}
    assert all(count <= size <= largest and size % divisor == 0 for count, size in sizes.items())
    assert all(size < 2 * count or size == divisor for count, size in sizes.items())
    assert len(set(sizes.values())) <= np.log2(times) + 2


def test_padding_repeats_the_last_item():
    made = pad_batch([np.array([1, 2]), np.array([3, 4])], 4)
    np.testing.assert_array_equal(made, [[1, 2], [3, 4], [3, 4], [3, 4]])


@given(st.lists(st.booleans()), st.integers(1, 4))
def test_batches_hold_as_many_decoded_clips_and_keep_the_order(decoded, size):
    frames = np.zeros((1, 2, 2, 3), np.uint8)
    clips = [DecodedClip(str(i), frames if ok else None, "" if ok else "bad") for i, ok in enumerate(decoded)]
    batches = list(split_batches(clips, size, "skip"))
    assert [clip for batch in batches for clip in batch] == clips
    counts = [sum(clip.frames is not None for clip in batch) for batch in batches]
    assert all(count == size for count in counts[:-1]) and (not counts or counts[-1] <= size)
    if not all(decoded):
        with pytest.raises(InputError, match="bad"):
            list(split_batches(clips, size, "raise"))


def test_each_batch_is_started_before_the_results_of_the_one_before_it_are_fetched():
    log = []

    def start(number):
        log.append(f"start {number}")
        return lambda: log.append(f"fetch {number}") or number

    assert list(one_ahead(start(number) for number in range(3))) == [0, 1, 2]
    assert log == ["start 0", "start 1", "fetch 0", "start 2", "fetch 1", "fetch 2"]
    assert list(one_ahead([])) == []
