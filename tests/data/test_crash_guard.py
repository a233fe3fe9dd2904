"""A map over worker processes: order, bounded memory, and processes that crash or hang."""

import itertools
import os
import pathlib
import time

import numpy as np
import pytest

from vlab_jax.data.crash_guard import map_in_order
from vlab_jax.errors import InputError


def no_crash(_: object) -> str:
    raise AssertionError("no process crashed")


def arrays(number: int) -> list[np.ndarray]:
    """Large and small ones, of which the first has a state of its own in memory for each number."""
    return [np.full((300, 1000), number, np.uint8), np.arange(5) + number, np.full((100, 700), number, np.float32)]


def open_files(_: int) -> list[str]:
    """What this process has open or mapped."""
    files = [os.readlink(path) for path in pathlib.Path("/proc/self/fd").iterdir() if path.exists()]
    return files + pathlib.Path("/proc/self/maps").read_text().splitlines()


class OddError(Exception):
    """An error that cannot be pickled and loaded."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


def fail_oddly(number: int) -> int:
    raise OddError("some", "reason")


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
    results = map_in_order(squared, (next(taken) for _ in range(10**9)), workers, no_crash)
    assert list(itertools.islice(results, 20)) == [n**2 for n in range(20)]
    assert next(taken) <= 20 + 4 * workers
    results.close()


def test_what_the_function_raises_is_raised():
    with pytest.raises(InputError, match=r"^1 is refused$"):
        list(map_in_order(refuse, [1, 2], 1, no_crash))
    with pytest.raises(RuntimeError, match="OddError: some reason") as raised:
        list(map_in_order(fail_oddly, [1], 1, no_crash))
    assert "in fail_oddly" in raised.value.__notes__[0]


def test_arrays_come_back_whole_whatever_their_size():
    for number, found in enumerate(map_in_order(arrays, range(5), 1, no_crash)):
        for one, other in zip(found, arrays(number), strict=True):
            assert one.dtype == other.dtype and one.flags.writeable and np.array_equal(one, other)


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="no /proc to look into")
def test_a_worker_shares_no_memory_that_has_a_name():
    """Whatever has one in `/dev/shm` would stay there after a SIGKILL of the whole process group."""
    (found,) = map_in_order(open_files, [0], 1, no_crash)
    assert found and not [file for file in found if "/dev/shm/" in file and "(deleted)" not in file]


def test_a_process_that_dies_loses_its_own_item_alone(tmp_path):
    items = [(str(tmp_path), number) for number in range(8)]
    results = map_in_order(survive, items, 2, lambda item: -item[1])
    assert list(results) == [0, 1, 2, -3, 4, 5, 6, 7]
    assert (tmp_path / "once").exists()


def test_an_item_that_takes_too_long_is_lost_alone():
    assert list(map_in_order(hang_at_two, range(4), 1, lambda number: -number, 1.0)) == [0, 1, -2, 3]
