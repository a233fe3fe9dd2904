"""Packets that are not kept are read again, and the same frames come of them."""

import pathlib

import numpy as np
import pytest
from numbered_video import FORMATS, SIDE, encode_image, numbered, numbered_video

from vlab_jax.data import packet_list
from vlab_jax.data.packets import open_interval
from vlab_jax.data.video import decode_clip


@pytest.fixture
def nothing_kept(monkeypatch) -> None:
    monkeypatch.setattr(packet_list, "KEPT", 0)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_shows_the_same_frames_with_nothing_kept(name, tmp_path, monkeypatch):
    media = numbered_video(name)
    (tmp_path / "clip").write_bytes(media)
    for interval in ({}, {"start": 1.3, "end": 2.1}, {"start": 3.5}):
        expected = decode_clip(media, num_frames=6, size=SIDE, **interval)
        with monkeypatch.context() as patched:
            patched.setattr(packet_list, "KEPT", 0)
            for given in (tmp_path / "clip", media):
                np.testing.assert_array_equal(decode_clip(given, num_frames=6, size=SIDE, **interval), expected)


def test_a_slice_is_the_packets_and_an_item_says_what_one_is(tmp_path, nothing_kept):
    (tmp_path / "clip").write_bytes(numbered_video("mkv"))
    with open_interval(tmp_path / "clip", 0.0, 4.0) as interval:
        assert not interval.packets.kept and len(interval.packets) == 100
        assert all(isinstance(each, packet_list.Note) for each in interval.packets)
        for part in (slice(0, 3), slice(20, 45), slice(None), slice(90, 100), slice(5, 5)):
            notes = list(interval.packets)[part]
            again = list(interval.packets[part])
            assert [(each.pts, each.size) for each in again] == [(each.pts, each.size) for each in notes]
            assert all(len(bytes(each)) == each.size for each in again)


def test_few_packets_are_kept(tmp_path):
    (tmp_path / "clip").write_bytes(numbered_video("mp4"))
    with open_interval(tmp_path / "clip", 0.0, 4.0) as interval:
        assert interval.packets.kept and list(interval.packets[3:5]) == list(interval.packets)[3:5]


def test_a_photograph_is_read_from_its_path(tmp_path: pathlib.Path):
    media = encode_image(numbered(9), "JPEG")
    (tmp_path / "photo").write_bytes(media)
    expected = decode_clip(media, num_frames=2, size=SIDE)
    np.testing.assert_array_equal(decode_clip(tmp_path / "photo", num_frames=2, size=SIDE), expected)
