"""Data sources: the spelling of a mixture, and retries while records are out of reach."""

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
from vlab_jax.data.sources import Consumer, DamagedRecord, RetryingSource
from vlab_jax.data.tokenizer import train_bpe
from vlab_jax.datasets import registry
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.errors import CannotRead, InputError

TOKENIZER = train_bpe(["a circle moves"], vocab_size=280, context_length=128)
linux = pytest.mark.skipif(sys.platform != "linux", reason="open files are made to fail by way of /proc")


@pytest.fixture
def folder(data_dir, tmp_path) -> pathlib.Path:
    """A copy of the data, to be damaged."""
    return pathlib.Path(shutil.copytree(data_dir, tmp_path / "data"))


def opened(folder: pathlib.Path, seconds: float = 60.0) -> RetryingSource:
    return registry.open_split("motion/tiny", "train", BuildOptions(str(folder)), seconds)


def records(folder: pathlib.Path) -> pathlib.Path:
    (file,) = folder.rglob("*train*array_record*")
    return file


def back_after(seconds: float, away: pathlib.Path, folder: pathlib.Path) -> threading.Timer:
    timer = threading.Timer(seconds, away.rename, [folder])
    timer.start()
    return timer


def warnings(caplog) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]


@linux
def test_a_record_is_read_when_its_directory_is_back_and_an_outage_is_logged_in_two_lines(folder, caplog):
    source = opened(folder)
    expected = [source[index]["id"] for index in range(5)]
    timer = back_after(0.8, cut_off(folder), folder)
    assert source[1]["id"] == expected[1]
    timer.join()
    assert [source[index]["id"] for index in range(5)] == expected
    begun, ended = warnings(caplog)
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


def test_of_the_readers_for_one_consumer_one_reports_an_outage_and_all_give_up_when_it_is_closed(folder, caplog):
    consumer = Consumer()
    readers = [opened(folder).read_for(consumer) for _ in range(4)]
    folder.rename(folder.with_name("away"))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(reader.__getitem__, 0) for reader in readers]
        concurrent.futures.wait(waiting, timeout=1.0)
        assert not any(future.done() for future in waiting)
        consumer.closed.set()
        assert {type(future.exception(timeout=30)) for future in waiting} == {CannotRead}
    assert len(warnings(caplog)) == 1


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


def _is_damaged(source: RetryingSource, index: int) -> bool:
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


# Mixtures


@pytest.mark.parametrize(
    ("entries", "mixture"),
    [
        (("motion",), [("motion", 1.0)]),
        (("motion@0.7", "folder:/a/b@3e-1"), [("motion", 0.7), ("folder:/a/b", 0.3)]),
        (("folder:/mail/me@home/clips",), [("folder:/mail/me@home/clips", 1.0)]),
        (("folder:/mail/me@home/clips@2",), [("folder:/mail/me@home/clips", 2.0)]),
    ],
)
def test_a_mixture_is_spelled_with_weights_behind_an_at_sign(entries, mixture):
    assert sources.parse_mixture(entries) == mixture


def test_a_directory_whose_name_ends_like_a_weight_is_a_directory_where_it_is_there(tmp_path):
    spec = f"folder:{tmp_path}/clips@2024"
    assert sources.parse_mixture([spec]) == [(f"folder:{tmp_path}/clips", 2024.0)]
    (tmp_path / "clips@2024").mkdir()
    assert sources.parse_mixture([spec, f"{spec}@0.5"]) == [(spec, 1.0), (spec, 0.5)]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((), r"^no data set to train on; name one, as in data\.train=\('motion',\)$"),
        (("motion@0",), r"^the weight of data set 'motion@0' must be positive and finite$"),
        (("motion", "motion/still@-1"), r"'motion/still@-1' must be positive"),
        (("motion@nan",), r"'motion@nan' must be positive"),
        (("motion@inf",), r"'motion@inf' must be positive"),
    ],
)
def test_a_mixture_without_data_or_positive_weights_is_refused(entries, message):
    with pytest.raises(InputError, match=message):
        sources.parse_mixture(entries)
