"""A map over worker processes: order, bounded memory, and processes that die."""

import itertools
import os
import pathlib
import time

import pytest

from vlab_jax.data.crash_guard import map_in_order
from vlab_jax.errors import InputError


def nothing(_: object) -> str:
    raise AssertionError("no process was lost")


def squared(number: int) -> int:
    return number**2


def refuse(number: int) -> int:
    raise InputError(f"{number} is refused")


def survive(item: tuple[str, int]) -> int:
    """Ends the process at 3 always, and at 5 the first time."""
    folder, number = item
    once = pathlib.Path(folder, "once")
    if number == 3 or (number == 5 and not once.exists()):
        once.touch() if number == 5 else None
        os.abort()
    return number


def hang_at_two(number: int) -> int:
    if number == 2:
        time.sleep(1000)
    return number


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order_and_items_are_taken_as_they_are_needed(workers):
    taken = itertools.count()
    results = map_in_order(squared, (next(taken) for _ in range(10**9)), workers, nothing)
    assert list(itertools.islice(results, 20)) == [n**2 for n in range(20)]
    assert next(taken) <= 20 + 4 * workers
    results.close()


def test_what_the_function_raises_is_raised():
    with pytest.raises(InputError, match="1 is refused"):
        list(map_in_order(refuse, [1, 2], 1, nothing))


def test_a_process_that_dies_loses_its_own_item_alone(tmp_path):
    items = [(str(tmp_path), number) for number in range(8)]
    results = map_in_order(survive, items, 2, lambda item: -item[1])
    assert list(results) == [0, 1, 2, -3, 4, 5, 6, 7]
    assert (tmp_path / "once").exists()


def test_an_item_that_takes_too_long_is_lost_alone():
    assert list(map_in_order(hang_at_two, range(4), 1, lambda number: -number, 1.0)) == [0, 1, -2, 3]
