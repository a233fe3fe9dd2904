"""Data that is out of reach: the run waits, and where it waits in vain or is told to stop, all is saved."""

import os
import pathlib
import shutil
import signal
import sys
import threading

import pytest
from outage import cut_off
from run_files import assert_same_state, losses, saved_state

from vlab_jax.errors import CannotRead, RunPreempted
from vlab_jax.runtime.metrics import MetricWriter
from vlab_jax.training.loop import train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="open files are made to fail by way of /proc")


@pytest.fixture
def folder(config, tmp_path) -> pathlib.Path:
    """A copy of the data that the run reads; it vanishes after the third step."""
    copied = pathlib.Path(shutil.copytree(config.data.directory, tmp_path / "data"))
    config.data.directory = str(copied)
    return copied


def after_step(monkeypatch, number: int, do) -> None:
    """Calls a function once a step is recorded, the first time."""
    write, waiting = MetricWriter.write, [do]

    def written(self, step, *args, **options):
        write(self, step, *args, **options)
        if step == number and waiting:
            waiting.pop()()

    monkeypatch.setattr(MetricWriter, "write", written)


def assert_saved(workdir: pathlib.Path) -> None:
    """All steps that were recorded are in the newest checkpoint."""
    done = [step for step, *_ in losses(workdir)]
    assert 3 <= len(done) < 8 and (workdir / "checkpoints" / str(done[-1])).is_dir()


def test_a_run_that_waits_in_vain_saves_and_started_again_waits_and_ends_with_the_same_bits(
    config, folder, finished, tmp_path, monkeypatch, caplog
):
    config.data.retry_seconds = 0.5
    after_step(monkeypatch, 3, lambda: cut_off(folder))
    with pytest.raises(CannotRead, match="was out of reach for"):
        train(config, tmp_path / "run")
    assert_saved(tmp_path / "run")
    folder.with_name("data-away").rename(folder)
    config.data.retry_seconds = 60.0
    after_step(monkeypatch, 7, lambda: threading.Timer(1.0, cut_off(folder).rename, [folder]).start())
    train(config, tmp_path / "run")
    assert [each.getMessage() for each in caplog.records if "is back after" in each.getMessage()]
    assert losses(tmp_path / "run") == losses(finished)
    assert_same_state(saved_state(tmp_path / "run"), saved_state(finished))


def test_a_run_that_waits_is_still_stopped_by_sigterm(config, folder, tmp_path, monkeypatch):
    def vanish():
        cut_off(folder)
        threading.Timer(2.0, os.kill, [os.getpid(), signal.SIGTERM]).start()

    after_step(monkeypatch, 3, vanish)
    with pytest.raises(RunPreempted):
        train(config, tmp_path / "run")
    assert_saved(tmp_path / "run")
