"""Batches: a function of seed and number alone, complete, shared out over processes, and honest about broken clips."""

import collections
import itertools
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from listed_source import DeadlySource, ListedSource, ProcessFrames, StampedFrames, grey_clips

from vlab_jax.data import batches as batches_ahead
from vlab_jax.data import pipeline, schema
from vlab_jax.data import sources as mixtures
from vlab_jax.data.batches import Batch
from vlab_jax.data.crash_guard import default_workers
from vlab_jax.data.tokenizer import train_bpe
from vlab_jax.datasets import registry
from vlab_jax.datasets.records import BuildOptions
from vlab_jax.errors import InputError, RunStopped

FRAMES = pipeline.FrameOptions(num_frames=2, size=8)
STAMPS = StampedFrames(num_frames=2, size=2)
TOKENIZER = train_bpe(["clip one two three 0 1 2 3 4 5 6 7 8 9"], vocab_size=280, context_length=16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Any:
    """The training split of `motion/tiny`: 48 clips of 24 H.264 frames, with four captions each."""
    return registry.open_split("motion/tiny", "train", BuildOptions(str(tmp_path_factory.mktemp("data"))))


def draw(sources: list, count: int, *, batch_size: int = 4, seed: int = 0, **options: Any) -> list[Batch]:
    """The first batches of an iterator."""
    weights = options.pop("weights", [1.0] * len(sources))
    frames, tokenizer = options.pop("frames", STAMPS), options.pop("tokenizer", TOKENIZER)
    with pipeline.training_batches(
        sources, weights, frames, tokenizer, batch_size=batch_size, seed=seed, **options
    ) as batches:
        return [{key: np.array(value) for key, value in batch.items()} for batch in itertools.islice(batches, count)]


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other) > 0
    for first, second in zip(one, other, strict=True):
        assert first.keys() == second.keys() == {"video", "tokens", "lengths", "clip", "ids", "failures"}
        for key in first:
            assert first[key].dtype == second[key].dtype and np.array_equal(first[key], second[key]), key


def differ(one: list[Batch], other: list[Batch], key: str) -> bool:
    return any(not np.array_equal(a[key], b[key]) for a, b in zip(one, other, strict=True))


def names(tokens: np.ndarray) -> list[str]:
    """The clips that captions are of, from their words (`clip 3 two`)."""
    return ["-".join(TOKENIZER.decode(row).split()[:2]) for row in tokens]


# What a batch is


def test_a_batch_has_frames_as_bytes_tokens_of_its_own_captions_and_one_id_a_clip(tiny):
    tokenizer = train_bpe(["a red circle moves left"], vocab_size=300, context_length=128)
    frames = pipeline.FrameOptions(num_frames=4, size=32)
    (batch,) = draw([tiny], 1, batch_size=6, frames=frames, tokenizer=tokenizer)
    assert batch["video"].dtype == np.uint8 and batch["video"].shape == (6, 4, 32, 32, 3)
    assert batch["tokens"].dtype == batch["lengths"].dtype == batch["clip"].dtype == np.int32
    assert batch["tokens"].shape == (6, 128) and batch["failures"].size == 0
    clips = {int(mixtures.clip_hash(clip.id)): clip for clip in map(schema.from_example, tiny)}
    for number, row, length in zip(batch["clip"], batch["tokens"], batch["lengths"], strict=True):
        captions = [caption.lower() for caption in clips[int(number)].captions]
        assert tokenizer.decode(row) in captions
        assert row[length - 1] == tokenizer.end and not row[length:].any()


def test_an_id_is_the_same_number_in_every_process_and_on_every_machine():
    assert [int(mixtures.clip_hash(name)) for name in ("", "clip-1", "日本")] == [634351890, -580979325, -1159772210]
    assert len({int(mixtures.clip_hash(f"clip-{i}")) for i in range(2000)}) == 2000


# A function of seed and number


@pytest.mark.parametrize("first", [1, 3, 14])
def test_starting_at_a_number_yields_what_an_uninterrupted_iterator_yields_there(tiny, first):
    """14 batches of 4 are more than an epoch of 48 clips."""
    assert_same(draw([tiny], 2, first=first, frames=FRAMES), draw([tiny], first + 2, frames=FRAMES)[first:])


