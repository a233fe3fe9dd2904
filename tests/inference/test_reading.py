"""Videos are read in order, as they are needed, by worker processes where there are many."""

import itertools

import numpy as np
import pytest
from numbered_video import SIDE, encode, numbered, read_numbers

from vlab_jax.errors import InputError
from vlab_jax.inference import clips
from vlab_jax.inference.clips import FrameShape, read_clips

FRAMES = FrameShape(1, SIDE)


@pytest.fixture(scope="module")
def media() -> list[bytes]:
    return [encode([numbered(number)]) for number in range(6)]


@pytest.mark.parametrize("workers", [0, 1], ids=["here", "one process"])
def test_videos_come_in_order_and_what_is_wrong_stands_in_its_place(media, workers, monkeypatch):
    monkeypatch.setattr(clips, "FEW", 2)
    videos = [*media[:3], b"", 5, "/nowhere.mp4", *media[3:]]
    found = list(read_clips(videos, FRAMES, workers))
    shown = [read.frames for read in found if read.frames is not None]
    assert [read_numbers(frames)[0] for frames in shown] == list(range(6))
    assert [read.error for read in found[3:6]] == [
        "<0 bytes>: the media is empty (0 bytes)",
        "a video is a path, a file:// URL, bytes, or frames as a NumPy array, not of type int",
        "/nowhere.mp4: there is no such file",
    ]
    assert [read.name for read in found[3:6]] == ["<0 bytes>", "<int>", "/nowhere.mp4"]


def test_few_videos_and_frames_are_read_in_this_process(media, monkeypatch):
    asked = []
    plain = clips.map_in_order

    def here(function, items, workers, lost, seconds):
        asked.append(workers)
        return plain(function, items, 0, lost, seconds)

    monkeypatch.setattr(clips, "map_in_order", here)
    monkeypatch.setattr(clips, "FEW", 2)
    list(read_clips(media[:2], FRAMES, 3))
    list(read_clips([np.zeros((1, 8, 8, 3), np.uint8)] * 3, FRAMES, 3))
    list(read_clips(media[:3], FRAMES, 3))
    assert asked == [0, 0, 3]


def test_of_an_endless_iterator_only_what_is_needed_is_taken(media):
    taken = itertools.count()
    reads = read_clips((media[next(taken) % 6] for _ in itertools.count()), FRAMES, 0)
    assert [read_numbers(read.frames)[0] for read in itertools.islice(reads, 8)] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert next(taken) <= clips.FEW + 8


def test_an_error_of_the_program_is_no_error_of_the_video(media, monkeypatch):
    def broken(clip, frames):
        raise KeyError("a fault")

    monkeypatch.setattr(clips, "show", broken)
    with pytest.raises(KeyError):
        list(read_clips(media, FRAMES, 0))


def test_a_video_whose_process_ends_is_named():
    read = clips._lost("clip.mp4")
    assert (read.name, read.frames) == ("clip.mp4", None)
    assert read.error == "clip.mp4: the decoder crashed on it, or did not come back"
    with pytest.raises(InputError):
        clips._lost(5)
