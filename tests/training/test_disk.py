"""A full disk, a read-only one, and other files beside the checkpoints: one line each, and nothing is lost."""

import gc
import logging
import pathlib
import subprocess

import pytest
from run_files import assert_same_run, assert_same_state, interrupted, saved_state

from vlab_jax.errors import CannotWrite
from vlab_jax.training.loop import train


@pytest.fixture
def disk(tmp_path) -> pathlib.Path:
    """A file system of 64 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: pathlib.Path, left: int) -> pathlib.Path:
    """A file that leaves so many bytes of a file system free."""
    filler = place / "filler"
    with filler.open("wb") as file:
        done = subprocess.run(["df", "--output=avail", "-B1", place], capture_output=True, text=True, check=True)
        file.write(bytes(int(done.stdout.split()[-1]) - left))
    return filler


def checkpoints(workdir: pathlib.Path) -> list[str]:
    """Those that have their name; a directory gets it when it is complete."""
    return sorted(path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def test_a_save_that_finds_no_room_ends_the_run_and_with_room_it_goes_on_bit_for_bit(config, finished, disk, caplog):
    caplog.set_level(logging.CRITICAL, "asyncio")
    workdir = interrupted(finished, disk / "workdir", 2)
    config.checkpoint.keep = 1  # the one before must last until the next is complete
    config.stop_after = 4
    filler = fill(disk, left=200 * 1024)
    with pytest.raises(CannotWrite) as raised:
        train(config, workdir)
    line = str(raised.value)
    assert line.startswith(f"{workdir}/") and "\n" not in line
    assert "cannot be written: No space left on device (" in line and " free); " in line
    assert "make room" in line and "the same command goes on" in line
    del raised
    gc.collect()  # what Orbax has not looked at is logged when it goes
    assert checkpoints(workdir) == ["2"]
    assert_same_state(saved_state(workdir), saved_state(finished, 2))
    filler.unlink()
    train(config, workdir)
    assert_same_run(workdir, finished, 4)


def test_a_disk_that_is_read_only_is_reported_at_the_start(config, disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(CannotWrite, match=r"workdir cannot be written: Read-only file system .*make it writable"):
        train(config, disk / "workdir")


def test_other_files_beside_the_checkpoints_are_named_and_ignored(config, finished, tmp_path, caplog):
    workdir = interrupted(finished, tmp_path / "run", 4)
    folder = workdir / "checkpoints"
    (folder / "6.orbax-checkpoint-tmp" / "state").mkdir(parents=True)  # what a kill leaves
    (folder / "5.orbax-checkpoint-tmp-1795560128").mkdir()
    (folder / "copied by hand").mkdir()
    (folder / "9").write_text("a file")
    (folder / "12").mkdir()  # emptied
    config.stop_after = 6
    train(config, workdir)
    messages = "\n".join(record.getMessage() for record in caplog.records)
    assert f"ignoring, in {folder}, what is no complete checkpoint: " in messages
    for name in ("6.orbax-checkpoint-tmp", "5.orbax-checkpoint-tmp-1795560128", "copied by hand", "9"):
        assert name in messages
    assert f"{folder / '12'} cannot be read" in messages
    assert [path.name.split("-")[0] for path in (workdir / "damaged").iterdir()] == ["12"]
    assert_same_run(workdir, finished, 6)