def test_any_number_of_workers_yields_the_same_batches(tiny):
    sources, options = [tiny, grey_clips(5)], {"weights": [0.7, 0.3], "frames": FRAMES}
    alone = draw(sources, 7, **options)
    assert_same(draw(sources, 7, workers=1, **options), alone)
    assert_same(draw(sources, 5, workers=2, first=2, **options), alone[2:])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_bound_on_memory_yields_the_same_batches(tiny, workers):
    """By the bound, a piece has 5 clips (2 with two workers), or 1 and none is made ahead."""
    sources, options = [tiny, grey_clips(5, broken=(1,))], {"weights": [0.7, 0.3], "batch_size": 11, "frames": FRAMES}
    whole = draw(sources, 3, **options)
    least = pipeline.PrefetchMemory(gigabytes=0.001, shares=10)
    assert any(len(batch["failures"]) for batch in whole)
    assert_same(draw(sources, 3, workers=workers, memory=least, **options), whole)


def test_all_workers_take_part_in_the_first_batch():
    """Each clip's frames say which process decoded it."""
    with pipeline.training_batches(
        [grey_clips(8)], [1.0], ProcessFrames(1, 2), TOKENIZER, batch_size=8, seed=0, workers=2
    ) as batches:
        batch = next(batches)
        decoded = {int(number) for number in batch["video"].reshape(8, -1)[:, :8].copy().view(np.uint64).ravel()}
        assert decoded == {process.pid for process in multiprocessing.active_children()}


def test_another_seed_yields_other_clips_frames_and_captions(tiny):
    one, other, again = (draw([tiny], 3, seed=seed, frames=FRAMES) for seed in (0, 1, 0))
    assert all(differ(one, other, key) for key in ("clip", "video", "tokens"))
    assert_same(again, one)


