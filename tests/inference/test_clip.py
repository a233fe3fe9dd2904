"""What a video may be given as, and what is refused, in one line that names it."""

import math
import pathlib

import numpy as np
import pytest
from numbered_video import SIDE, encode_image, numbered, numbered_video, read_numbers

from vlab_jax import Clip
from vlab_jax.data.video import decode_clip
from vlab_jax.errors import InputError
from vlab_jax.inference.clips import FrameShape, as_clip, is_video, local_path, show

FRAMES = FrameShape(5, SIDE)


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
    file = tmp_path / "a clip.mp4"
    file.write_bytes(numbered_video("mp4"))
    return file


def test_a_path_a_url_bytes_and_all_frames_show_the_same(path):
    expected = decode_clip(path.read_bytes(), num_frames=5, size=SIDE)
    assert read_numbers(expected) == [9, 29, 50, 70, 90]  # the outer ones of two around a centre
    url = "file://" + str(path).replace(" ", "%20")
    for given in (path, str(path), url, path.read_bytes(), Clip(str(path))):
        np.testing.assert_array_equal(show(as_clip(given), FRAMES), expected)
    every = np.stack([numbered(i) for i in range(100)])
    assert read_numbers(show(as_clip(every), FRAMES)) == read_numbers(expected)


def test_an_interval_is_in_seconds(path):
    clip = show(Clip(path, 2, 3), FrameShape(5, SIDE))
    assert read_numbers(clip) == [52, 57, 62, 67, 72]


def test_frames_are_resized_and_cropped_and_shown_again_where_there_are_too_few():
    wide = np.zeros((2, 40, 80, 3), np.uint8)
    wide[1] = 200
    shown = show(as_clip(wide), FrameShape(4, 20))
    assert shown.shape == (4, 20, 20, 3) and shown[:, 0, 0, 0].tolist() == [0, 0, 200, 200]
    picture = np.full((30, 30, 3), 7, np.uint8)
    assert (show(as_clip(picture), FrameShape(3, 20)) == 7).all()


def test_photographs_and_animations_are_videos():
    photo = encode_image(np.full((30, 50, 3), 90, np.uint8), "JPEG")
    assert np.abs(show(as_clip(photo), FRAMES).astype(int) - 90).max() <= 2
    assert read_numbers(show(as_clip(numbered_video("gif")), FRAMES)) == [9, 29, 50, 70, 90]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (7, "a video is a path, a file:// URL, bytes, or frames as a NumPy array, not of type int"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"frames are \[T, H, W, 3\], or .* not \[2, 3, 8, 8\]$"),
        (np.zeros((2, 2, 8, 8, 3), np.uint8), "several videos are given as a list"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"not \[0, 8, 8, 3\]"),
        (np.zeros((2, 8, 8, 3)), "frames are uint8, 0 to 255, not float64; convert them"),
    ],
)
def test_what_is_no_video_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        as_clip(given)


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
def test_a_file_that_cannot_be_shown_is_named(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("words\n" * 100)
    with pytest.raises(InputError, match=f"^[^\n]*{message}[^\n]*$"):
        show(as_clip(name), FRAMES)


def test_an_interval_that_holds_nothing_is_refused(path):
    for start, end in ((2.0, 2.0), (-1.0, 2.0), (3.0, 2.0), (math.nan, 2.0)):
        with pytest.raises(InputError, match="is empty or begins before 0"):
            Clip(path, start, end)
    with pytest.raises(InputError, match=r"a clip.mp4: .* lies outside the media, which ends at 4 s"):
        show(Clip(path, 5, 6), FRAMES)
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
    for given in ("misc/VID_20191220_170832.mp4", "misc/newtonscradle.gif", "tgif/1.gif"):
        shown = show(as_clip(folder / given), FrameShape(8, 32))
        assert shown.shape == (8, 32, 32, 3) and shown.std() > 10
    (photo, *_) = sorted((assets / "clip" / "images").glob("*.[jp][pn]g"))
    shown = show(as_clip(photo), FrameShape(8, 32))
    assert (shown == shown[0]).all() and shown.std() > 10
