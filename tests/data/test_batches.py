"""Batches ahead of time: pieces joined are the batches, and what is decoded ahead fits into a bound on memory."""

import dataclasses
import itertools
import pathlib
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from listed_source import grey_clips

from configs import benchmarks, pretrain
from vlab_jax.config import evaluation_config, training_config
from vlab_jax.data import pipeline
from vlab_jax.data.batches import (
    Prefetch,
    PrefetchMemory,
    join,
    piece_ranges,
    pieces_at_once,
    plan_prefetch,
    stack,
)
from vlab_jax.data.tokenizer import train_bpe
from vlab_jax.errors import InputError

MIB, GIB = 2**20, 2**30


# Pieces


def element(index: int) -> dict[str, Any]:
    """An element of evaluation, which can be told from others."""
    return {
        "video": np.full((2, 3), index % 251, np.uint8),
        "index": np.int32(index),
        "valid": index % 3 > 0,
        "failures": [f"{index} is broken"] * (index % 3 == 0),
    }


def whole(clips: int, size: int, number: int) -> dict[str, Any]:
    """A batch at once: the last is filled up with clips like its last, which are not valid."""
    elements = [element(index) for index in range(number * size, min((number + 1) * size, clips))]
    filler = {**elements[-1], "valid": False, "index": np.int32(-1), "failures": []}
    return stack(elements + [filler] * (size - len(elements)))