@settings(max_examples=10, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    share=st.integers(1, 3),
    processes=st.sampled_from([1, 2, 4]),
    first=st.integers(0, 12),
    seed=st.integers(0, 2**31 - 1),
)
def test_batches_of_processes_together_are_the_batch_of_one_process_from_any_number_on(
    sizes, share, processes, first, seed
):
    sources = [grey_clips(size, prefix=f"set{place}") for place, size in enumerate(sizes)]
    options = {"batch_size": share * processes, "seed": seed}
    whole = draw(sources, first + 2, **options)[first:]
    parts = [draw(sources, 2, first=first, process=p, processes=processes, **options) for p in range(processes)]
    assert all(len(batch["clip"]) == share for part in parts for batch in part)
    joined = [
        {key: np.concatenate([b[key] for b in batches]) for key in whole[0]} for batches in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


# Epochs and mixtures


def test_every_epoch_of_a_source_holds_every_clip_once_in_another_order():
    batches = draw([grey_clips(12)], 9)
    epochs = [np.concatenate([batch["clip"] for batch in batches[i : i + 3]]).tolist() for i in (0, 3, 6)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 12 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_epochs_draw_other_frames_and_other_captions_of_a_clip():
    seen = collections.defaultdict(set)
    for batch in draw([grey_clips(4)], 12, frames=FRAMES):
        for number, video, row in zip(batch["clip"], batch["video"], batch["tokens"], strict=True):
            levels = tuple(video[:, 0, 0, 0].tolist())
            assert levels[0] < 110 < levels[1]  # one frame of each half: random within segments
            seen[int(number)].add((levels, TOKENIZER.decode(row)))
    assert len(seen) == 4
    for drawn in seen.values():
        assert len({levels for levels, _ in drawn}) > 3 and len({caption for _, caption in drawn}) == 3


def test_a_mixture_honours_its_weights_and_repeats_the_small_source():
    sources = [grey_clips(50, prefix="large"), grey_clips(3, prefix="small")]
    batches = draw(sources, 100, batch_size=6, weights=[0.75, 0.25])
    drawn = collections.Counter(name for batch in batches for name in names(batch["tokens"]))
    small = sum(count for name, count in drawn.items() if name.startswith("small"))
    assert abs(small / drawn.total() - 0.25) < 0.01 and drawn.total() == 600
    assert [drawn[f"small-{i}"] for i in range(3)] == [50, 50, 50]
    assert all(drawn[f"large-{i}"] == 9 for i in range(50))
    mixed = [len({name.split("-")[0] for name in names(batch["tokens"])}) for batch in batches]
    assert np.mean(mixed) > 1.5  # within batches, not one source after the other


def test_weights_need_not_add_up_to_one():
    sources = [grey_clips(4, prefix="a"), grey_clips(4, prefix="b")]
    assert_same(draw(sources, 5, weights=[3.0, 1.0]), draw(sources, 5, weights=[0.75, 0.25]))


def test_equal_ids_in_two_data_sets_are_two_clips_and_in_configurations_of_one_the_same():
    sources = [grey_clips(3), grey_clips(3)]  # with the same ids

    def clips_of(*specs: str) -> int:
        (batch,) = draw(sources, 1, batch_size=6, datasets=mixtures.dataset_names(specs))
        alone = {int(mixtures.clip_hash(f"clip-{place}")) for place in range(3)}
        assert alone <= {*batch["clip"].tolist()}  # those of the first as where it stands alone
        return len({*batch["clip"].tolist()})

    assert clips_of("msrvtt/captioning", "msrvtt/retrieval_9k") == 3
    assert clips_of("msrvtt", "msvd") == clips_of("folder:/a", "folder:/a/b") == 6


def test_an_empty_source_and_a_batch_that_does_not_divide_are_refused():
    with pytest.raises(InputError, match=r"^a training split is empty"):
        draw([grey_clips(2), ListedSource([])], 1)
    with pytest.raises(InputError, match=r"^a batch of 6 clips does not divide over 4 processes$"):
        draw([grey_clips(2)], 1, batch_size=6, processes=4)


# Clips that cannot be decoded


def test_a_clip_that_cannot_be_decoded_is_replaced_by_one_of_its_source_and_named():
    sources = [grey_clips(6, prefix="good"), grey_clips(6, prefix="mixed", broken=(2, 4))]
    batches = draw(sources, 12, batch_size=4)  # two epochs of each
    drawn = collections.Counter(name for batch in batches for name in names(batch["tokens"]))
    assert not {"mixed-2", "mixed-4"} & drawn.keys()
    assert sum(count for name, count in drawn.items() if name.startswith("good")) == drawn.total() / 2 == 24
    failures = collections.Counter(str(failure).split(": ")[0] for batch in batches for failure in batch["failures"])
    assert failures.keys() == {"mixed-2", "mixed-4"} and min(failures.values()) >= 2
    assert all(len(str(failure).split(": ")) > 1 for batch in batches for failure in batch["failures"])
    assert_same(draw(sources, 4, first=5), batches[5:9])  # the clips in their place are the same every time


def test_a_clip_without_captions_is_for_questions_alone():
    asked = (schema.Question("what is it?", "clip one"),)
    source = ListedSource([schema.ClipRecord("asked", schema.from_example(grey_clips(1)[0]).media, (), asked)])
    with pytest.raises(InputError, match=r"^clip 'asked' has no caption to learn from; "):
        draw([source], 1, batch_size=1, frames=FRAMES, questions=1)
    (batch,) = draw([source], 1, batch_size=1, frames=FRAMES, questions=1, captions=False)
    assert batch["question_lengths"][0] > batch["answer_starts"][0] and batch["lengths"].tolist() == [2]


def test_a_clip_s_questions_come_along_each_once_and_nothing_is_learned_where_it_has_too_few():
    asked = tuple(schema.Question("what is it?", f"clip {number}", kind) for number, kind in enumerate("aab"))
    media = schema.from_example(grey_clips(1)[0]).media
    source = ListedSource([schema.ClipRecord("asked", media, ("clip one",), asked)])
    for batch in draw([source], 8, batch_size=1, frames=FRAMES, questions=4, without=("b",)):
        starts, lengths = batch["answer_starts"][0], batch["question_lengths"][0]
        answers = [
            TOKENIZER.decode(row[start:]) for row, start in zip(batch["question_tokens"][0], starts, strict=True)
        ]
        assert sorted(answers[:2]) == ["clip 0", "clip 1"]
        assert ((lengths > starts) == [True, True, False, False]).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_where_nothing_can_be_decoded_the_caller_gets_one_line(workers):
    source = grey_clips(5, broken=range(5))
    with pytest.raises(InputError, match=r"^10 clips in a row cannot be decoded; the last: clip-\d: [^\n]+$"):
        draw([source], 1, workers=workers, frames=FRAMES)
    assert not multiprocessing.active_children()


def test_more_frames_than_the_media_has_are_repeated_or_refused_as_asked(tiny):
    (batch,) = draw([tiny], 1, frames=pipeline.FrameOptions(num_frames=30, size=8))
    assert batch["video"].shape[1] == 30
    with pytest.raises(InputError, match=r"the last: train-\d+: the clip has 24 frames and 30 were asked$"):
        draw([tiny], 1, frames=pipeline.FrameOptions(num_frames=30, size=8, short="fail"))


def test_failures_are_logged_once_a_clip_and_counted_every_time(caplog):
    count = pipeline.FailureCount(limit=0.01)
    with caplog.at_level(logging.WARNING):
        count.update(96, ["a: no frames"])
        count.update(97, ["a: no frames", "b: truncated"])
        count.update(100, [])
    assert (count.seen, count.failed) == (296, 3)
    logged = [record.getMessage() for record in caplog.records]
    assert logged == [f"skipped a clip that cannot be decoded: {name}" for name in ("a: no frames", "b: truncated")]


def test_failures_over_the_limit_stop_with_one_line():
    count = pipeline.FailureCount(limit=0.01)
    count.update(90, [f"clip-{i}: no frames" for i in range(10)])  # 10 of the first 1,000 are allowed
    with pytest.raises(
        InputError,
        match=r"^11 of 201 clips could not be decoded, more than data\.max_failed_share=0\.01; the last: x: torn$",
    ):
        count.update(100, ["x: torn"])
    many = pipeline.FailureCount(limit=0.01, seen=99_000, failed=989)  # as restored from a checkpoint
    many.update(990, ["x: torn"] * 10)
    with pytest.raises(InputError, match=r"^1001 of 100002 clips"):
        many.update(0, ["x: torn"] * 2)


def test_failures_of_all_processes_are_judged_together():
    counts = [pipeline.FailureCount(limit=0.01, seen=500, failed=2, whole=2000) for _ in range(2)]
    for count, failures in zip(counts, ([], ["a: torn"] * 11), strict=True):
        count.update(700 - len(failures), failures)
    told = []
    counts[1].join(lambda own: told.append(own) or [(700, 0, ""), own])
    assert told == [(700, 11, "a: torn")] and (counts[1].seen, counts[1].failed) == (1900, 13)
    counts[1].join(lambda own: [(0, 0, ""), own])  # nothing new
    assert (counts[1].seen, counts[1].failed) == (1900, 13)
    with pytest.raises(InputError, match=r"^21 of 1908 clips .*; the last: b: torn$"):
        counts[1].join(lambda own: [(8, 8, "b: torn"), own])


# Evaluation


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_shows_every_clip_once_in_order_and_marks_what_is_not_one(workers):
    source = grey_clips(10, broken=(3, 9))
    with pipeline.evaluation_batches(source, FRAMES, batch_size=4, workers=workers) as iterator:
        batches = [{key: np.array(value) for key, value in batch.items()} for batch in iterator]
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]
    assert np.concatenate([batch["valid"] for batch in batches]).tolist() == [
        i in {0, 1, 2, 4, 5, 6, 7, 8} for i in range(12)
    ]
    for batch in batches:
        assert batch["video"].shape == (4, 2, 8, 8, 3) and batch["video"].dtype == np.uint8
        assert batch["valid"].dtype == bool and batch["index"].dtype == np.int32
    assert not batches[0]["video"][3].any() and batches[0]["video"][2].any()
    named = [str(failure).split(": ")[0] for batch in batches for failure in batch["failures"]]
    assert named == ["clip-3", "clip-9"]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_an_evaluation(processes):
    shares = []
    for process in range(processes):
        share = {"process": process, "processes": processes}
        with pipeline.evaluation_batches(grey_clips(10), FRAMES, batch_size=4, **share) as batches:
            shares.append([batch["index"].tolist() for batch in batches])
    whole = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]
    assert shares == [whole[process::processes] for process in range(processes)]


