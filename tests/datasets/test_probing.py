"""Files opened by worker processes: one that hangs, or ends its worker, is told, and the others are opened."""

import multiprocessing
import os
import signal
import threading

import pytest
from official_folders import small_video

from vlab_jax.datasets.check import Probed, hash64, probe_file, probe_files


def test_what_is_known_of_a_file_is_its_length_its_content_or_why_it_cannot_be_opened(tmp_path):
    (tmp_path / "a.mp4").write_bytes(small_video())
    (tmp_path / "b.mp4").write_bytes(b"no video")
    good = probe_file(str(tmp_path / "a.mp4"))
    assert good.duration == pytest.approx(2.0, abs=0.1) and good.error == ""
    assert good.content == hash64(small_video()) != hash64(small_video(1))
    assert probe_file(str(tmp_path / "b.mp4")).error.startswith("the media cannot be decoded")
    assert "No such file" in probe_file(str(tmp_path / "c.mp4")).error


def test_a_file_that_hangs_and_one_that_ends_its_worker_do_not_end_the_rest(tmp_path):
    names = [str(tmp_path / f"{number}.mp4") for number in range(4)]
    for name in names[2:]:
        with open(name, "wb") as file:
            file.write(small_video())
    for name in names[:2]:
        os.mkfifo(name)  # opening it waits for a writer, who does not come
    taken: dict[str, Probed] = {}

    for result in probe_files(iter(names), workers=1, timeout=3.0):
        taken[result.path] = result
        if result.path == names[0]:  # the worker that took its place is about to get the second
            (worker,) = multiprocessing.active_children()
            threading.Timer(0.2, os.kill, (worker.pid, signal.SIGKILL)).start()
    assert taken[names[0]].error == "it was not opened in 3 s"
    assert taken[names[1]].error == "the decoder crashed on it"
    assert [taken[name].error for name in names[2:]] == ["", ""]
    assert not multiprocessing.active_children()


def test_workers_end_with_the_iteration(tmp_path):
    (tmp_path / "a.mp4").write_bytes(small_video())
    results = probe_files(iter([str(tmp_path / "a.mp4")] * 10), workers=2, timeout=30.0)
    assert next(results).error == "" and multiprocessing.active_children()
    results.close()
    assert not multiprocessing.active_children()
