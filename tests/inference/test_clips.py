"""Every form of a video becomes the same frames, in order; bad ones are named; long ones are cut into windows."""

import itertools
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_video import SIDE, encode, encode_image, numbered, numbered_video, read_numbers

from vlab_jax import Clip
from vlab_jax.data.video import decode_clip
from vlab_jax.errors import InputError
from vlab_jax.inference import clips
from vlab_jax.inference.clips import (
    FrameShape,
    Window,
    as_clip,
    cut_into_windows,
    is_video,
    load_clips,
    load_frames,
    local_path,
)

FRAMES, ONE_FRAME = FrameShape(5, SIDE), FrameShape(1, SIDE)
SECONDS = st.floats(0.04, 120)


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
    file = tmp_path / "a clip.mp4"
    file.write_bytes(numbered_video("mp4"))
    return file


def test_a_path_a_url_bytes_and_all_frames_show_the_same(path):
    expected = decode_clip(path.read_bytes(), num_frames=5, size=SIDE)
    assert read_numbers(expected) == [9, 29, 50, 70, 90]  # the outer ones of two around a centre
    url = "file://" + str(path).replace(" ", "%20")
    for form in (path, str(path), url, path.read_bytes(), Clip(str(path))):
        np.testing.assert_array_equal(load_frames(as_clip(form), FRAMES), expected)
    every = np.stack([numbered(i) for i in range(100)])
    assert read_numbers(load_frames(as_clip(every), FRAMES)) == read_numbers(expected)


def test_an_interval_is_in_seconds(path):
    clip = load_frames(Clip(path, 2, 3), FrameShape(5, SIDE))
    assert read_numbers(clip) == [52, 57, 62, 67, 72]


def test_frames_are_resized_and_cropped_and_repeated_where_there_are_too_few():
    wide = np.zeros((2, 40, 80, 3), np.uint8)
    wide[1] = 200
    shown = load_frames(as_clip(wide), FrameShape(4, 20))
    assert shown.shape == (4, 20, 20, 3) and shown[:, 0, 0, 0].tolist() == [0, 0, 200, 200]
    picture = np.full((30, 30, 3), 7, np.uint8)
    assert (load_frames(as_clip(picture), FrameShape(3, 20)) == 7).all()


