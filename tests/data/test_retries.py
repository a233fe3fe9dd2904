"""Records that are out of reach for a while are waited for; those that are damaged are not."""

import concurrent.futures
import logging
import pathlib
import pickle
import shutil
import sys
import threading

import numpy as np
import pytest
from listed_source import StampedFrames
from outage import cut_off

from vlab_jax.data import pipeline, sources
from vlab_jax.data.sources import DamagedRecord, Patient
from vlab_jax.data.tokenizer import train_bpe
from vlab_jax.datasets import registry
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.errors import CannotRead

TOKENIZER = train_bpe(["a circle moves"], vocab_size=280, context_length=128)
linux = pytest.mark.skipif(sys.platform != "linux", reason="open files are made to fail by way of /proc")


@pytest.fixture
def folder(data_dir, tmp_path) -> pathlib.Path:
    """A copy of the data, to be maltreated."""
    return pathlib.Path(shutil.copytree(data_dir, tmp_path / "data"))


def opened(folder: pathlib.Path, seconds: float = 60.0) -> Patient:
    return registry.open_split("motion/tiny", "train", BuildOptions(str(folder)), seconds)


def records(folder: pathlib.Path) -> pathlib.Path:
    (file,) = folder.rglob("*train*array_record*")
    return file


def back_after(seconds: float, away: pathlib.Path, folder: pathlib.Path) -> threading.Timer:
    timer = threading.Timer(seconds, away.rename, [folder])
    timer.start()
    return timer


def said(caplog) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]


@linux
def test_a_record_is_read_when_its_directory_is_back_and_an_outage_is_said_in_two_lines(folder, caplog):
    source = opened(folder)
    expected = [source[index]["id"] for index in range(5)]
    timer = back_after(0.8, cut_off(folder), folder)
    assert source[1]["id"] == expected[1]
    timer.join()
    assert [source[index]["id"] for index in range(5)] == expected
    begun, ended = said(caplog)
    assert begun.startswith(f"split 'train' of 'motion/tiny' in {folder}/") and "Input/output error" in begun
    assert "is back after" in ended


def test_a_directory_that_is_not_there_when_a_worker_first_reads_is_waited_for(folder):
    pickled = pickle.dumps(opened(folder))
    timer = back_after(0.8, folder.rename(folder.with_name("away")), folder)
    source = pickle.loads(pickled)
    assert len(source) == 48 and source[0]["id"]
    timer.join()


def test_after_too_long_the_run_stops_in_one_line(folder):
    source = opened(folder, seconds=0.5)
    folder.rename(folder.with_name("away"))
    with pytest.raises(CannotRead) as raised:
        source[0]
    line = str(raised.value)
    assert "was out of reach for" in line and "data.retry_seconds=0.5" in line and "No such file" in line
    assert "\n" not in line


def test_of_those_who_read_for_one_consumer_one_speaks_and_all_give_up_when_it_is_gone(folder, tmp_path, caplog):
    shared = tmp_path / "shared"
    shared.mkdir()
    readers = [opened(folder).within(shared) for _ in range(4)]
    folder.rename(folder.with_name("away"))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(reader.__getitem__, 0) for reader in readers]
        concurrent.futures.wait(waiting, timeout=1.0)
        assert not any(future.done() for future in waiting)
        shutil.rmtree(shared)
        assert {type(future.exception(timeout=30)) for future in waiting} == {CannotRead}
    assert len(said(caplog)) == 1


def test_a_damaged_record_is_not_waited_for_and_is_replaced_and_counted_in_training(folder, monkeypatch):
    monkeypatch.setattr(sources, "_FIRST_WAIT", 1e9)  # whoever waits does so for ever
    file = records(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x55
    file.write_bytes(content)
    source = opened(folder)
    damaged = [index for index in range(48) if _is_damaged(source, index)]
    assert len(damaged) == 1
    frames = StampedFrames(num_frames=2, size=2)
    with pipeline.training_batches([source], [1.0], frames, TOKENIZER, batch_size=48, seed=0) as batches:
        batch = next(batches)
    (failure,) = batch["failures"]
    assert failure.startswith(f"record {damaged[0]} of split 'train' of 'motion/tiny'") and "is damaged" in failure
    assert len(batch["ids"]) == 48


def _is_damaged(source: Patient, index: int) -> bool:
    try:
        source[index]
    except DamagedRecord:
        return True
    return False


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_the_same_with_an_outage_and_no_clip_counts_as_failed(folder, workers):
    frames = StampedFrames(num_frames=2, size=2)
    options = {"batch_size": 6, "seed": 3, "workers": workers}

    with pipeline.training_batches([opened(folder)], [1.0], frames, TOKENIZER, **{**options, "workers": 0}) as batches:
        undisturbed = [next(batches) for _ in range(3)]
    source = opened(folder)
    with pipeline.training_batches([source], [1.0], frames, TOKENIZER, **options) as batches:
        timer = back_after(0.8, folder.rename(folder.with_name("away")), folder)
        for expected in undisturbed:
            batch = next(batches)
            assert not batch["failures"]
            assert all(np.array_equal(batch[key], expected[key]) for key in expected)
        timer.join()