def test_evaluation_takes_the_middle_of_each_segment_every_time():
    def levels() -> Iterator[np.ndarray]:
        with pipeline.evaluation_batches(grey_clips(3), FRAMES, batch_size=3) as batches:
            yield from (batch["video"][:, :, 0, 0, 0] for batch in batches)

    (once,), (again,) = levels(), levels()
    assert np.array_equal(once, again)
    assert np.abs(once.astype(int) - [[30, 180]] * 3).max() <= 2  # frames 1 and 6 of 8: see `sampling`


# Worker processes


def batches_of(source: ListedSource, workers: int) -> pipeline.Batches:
    return pipeline.training_batches([source], [1.0], STAMPS, TOKENIZER, batch_size=2, seed=0, workers=workers)


def test_no_worker_process_outlives_its_iterator():
    with pytest.raises(ZeroDivisionError), batches_of(grey_clips(6), 2) as batches:
        next(batches)
        assert len(multiprocessing.active_children()) == 2
        raise ZeroDivisionError
    assert not multiprocessing.active_children()
    batches.close()
    assert next(batches, "closed") == "closed"

    dropped = batches_of(grey_clips(6), 1)
    next(dropped)
    assert len(multiprocessing.active_children()) == 1
    del dropped
    assert not multiprocessing.active_children()


