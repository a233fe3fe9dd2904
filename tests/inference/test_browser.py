"""What browsers can play: files that are sent as they are, and clips and pictures that are made of others."""

import numpy as np
import pytest
from numbered_video import encode, media_info, numbered_video, read_number
from PIL import Image

from vlab_jax.data import video
from vlab_jax.data.media import DecodeError
from vlab_jax.inference import browser
from vlab_jax.inference.browser import Moment, Moments, write_clip


@pytest.fixture
def moments(tmp_path):
    (tmp_path / "made").mkdir()
    return Moments(tmp_path / "made")


def grey(width, height, count):
    return [np.full((height, width, 3), 99, np.uint8)] * count


@pytest.mark.parametrize("name", ["mkv", "ts", "mpg", "avi-h264", "gif", "webm-vp9", "mp4"])
def test_a_clip_begins_with_the_frame_of_its_start_and_ends_before_its_end(tmp_path, name):
    (tmp_path / "source").write_bytes(numbered_video(name))
    write_clip(tmp_path / "clip.mp4", tmp_path / "source", 1.0, 3.0)
    shown = video.decode_clip((tmp_path / "clip.mp4").read_bytes(), num_frames=30, size=64)
    numbers = [read_number(frame) for frame in shown]
    # Two seconds of 25 frames, of which 15 a second are shown; the decoder's own tests say how exact its times are.
    assert abs(numbers[0] - 25) <= 2 and abs(numbers[-1] - 74) <= 3 and numbers == sorted(numbers)


def test_a_clip_is_bounded_in_length_and_size(tmp_path):
    source, target = tmp_path / "source", tmp_path / "clip.mp4"
    source.write_bytes(encode(grey(1600, 600, 20), rate=10))
    write_clip(target, source, 0.0, float("inf"))
    found = media_info(target.read_bytes())
    assert (found.width, found.height) == (640, 240) and found.duration == pytest.approx(2.0, abs=0.1)
    source.write_bytes(encode(grey(32, 32, 100), rate=1))
    write_clip(target, source, 10.0, float("inf"))
    assert video.measure_duration(target.read_bytes()) == pytest.approx(browser.MAX_SECONDS, abs=0.1)


@pytest.mark.parametrize(
    ("name", "mime"),
    [
        ("mp4", "video/mp4"),
        ("webm-vp8", "video/webm"),
        ("webm-vp9", "video/webm"),
        ("mkv", ""),
        ("avi-h264", ""),
        ("gif", ""),
    ],
)
def test_files_are_judged_by_what_is_in_them(tmp_path, name, mime):
    path = tmp_path / f"clip.{name.partition('-')[0]}"
    path.write_bytes(numbered_video(name))
    assert Moment(path, path.name).browser_type == mime


def test_a_playlist_named_mp4_opens_no_other_file(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(numbered_video("mp4"))
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    assert Moment(tmp_path / "list.mp4", "list.mp4").browser_type == ""


def test_an_mp4_that_browsers_do_not_decode_becomes_one_that_they_do(tmp_path, moments):
    (tmp_path / "old.mp4").write_bytes(encode(grey(32, 32, 10), "mp4", "mpeg4"))
    (tmp_path / "deep.mp4").write_bytes(encode(grey(32, 32, 10), "mp4", "libx264", "yuv444p"))
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    for name in ("old.mp4", "deep.mp4"):
        path, mime = moments.file(moments.add(Moment(tmp_path / name, name)))
        assert mime == "video/mp4" and path.parent == tmp_path / "made" and browser._browser_type(path) == mime
    with pytest.raises(DecodeError):
        moments.file(moments.add(Moment(tmp_path / "bad.mp4", "bad.mp4")))
    assert len(list((tmp_path / "made").iterdir())) == 2


def test_an_image_becomes_a_jpeg(tmp_path, moments):
    Image.new("RGB", (2000, 1000), (220, 30, 30)).save(tmp_path / "scan.tif")
    path, mime = moments.file(moments.add(Moment(tmp_path / "scan.tif", "scan.tif")))
    with Image.open(path) as image:
        assert (mime, image.format, image.size) == ("image/jpeg", "JPEG", (1280, 640))


def test_clips_are_made_once_and_the_oldest_are_deleted(tmp_path, moments, monkeypatch):
    monkeypatch.setattr(browser, "MAX_MOMENTS", 2)
    (tmp_path / "clip.mkv").write_bytes(numbered_video("mkv"))
    first, second, third = (Moment(tmp_path / "clip.mkv", "clip", start, start + 1.0) for start in (0.0, 1.0, 2.0))
    token = moments.add(first)
    path, _ = moments.file(token)
    made = path.stat()
    moments.add(second)
    assert moments.add(first) == token and moments.file(token)[0].stat() == made
    moments.file(moments.add(third))
    assert moments.file(token)[0].stat() == made  # the second was the oldest
    moments.add(second)
    moments.add(third)
    assert not path.exists()
    with pytest.raises(KeyError):
        moments.file(token)
