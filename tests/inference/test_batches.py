"""Batches of few sizes, one of them ahead."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vlab_jax.inference.engine import bucket, one_ahead, padded, parts


@given(st.data(), st.integers(1, 8), st.integers(1, 16))
def test_a_bucket_holds_the_items_and_there_are_few_of_them(data, divisor, times):
    most = divisor * times
    sizes = {count: bucket(count, most, divisor) for count in range(1, most + 1)}
    assert all(count <= size <= most and size % divisor == 0 for count, size in sizes.items())
    assert all(size < 2 * count or size == divisor for count, size in sizes.items())
    assert len(set(sizes.values())) <= np.log2(times) + 2


def test_padding_repeats_the_last_item():
    made = padded([np.array([1, 2]), np.array([3, 4])], 4)
    np.testing.assert_array_equal(made, [[1, 2], [3, 4], [3, 4], [3, 4]])


@given(st.lists(st.integers(0, 3)), st.integers(1, 4))
def test_parts_hold_as_many_of_what_counts_and_keep_the_order(items, most):
    made = list(parts(items, most, lambda item: item > 0))
    assert [item for part in made for item in part] == items
    counts = [sum(item > 0 for item in part) for part in made]
    assert all(count == most for count in counts[:-1]) and (not counts or counts[-1] <= most)


def test_each_is_started_before_the_one_before_it_is_fetched():
    seen = []

    def start(number):
        seen.append(f"start {number}")
        return lambda: seen.append(f"fetch {number}") or number

    assert list(one_ahead(start(number) for number in range(3))) == [0, 1, 2]
    assert seen == ["start 0", "start 1", "fetch 0", "start 2", "fetch 1", "fetch 2"]
    assert list(one_ahead([])) == []