@settings(max_examples=200, deadline=None)
@given(clips=st.integers(1, 60), size=st.integers(1, 13), piece=st.integers(1, 15), data=st.data())
def test_pieces_joined_are_whole_batches_for_any_sizes(clips, size, piece, data):
    numbers = range(-(-clips // size))
    every = data.draw(st.integers(1, 3))
    numbers = numbers[data.draw(st.integers(0, 2)) :: every]
    if not numbers:
        return
    ranges = list(piece_ranges(clips, size, piece, numbers[0], every))
    assert all(0 < len(indices) <= piece for indices in ranges)
    remaining = (stack([element(index) for index in indices]) for indices in ranges)
    for number in numbers:
        batch, expected = join(remaining, size), whole(clips, size, number)
        assert batch.keys() == expected.keys()
        for key, value in expected.items():
            assert type(batch[key]) is type(value) and np.array_equal(batch[key], value), key
            assert isinstance(value, list) or batch[key].dtype == value.dtype
    with pytest.raises(StopIteration):
        join(remaining, size)


def test_one_piece_at_a_time_is_held_while_a_batch_is_joined():
    held = 0

    class Counted(dict):
        def __init__(self, **fields: Any) -> None:
            nonlocal held
            super().__init__(fields)
            held += 1

        def __del__(self) -> None:
            nonlocal held
            held -= 1

    def pieces():
        for number in range(4):
            assert held == 0
            yield Counted(clip=np.array([number]))

    assert join(pieces(), 4)["clip"].tolist() == [0, 1, 2, 3]


# Memory


def held(plan: Prefetch, batch: int, frame_bytes: int) -> int:
    """Bytes of all frames that exist ahead at once."""
    pieces = pieces_at_once(plan.workers) * plan.piece
    return (pieces + plan.ahead * batch) * frame_bytes


@pytest.mark.parametrize("cores", [2, 16, 64, 200])
@pytest.mark.parametrize("use", ["retrieval:didemo", "pretrain:b16", "pretrain:l14", "pretrain:l14_336"])
def test_the_published_configurations_stay_within_the_default_bound_on_any_machine(use, cores):
    """Whole batches of `didemo`, three for each of 16 workers, were 55 GiB."""
    file, argument = use.split(":")
    config = training_config()
    if file == "retrieval":  # without the weights to start from, whose size is the default
        benchmarks.follow(config, file, benchmarks.find(file, argument))
    else:
        config = pretrain.get_config(argument)
    memory = PrefetchMemory(config.data.prefetch_gigabytes, shares=2)
    assert config.data.prefetch_gigabytes <= 64 / 8
    for name in config.stages:
        stage = config.stage[name]
        frame_bytes = (stage.frames or config.frames) * config.model.vision.image_size**2 * 3
        plan = plan_prefetch(memory, batch=stage.batch_size, frame_bytes=frame_bytes, workers=max(1, cores - 2))
        assert held(plan, stage.batch_size, frame_bytes) <= config.data.prefetch_gigabytes * GIB / 2
        assert plan.workers >= min(cores - 2, 60) and plan.ahead


sizes = st.builds(dict, batch=st.integers(1, 2048), frame_bytes=st.integers(1, 64 * MIB), workers=st.integers(1, 256))


@given(sizes=sizes, gigabytes=st.floats(0.001, 64), shares=st.integers(1, 16))
def test_a_plan_is_within_its_bounds_or_refused_where_no_worker_fits(sizes, gigabytes, shares):
    memory = PrefetchMemory(gigabytes, shares)
    batch, frame_bytes = sizes["batch"], sizes["frame_bytes"]
    try:
        plan = plan_prefetch(memory, **sizes)
    except InputError as error:
        assert "\n" not in str(error)
        least = pieces_at_once(1) * (frame_bytes + 4096)
        assert gigabytes * GIB / shares < 3 * least
        return
    assert 1 <= plan.workers <= sizes["workers"] and plan.piece >= 1
    assert held(plan, batch, frame_bytes) <= gigabytes * GIB / shares
    assert plan.workers * plan.piece <= max(batch, plan.workers)  # all of them make a batch together
    assert plan.note or plan.workers == sizes["workers"]


def test_threads_are_refused_nothing():
    plan = plan_prefetch(PrefetchMemory(0.001), batch=7, frame_bytes=64 * MIB, workers=0)
    assert plan == Prefetch(0, 1, ahead=False)


def test_memory_for_less_than_one_worker_is_refused_in_one_line_that_says_what_to_do():
    sizes = {"batch": 128, "frame_bytes": 64 * 224 * 224 * 3, "workers": 62}
    line = (
        r"^data\.prefetch_gigabytes=0\.125 is too little for clips of 10 MiB: set at least --config\.data\."
        r"prefetch_gigabytes=0\.1875, or decode in threads with --config\.data\.workers=0$"
    )
    with pytest.raises(InputError, match=line):
        plan_prefetch(PrefetchMemory(0.125, 2), **sizes)
    assert plan_prefetch(PrefetchMemory(0.1875, 2), **sizes)[:2] == (1, 1)


def test_where_memory_is_small_there_are_fewer_workers_and_one_line_says_so():
    sizes = {"batch": 512, "frame_bytes": 8 * 224 * 224 * 3, "workers": 16}
    assert plan_prefetch(PrefetchMemory(8.0), **sizes).note == ""
    few = plan_prefetch(PrefetchMemory(0.05), **sizes)
    assert few.note.startswith("data.prefetch_gigabytes=0.05 is enough for 8 of 16 worker processes; ")
    assert "\n" not in few.note


def test_both_kinds_of_configs_bound_the_memory_alike():
    bounds = {config().data.prefetch_gigabytes for config in (training_config, evaluation_config)}
    assert bounds == {PrefetchMemory().gigabytes}


@dataclasses.dataclass(frozen=True)
class CountedFrames(pipeline.FrameOptions):
    """Grey frames; each clip adds a byte to a file."""

    file: str = ""

    def decode(self, clip, rng):
        with open(self.file, "ab") as file:
            file.write(b".")
        return np.zeros((self.num_frames, self.size, self.size, 3), np.uint8)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_workers_that_are_ahead_stay_within_the_bound(kind, workers, tmp_path):
    """64 clips of 192 KiB a batch, 12 MiB, and a bound of 20 MiB, which leaves no room for a batch ahead."""
    frames, memory = CountedFrames(num_frames=64, size=32, file=str(tmp_path / "count")), PrefetchMemory(20 / 1024)
    options = {"batch_size": 64, "workers": workers, "memory": memory}
    plan = plan_prefetch(memory, batch=64, frame_bytes=frames.nbytes, workers=workers)
    if kind == "training":
        tokenizer = train_bpe(["a clip"], 300, 8)
        made = pipeline.training_batches([grey_clips(6)], [1.0], frames, tokenizer, seed=0, **options)
    else:
        made = pipeline.evaluation_batches(grey_clips(640), frames, **options)
    with made as batches:
        for number, batch in enumerate(itertools.islice(batches, 3), start=1):
            assert batch["video"].shape == (64, 64, 32, 32, 3)
            most = 64 * number + (plan.window - 1) * plan.piece
            deadline = time.monotonic() + 60
            while (count := pathlib.Path(frames.file).stat().st_size) < most and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(0.1)
            assert count == pathlib.Path(frames.file).stat().st_size == most, "the workers get ahead, and no further"
    assert not plan.ahead and held(plan, 64, frames.nbytes) < 20 * MIB
