"""What a run that was killed as a whole leaves is removed by the next start, and nothing else."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from multiprocessing import shared_memory

import pytest

from vlab_jax.data.crash_guard import name_by_parent, prefix_of, remove_undelivered, tag_of, take_over

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not pathlib.Path("/dev/shm").is_dir(), reason="no /dev/shm to look into")

PROGRAM = """
import multiprocessing, pathlib, sys, time
from multiprocessing import shared_memory
from vlab_jax.data.crash_guard import folder, name_by_parent, take_over

def work():
    name_by_parent()
    segment = shared_memory.SharedMemory(create=True, size=64)
    print(segment.name, flush=True)
    time.sleep(600)

if __name__ == "__main__":
    take_over(pathlib.Path(sys.argv[1]))
    kept = folder()
    multiprocessing.get_context("spawn").Process(target=work).start()
    time.sleep(600)
"""


def start(tmp_path) -> tuple[subprocess.Popen, pathlib.Path, str]:
    """A process group, the file that names it, and its segment's name."""
    program, file = tmp_path / "program.py", tmp_path / "shared-memory"
    program.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, program, file],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return process, file, process.stdout.readline().strip()


def test_a_process_that_lives_keeps_its_segments_and_folders(tmp_path, monkeypatch):
    process, file, name = start(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    prefix = file.read_text()
    try:
        assert take_over(file) == 0
        assert pathlib.Path("/dev/shm", name).exists() and list(tmp_path.glob(f"{prefix}-*"))
        assert file.read_text() == prefix_of(os.getpid())
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    file.write_text(prefix)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert take_over(file) == 2  # ended, and its parent has not asked how
    process.wait()


def test_segments_and_folders_of_a_group_that_was_killed_are_removed_by_the_next_start(tmp_path, monkeypatch):
    process, file, name = start(tmp_path)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (folder,) = tmp_path.glob(f"{file.read_text()}-*")
    segment = pathlib.Path("/dev/shm", name)
    assert segment.exists() and name.startswith(file.read_text())
    others = shared_memory.SharedMemory(create=True, size=64)
    try:
        assert take_over(file) == 2
        assert not segment.exists() and not folder.exists() and pathlib.Path("/dev/shm", others.name).exists()
        assert file.read_text() == prefix_of(os.getpid())
        assert take_over(file) == 0  # its own
    finally:
        others.close()
        others.unlink()


def test_a_file_that_names_no_process_removes_nothing(tmp_path):
    others = shared_memory.SharedMemory(create=True, size=64)
    try:
        for content in ("", "*", "psm_", "../../etc"):
            (tmp_path / "file").write_text(content)
            assert take_over(tmp_path / "file") == 0
        assert pathlib.Path("/dev/shm", others.name).exists()
    finally:
        others.close()
        others.unlink()


def _make(names: multiprocessing.Queue) -> None:
    name_by_parent()
    segment = shared_memory.SharedMemory(create=True, size=64)
    names.put(segment.name)
    segment.close()
    segment.unlink()


def test_a_worker_names_its_segments_after_its_parent():
    context = multiprocessing.get_context("spawn")
    names = context.Queue()
    worker = context.Process(target=_make, args=[names])
    worker.start()
    name = names.get(timeout=60)
    assert name.startswith(prefix_of(os.getpid())) and len(name) == 8 + 16
    worker.join()


def _make_two_and_end(names: multiprocessing.Queue, tag: str) -> None:
    name_by_parent(tag)
    for _ in range(2):
        names.put(shared_memory.SharedMemory(create=True, size=64).name)


def test_what_ended_workers_made_and_nobody_opened_is_removed_and_no_other_group_s(capfd):
    context = multiprocessing.get_context("spawn")
    names, ours, theirs = context.Queue(), tag_of("/tmp/ours"), tag_of("/tmp/theirs")
    for tag in (ours, theirs):
        worker = context.Process(target=_make_two_and_end, args=[names, tag])
        worker.start()
        worker.join()
    opened, undelivered, other, another = (names.get(timeout=60) for _ in range(4))
    segment = shared_memory.SharedMemory(opened)
    try:
        assert remove_undelivered(ours) == 1
        assert {path.name for path in pathlib.Path("/dev/shm").glob(f"{prefix_of(os.getpid())}*")} == {
            opened,
            other,
            another,
        }
        assert remove_undelivered(theirs) == 2
    finally:
        segment.close()
        segment.unlink()
    assert undelivered.startswith(prefix_of(os.getpid()) + ours)
    assert "KeyError" not in capfd.readouterr().err  # of the process that Python removes segments by