def test_photographs_and_animations_are_videos():
    photo = encode_image(np.full((30, 50, 3), 90, np.uint8), "JPEG")
    assert np.abs(load_frames(as_clip(photo), FRAMES).astype(int) - 90).max() <= 2
    assert read_numbers(load_frames(as_clip(numbered_video("gif")), FRAMES)) == [9, 29, 50, 70, 90]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "a video is a path, a file:// URL, bytes, or frames as a NumPy array, not of type int"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"frames are \[T, H, W, 3\], or .* not \[2, 3, 8, 8\]$"),
        (np.zeros((2, 2, 8, 8, 3), np.uint8), "several videos are given as a list"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"not \[0, 8, 8, 3\]"),
        (np.zeros((2, 8, 8, 3)), "frames are uint8, 0 to 255, not float64; convert them"),
    ],
)
def test_a_value_that_is_no_video_is_refused(value, message):
    with pytest.raises(InputError, match=message):
        as_clip(value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("there_is_none.mp4", "there_is_none.mp4: there is no such file"),
        ("folder", "folder: this is a folder; name the files in it"),
        ("empty.mp4", r"empty.mp4: the media is empty \(0 bytes\)"),
        ("notes.txt", "notes.txt: the media cannot be decoded: "),
        ("https://example.org/a.mp4", "https://example.org/a.mp4: nothing is fetched from the network; download it"),
        ("file://a.mp4", "a file URL has three slashes before its path"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("words\n" * 100)
    with pytest.raises(InputError, match=f"^[^\n]*{message}[^\n]*$"):
        load_frames(as_clip(name), FRAMES)


def test_an_interval_that_holds_nothing_is_refused(path):
    for start, end in ((2.0, 2.0), (-1.0, 2.0), (3.0, 2.0), (math.nan, 2.0)):
        with pytest.raises(InputError, match="is empty or begins before 0"):
            Clip(path, start, end)
    with pytest.raises(InputError, match=r"a clip.mp4: .* lies outside the media, which ends at 4 s"):
        load_frames(Clip(path, 5, 6), FRAMES)
    with pytest.raises(InputError, match="frames have no times"):
        Clip(np.zeros((2, 8, 8, 3), np.uint8), 1, 2)


def test_several_videos_are_told_from_one():
    one = ["a.mp4", pathlib.Path("a"), b"", np.zeros((1, 2, 2, 3)), Clip("a"), 7]
    assert all(map(is_video, one)) and not any(map(is_video, [[], ("a",), iter("ab"), {"a"}]))


def test_a_path_with_a_colon_is_a_path():
    assert local_path("c:/a.mp4") == pathlib.Path("c:/a.mp4")
    assert local_path("a b://c") == pathlib.Path("a b://c")


def test_real_media_are_shown_upright(assets):
    """A portrait video of a phone, a GIF, a photograph."""
    folder = assets / "videos"
    for name in ("misc/VID_20191220_170832.mp4", "misc/newtonscradle.gif", "tgif/1.gif"):
        shown = load_frames(as_clip(folder / name), FrameShape(8, 32))
        assert shown.shape == (8, 32, 32, 3) and shown.std() > 10
    (photo, *_) = sorted((assets / "clip" / "images").glob("*.[jp][pn]g"))
    shown = load_frames(as_clip(photo), FrameShape(8, 32))
    assert (shown == shown[0]).all() and shown.std() > 10


@pytest.fixture(scope="module")
def media() -> list[bytes]:
    return [encode([numbered(number)]) for number in range(6)]


@pytest.mark.parametrize("workers", [0, 1], ids=["in process", "one worker"])
def test_videos_come_in_order_and_errors_in_their_places(media, workers, monkeypatch):
    monkeypatch.setattr(clips, "MAX_IN_PROCESS", 2)
    videos = [*media[:3], b"", 5, "/nowhere.mp4", *media[3:]]
    found = list(load_clips(videos, ONE_FRAME, workers))
    shown = [read.frames for read in found if read.frames is not None]
    assert [read_numbers(frames)[0] for frames in shown] == list(range(6))
    assert [read.error for read in found[3:6]] == [
        "<0 bytes>: the media is empty (0 bytes)",
        "a video is a path, a file:// URL, bytes, or frames as a NumPy array, not of type int",
        "/nowhere.mp4: there is no such file",
    ]
    assert [read.name for read in found[3:6]] == ["<0 bytes>", "<int>", "/nowhere.mp4"]


def test_few_videos_and_arrays_are_read_in_this_process(media, monkeypatch):
    requested = []
    plain = clips.map_in_order

    def in_process(function, items, workers, on_crash, seconds):
        requested.append(workers)
        return plain(function, items, 0, on_crash, seconds)

    monkeypatch.setattr(clips, "map_in_order", in_process)
    monkeypatch.setattr(clips, "MAX_IN_PROCESS", 2)
    list(load_clips(media[:2], ONE_FRAME, 3))
    list(load_clips([np.zeros((1, 8, 8, 3), np.uint8)] * 3, ONE_FRAME, 3))
    list(load_clips(media[:3], ONE_FRAME, 3))
    assert requested == [0, 0, 3]


def test_only_as_many_items_of_an_endless_iterator_are_taken_as_needed(media):
    taken = itertools.count()
    reads = load_clips((media[next(taken) % 6] for _ in itertools.count()), ONE_FRAME, 0)
    assert [read_numbers(read.frames)[0] for read in itertools.islice(reads, 8)] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert next(taken) <= clips.MAX_IN_PROCESS + 8


def test_a_bug_of_the_program_is_not_taken_for_an_error_of_the_video(media, monkeypatch):
    def broken(clip, frames):
        raise KeyError("a fault")

    monkeypatch.setattr(clips, "load_frames", broken)
    with pytest.raises(KeyError):
        list(load_clips(media, ONE_FRAME, 0))


def test_a_video_that_crashes_its_worker_is_named():
    read = clips._crashed_clip("clip.mp4")
    assert (read.name, read.frames) == ("clip.mp4", None)
    assert read.error == "clip.mp4: the decoder crashed on it, or did not finish in time"
    with pytest.raises(InputError):
        clips._crashed_clip(5)


# Windows


@settings(deadline=None)
@given(begin=st.floats(0, 100), length=SECONDS, window=st.floats(0.5, 60), share=st.floats(0.1, 1))
def test_windows_cover_the_video_without_gaps_in_order(begin, length, window, share):
    windows = cut_into_windows(begin, begin + length, window, window * share)
    assert windows[0].start == begin and windows[-1].end == begin + length
    for one, other in itertools.pairwise(windows):
        assert one.start < other.start <= one.end + 1e-5


@settings(deadline=None)
@given(length=SECONDS, window=st.floats(0.5, 60), share=st.floats(0.1, 1))
def test_windows_are_half_to_one_and_a_half_times_as_long_as_requested_and_whole_ones_exactly(length, window, share):
    windows = cut_into_windows(0.0, length, window, window * share)
    if length < window:
        assert windows == [Window(0.0, length)]
        return
    assert all(abs(each.end - each.start - window) < 1e-6 for each in windows[:-1])
    assert 0.5 * window - 1e-4 <= windows[-1].end - windows[-1].start < 1.5 * window + 1e-4


@pytest.mark.parametrize(
    ("length", "window", "stride", "cuts"),
    [
        (30, 10, 10, [(0, 10), (10, 20), (20, 30)]),
        (34, 10, 10, [(0, 10), (10, 20), (20, 34)]),
        (36, 10, 10, [(0, 10), (10, 20), (20, 30), (30, 36)]),
        (17, 10, 5, [(0, 10), (5, 15), (10, 17)]),
        (0.04, 10, 10, [(0, 0.04)]),
    ],
)
def test_the_rest_of_a_video_is_a_window_where_it_is_half_of_one(length, window, stride, cuts):
    assert cut_into_windows(0, length, window, stride) == cuts


@pytest.mark.parametrize(("window", "stride"), [(0, 1), (-1, 1), (10, 0), (float("inf"), 1), (float("nan"), 1), (5, 6)])
def test_windows_that_would_lose_something_are_refused(window, stride):
    with pytest.raises(InputError):
        cut_into_windows(0, 100, window, stride)
