"""What is decoded ahead fits into a bound on memory, and where it cannot, one line says so."""

import itertools
import os
import pathlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from listed_source import ProcessFrames, grey_clips

from configs import benchmarks, pretrain
from vlab_jax.config import evaluation_config, training_config
from vlab_jax.data import crash_guard, pipeline
from vlab_jax.data.pieces import Prefetch, PrefetchMemory, free_shared_memory, pieces_at_once, plan_prefetch
from vlab_jax.data.tokenizer import train_bpe
from vlab_jax.errors import InputError

MIB, GIB = 2**20, 2**30


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


@given(
    sizes=sizes, gigabytes=st.floats(0.001, 64), shared=st.none() | st.integers(0, 64 * GIB), shares=st.integers(1, 16)
)
def test_a_plan_is_within_its_bounds_or_refused_where_no_worker_fits(sizes, gigabytes, shared, shares):
    memory = PrefetchMemory(gigabytes, shared, shares)
    batch, frame_bytes = sizes["batch"], sizes["frame_bytes"]
    try:
        plan = plan_prefetch(memory, **sizes)
    except InputError as error:
        assert "\n" not in str(error)
        least = pieces_at_once(1) * (frame_bytes + 4096)
        assert gigabytes * GIB / shares < 3 * least or shared / shares < least
        return
    assert 1 <= plan.workers <= sizes["workers"] and plan.piece >= 1
    assert held(plan, batch, frame_bytes) <= gigabytes * GIB / shares
    assert shared is None or pieces_at_once(plan.workers) * plan.piece * frame_bytes <= shared / shares
    assert plan.workers * plan.piece <= max(batch, plan.workers)  # all of them make a batch together
    assert plan.note or plan.workers == sizes["workers"]


def test_threads_are_refused_nothing():
    plan = plan_prefetch(PrefetchMemory(0.001, 0), batch=7, frame_bytes=64 * MIB, workers=0)
    assert plan == Prefetch(0, 1, ahead=False)


@pytest.mark.parametrize(
    ("memory", "line"),
    [
        (
            PrefetchMemory(8.0, 64 * MIB, 2),
            r"^/dev/shm, .*, has 64 MiB free and must have 129 MiB: make it larger \(in a container: --shm-size=8g\), "
            r"or decode in threads with --config\.data\.workers=0$",
        ),
        (
            PrefetchMemory(0.125, None, 2),
            r"^data\.prefetch_gigabytes=0\.125 is too little for clips of 10 MiB: set at least --config\.data\."
            r"prefetch_gigabytes=0\.1875, or decode in threads with --config\.data\.workers=0$",
        ),
    ],
)
def test_memory_for_less_than_one_worker_is_refused_in_one_line_that_says_what_to_do(memory, line):
    sizes = {"batch": 128, "frame_bytes": 64 * 224 * 224 * 3, "workers": 62}
    with pytest.raises(InputError, match=line):
        plan_prefetch(memory, **sizes)
    enough = PrefetchMemory(max(memory.gigabytes, 0.1875), memory.shared and 129 * MIB, 2)
    assert plan_prefetch(enough, **sizes)[:2] == (1, 1)


def test_where_shared_memory_is_small_pieces_and_workers_are_fewer_and_one_line_says_so():
    sizes = {"batch": 512, "frame_bytes": 8 * 224 * 224 * 3, "workers": 16}
    plan = plan_prefetch(PrefetchMemory(8.0, 64 * MIB), **sizes)
    assert plan[:3] == (10, 1, True)
    assert plan.note.startswith(
        "/dev/shm has 64 MiB free, less than data.prefetch_gigabytes=8: 10 of 16 worker processes"
    )
    assert "\n" not in plan.note
    assert plan_prefetch(PrefetchMemory(8.0, 32 * GIB), **sizes).note == ""
    few = plan_prefetch(PrefetchMemory(0.05), **sizes)
    assert few.note.startswith("data.prefetch_gigabytes=0.05 is enough for 8 of 16 worker processes; ")


def test_the_free_shared_memory_is_known_where_there_is_some():
    free = free_shared_memory()
    assert (free is not None) == pathlib.Path("/dev/shm").is_dir()


def test_both_kinds_of_configs_bound_the_memory_alike():
    bounds = {config().data.prefetch_gigabytes for config in (training_config, evaluation_config)}
    assert bounds == {PrefetchMemory().gigabytes}


def segments() -> list[int]:
    """Bytes of each segment of shared memory that belongs to this process."""
    sizes = []
    for path in pathlib.Path("/dev/shm").glob(f"{crash_guard.prefix_of(os.getpid())}*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # it was being removed
            continue
    return sizes


@pytest.mark.skipif(not pathlib.Path("/dev/shm").is_dir(), reason="no /dev/shm to look into")
@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_workers_that_are_ahead_stay_within_the_bound(kind):
    """64 clips of 192 KiB a batch, 12 MiB, and a bound of 20 MiB."""
    frames, memory = ProcessFrames(num_frames=64, size=32), PrefetchMemory(20 / 1024)
    options = {"batch_size": 64, "workers": 2, "memory": memory}
    if kind == "training":
        tokenizer = train_bpe(["a clip"], 300, 8)
        made = pipeline.training_batches([grey_clips(6)], [1.0], frames, tokenizer, seed=0, **options)
    else:
        made = pipeline.evaluation_batches(grey_clips(640), frames, **options)
    most = 0
    with made as batches:
        for batch in itertools.islice(batches, 5):
            assert batch["video"].shape == (64, 64, 32, 32, 3)
            assert batch["video"].flags.owndata  # not in shared memory
            deadline = time.monotonic() + 60
            while len(now := segments()) < 8 and time.monotonic() < deadline:  # until all buffers are full
                most = max(most, sum(now))
                time.sleep(0.002)
            most = max(most, sum(now))
            assert len(now) >= 8, "the workers were to get ahead"
    assert 8 * MIB < most < 20 * MIB
