"""An open file is decoded as its bytes are, and packets that are too many to hold are read again."""

import io
import math
import os
import pathlib
import threading
import tracemalloc

import numpy as np
import pytest
from numbered_video import FORMATS, SIDE, encode, encode_image, numbered, numbered_video

from vlab_jax.data import packets, video
from vlab_jax.data.media import MediaLimits, MediaReader
from vlab_jax.data.media import opened as opened_path

INTERVALS = ((0.0, math.inf), (0.45, 0.95))


@pytest.fixture
def opened(tmp_path):
    """Media as a file that is open, at a place that nobody should rely on."""
    files = []

    def write(media: bytes) -> io.BufferedReader:
        path = tmp_path / str(len(files))
        path.write_bytes(media)
        files.append(path.open("rb"))
        files[-1].seek(7)
        return files[-1]

    yield write
    for file in files:
        file.close()


def decoded(media, interval=(0.0, math.inf), frames: int = 5) -> np.ndarray:
    return video.decode_clip(media, num_frames=frames, size=SIDE, start=interval[0], end=interval[1])


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("name", FORMATS)
def test_an_open_file_shows_what_its_bytes_show(name, interval, opened):
    media = numbered_video(name)
    np.testing.assert_array_equal(decoded(opened(media), interval), decoded(media, interval))
    assert video.measure_duration(opened(media)) == video.measure_duration(media)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_open_photograph_shows_what_its_bytes_show(kind, opened):
    media = encode_image(numbered(9), kind, 6)
    np.testing.assert_array_equal(decoded(opened(media)), decoded(media))
    assert video.measure_duration(opened(media)) == video.measure_duration(media)


def test_an_open_file_of_no_bytes_is_refused(opened):
    with pytest.raises(video.DecodeError, match=r"the media is empty \(0 bytes\)"):
        decoded(opened(b""))


@pytest.mark.parametrize("held", [0, 4000])
@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("name", FORMATS)
def test_packets_that_are_too_many_to_hold_show_the_same_frames(name, interval, held, monkeypatch, opened):
    media = numbered_video(name)
    expected, few = decoded(media, interval), decoded(media, interval, frames=2)
    monkeypatch.setattr(packets, "_MOST_HELD", held)
    np.testing.assert_array_equal(decoded(opened(media), interval), expected)
    np.testing.assert_array_equal(decoded(media, interval, frames=2), few)


def test_packets_read_again_are_those_that_were_read(monkeypatch):
    media = numbered_video("mp4")
    with packets.open_interval(MediaReader(media, MediaLimits()), 0.0, math.inf) as interval:
        expected = [bytes(packet) for packet in interval.packets.read()]
    monkeypatch.setattr(packets, "_MOST_HELD", 0)
    with packets.open_interval(MediaReader(media, MediaLimits()), 0.0, math.inf) as interval:
        again = interval.packets
        assert len(again.stamps) == len(expected)
        for first, stop in ((3, 6), (6, 9), (8, 12), (0, len(expected)), (5, 5)):  # on, and back
            assert [bytes(packet) for packet in again.read(first, stop)] == expected[first:stop]


def test_a_damaged_file_shows_the_same_frames_with_packets_read_again(monkeypatch):
    media = bytearray(numbered_video("mp4"))
    middle = len(media) // 2
    media[middle : middle + 300] = bytes(300)
    expected = decoded(bytes(media))
    monkeypatch.setattr(packets, "_MOST_HELD", 0)
    np.testing.assert_array_equal(decoded(bytes(media)), expected)


def test_every_real_file_shows_the_same_frames_with_packets_read_again(assets, monkeypatch):
    files = sorted(path for path in (assets / "videos").rglob("*") if path.suffix in (".mp4", ".avi", ".mpg", ".webm"))
    chosen: list[pathlib.Path] = files[:: max(len(files) // 12, 1)]
    assert chosen
    for path in chosen:
        with path.open("rb") as media:
            expected = decoded(media)
            with monkeypatch.context() as patched:
                patched.setattr(packets, "_MOST_HELD", 1000)
                np.testing.assert_array_equal(decoded(media), expected, err_msg=path.name)


def test_an_open_file_is_never_in_memory_whole(monkeypatch, opened):
    rng = np.random.default_rng(0)
    noise = (rng.integers(0, 256, (240, 320, 3), np.uint8) for _ in range(60))
    media = encode(noise, options={"g": "1", "qp": "4", "preset": "ultrafast"}, rate=10)
    file, size = opened(media), len(media)
    del media
    monkeypatch.setattr(packets, "_MOST_HELD", 2**20)
    tracemalloc.start()
    decoded(file, frames=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 4


def test_what_comes_out_of_a_pipe_is_decoded(tmp_path):
    media, pipe = numbered_video("mp4"), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(media,))
    writer.start()
    with opened_path(pipe) as found:
        np.testing.assert_array_equal(decoded(found), decoded(media))
    writer.join()
