"""Data that is out of reach: the run waits; if it waits in vain or is told to stop, all is saved."""

import os
import pathlib
import shutil
import signal
import sys
import threading

import pytest
from outage import cut_off
from run_files import assert_same_run, interrupted, losses

from vlab_jax.errors import CannotRead, RunPreempted
from vlab_jax.runtime.metrics import MetricWriter
from vlab_jax.training.inputs import RunData
from vlab_jax.training.loop import train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="open files are made to fail by way of /proc")


@pytest.fixture
def folder(config, tmp_path) -> pathlib.Path:
    """A copy of the data, for the run to read."""
    copy = pathlib.Path(shutil.copytree(config.data.directory, tmp_path / "data"))
    config.data.directory = str(copy)
    return copy


@pytest.fixture
def workdir(finished, tmp_path) -> pathlib.Path:
    """A run between its two stages."""
    return interrupted(finished, tmp_path / "run", 4)


def after_step(monkeypatch, number: int, do) -> None:
    """Calls a function once a step is recorded."""
    write = MetricWriter.write

    def written(self, step, *args, **options):
        write(self, step, *args, **options)
        if step == number:
            do()

    monkeypatch.setattr(MetricWriter, "write", written)


def saved_steps(workdir: pathlib.Path) -> int:
    """All steps that are recorded, which are in the newest checkpoint, too."""
    done = losses(workdir)[-1][0]
    assert 5 <= done < 8 and (workdir / "checkpoints" / str(done)).is_dir()
    return done


def test_a_run_that_waits_in_vain_saves_and_started_again_waits_and_goes_on_with_the_same_bits(
    config, folder, workdir, finished, monkeypatch, caplog
):
    config.data.retry_seconds = 0.5
    with monkeypatch.context() as patches:
        after_step(patches, 5, lambda: cut_off(folder))
        with pytest.raises(CannotRead, match="was out of reach for"):
            train(config, workdir)
    saved_steps(workdir)
    folder.with_name("data-away").rename(folder)
    config.data.retry_seconds, config.stop_after = 60.0, 8
    batches = RunData.batches

    def batches_in_outage(*arguments):
        threading.Timer(2.0, cut_off(folder).rename, [folder]).start()
        return batches(*arguments)

    monkeypatch.setattr(RunData, "batches", batches_in_outage)
    train(config, workdir)
    assert [each.getMessage() for each in caplog.records if "is back after" in each.getMessage()]
    assert_same_run(workdir, finished, 8)


def test_a_run_that_waits_is_still_stopped_by_sigterm(config, folder, workdir, monkeypatch):
    def vanish():
        cut_off(folder)
        threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGTERM]).start()

    after_step(monkeypatch, 5, vanish)
    with pytest.raises(RunPreempted):
        train(config, workdir)
    saved_steps(workdir)