def test_a_worker_process_that_the_system_ends_is_replaced_and_the_batches_are_the_same(caplog):
    expected = [batch["ids"] for batch in itertools.islice(batches_of(grey_clips(6), 0), 12)]
    with batches_of(grey_clips(6), 1) as batches:
        got = [next(batches)["ids"]]
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        got += [next(batches)["ids"] for _ in range(11)]
        (other,) = multiprocessing.active_children()
        assert other.pid != worker.pid
    assert got == expected
    assert [each.getMessage() for each in caplog.records] == [
        "a worker process that decodes was ended with exit code -9; another makes its part of the batch anew"
    ]
    assert not multiprocessing.active_children()


def test_worker_processes_that_die_over_and_over_stop_the_run_in_one_line(monkeypatch):
    monkeypatch.setattr(batches_ahead, "MOST_DEATHS", 1)
    source = DeadlySource([schema.ClipRecord("clip", b"", ("deadly",))])  # no clip is at work yet when the process ends
    with (
        pipeline.training_batches([source], [1.0], FRAMES, TOKENIZER, batch_size=1, seed=0, workers=1) as batches,
        pytest.raises(
            RunStopped, match=r"^a worker process that decodes was ended with exit code -6, 2 times [^\n]*workers=1$"
        ),
    ):
        next(batches)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("cores", "asked", "processes", "workers"),
    [(8, -1, 1, 6), (2, -1, 1, 1), (1, -1, 1, 1), (200, -1, 1, 198), (200, -1, 8, 24), (8, -1, 8, 1), (8, 0, 1, 0)]
    + [(8, 3, 1, 3), (8, 3, 8, 3)],
)
def test_two_cores_are_left_and_the_others_shared_by_processes_unless_workers_are_asked_for(
    monkeypatch, cores, asked, processes, workers
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert default_workers(asked, processes) == workers


@given(st.lists(st.sampled_from("abc"), max_size=9))
def test_no_type_of_question_comes_twice_before_each_came_once(types):
    questions = [schema.Question(f"{number}", "", kind) for number, kind in enumerate(types)]
    ordered = pipeline._alternate_types(questions)
    assert sorted(ordered, key=str) == sorted(questions, key=str)
    rounds = [[each.type for each in ordered[:place]].count(each.type) for place, each in enumerate(ordered)]
    assert rounds == sorted(rounds)
    for kind in set(types):  # of one type, the order is as drawn
        assert [each for each in ordered if each.type == kind] == [each for each in questions if each.type == kind]
