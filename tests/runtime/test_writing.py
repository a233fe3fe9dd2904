"""A file that cannot be written is named in one line, with the reason, the free space and what to do."""

import errno
import os
import pathlib
import resource

import pytest

from vlab_jax.errors import CannotWrite
from vlab_jax.runtime.disk import errno_of, write_json, writing
from vlab_jax.runtime.metrics import MetricWriter, read_metrics


@pytest.fixture
def small_files():
    """No file of this process may grow beyond 4 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_metrics_that_find_no_room_are_reported_in_one_line_and_those_before_are_kept(tmp_path, small_files):
    writer = MetricWriter(tmp_path)
    written = 0
    with pytest.raises(CannotWrite) as raised:
        for step in range(1, 1000):
            writer.write(step, {"loss": 0.5}, stage="adapt")
            written = step
    line = str(raised.value)
    assert line.startswith(f"{tmp_path / 'metrics.jsonl'} cannot be written: {os.strerror(errno.EFBIG)} (")
    assert "free" in line and "make room" in line and "the same command goes on" in line and "\n" not in line
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, written + 1))


def test_events_that_find_no_room_end_the_run_and_do_not_hang_it(tmp_path, small_files):
    clock = iter(range(0, 10_000_000, 60))  # each write is flushed
    writer = MetricWriter(tmp_path, clock=lambda: float(next(clock)))
    with open(os.devnull, "w") as room, pytest.raises(CannotWrite, match="tensorboard cannot be written"):
        writer._file = room  # the record itself has room
        for step in range(1, 1000):
            writer.write(step, {f"loss {i}": 0.5 for i in range(10)}, stage="adapt")


def test_json_that_finds_no_room_leaves_the_old_file(tmp_path, small_files):
    path = tmp_path / "results.json"
    write_json(path, {"loss": 1})
    before = path.read_text()
    with pytest.raises(CannotWrite, match=r"results\.json cannot be written"):
        write_json(path, ["a" * 10_000])
    assert path.read_text() == before


def test_errors_that_are_not_of_a_disk_are_left_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        pathlib.Path(tmp_path, "none").read_text()
    assert errno_of(ValueError("a shape does not fit")) is None


def test_a_reason_is_found_in_a_message_and_in_the_cause_of_an_error():
    quoting = ValueError('RESOURCE_EXHAUSTED: Failed to write 4115 bytes to file "a": No space left on device; more')
    assert errno_of(quoting) == errno.ENOSPC
    above = RuntimeError("the save failed")
    above.__cause__ = OSError(errno.EROFS, "read-only")
    assert errno_of(above) == errno.EROFS
