"""Decoding costs what it must, and bytes that cannot be decoded fail in one way."""

import io
import math

import av
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from numbered_video import FORMATS, SIDE, encode, numbered, numbered_video, read_numbers

from vlab_jax.data import packets, video
from vlab_jax.data.media import MediaLimits, MediaReader
from vlab_jax.errors import InputError

# cost


@pytest.fixture(scope="module")
def minute() -> bytes:
    """60 s at 25 frames a second with a key frame every 4 s."""
    options = {"g": "100", "keyint_min": "100", "sc_threshold": "0", "bf": "2", "preset": "ultrafast"}
    return encode((numbered(i % 256) for i in range(1500)), options=options, rate=25)


@pytest.fixture
def fed(monkeypatch) -> list:
    """The packets that are handed to the decoder."""
    seen = []
    read = packets.Packets.read

    def counting(self, *place):
        for packet in read(self, *place):
            seen.append(packet)
            yield packet

    monkeypatch.setattr(packets.Packets, "read", counting)
    return seen


def test_seeking_decodes_from_the_key_frame_before_each_frame_only(minute, fed):
    # Centres are at 7.5, 22.5, 37.5 and 52.5 s, and key frames at every fourth second.
    clip = video.decode_clip(minute, num_frames=4, size=SIDE)
    expected = [187, 562, 937, 1312]
    assert read_numbers(clip) == [number % 256 for number in expected]
    needed = sum(number % 100 + 1 for number in expected)
    # A frame can be stored a few places before or after the frames that are shown around it.
    assert abs(len(fed) - needed) <= 4 * 4 and len(fed) < 1500 / 6


def test_dense_sampling_decodes_nothing_twice(minute, fed):
    video.decode_clip(minute, num_frames=150, size=SIDE)
    assert 1400 < len(fed) <= 1500


def test_short_interval_of_a_long_file_is_not_read_whole(minute):
    with packets.open_interval(MediaReader(minute, MediaLimits()), 50.5, 51.0) as interval:
        assert len(interval.packets.stamps) <= 90
        assert interval.stop == math.inf
    clip = video.decode_clip(minute, num_frames=2, size=SIDE, start=50.5, end=51.0)
    assert read_numbers(clip) == [(1262 + 3) % 256, (1262 + 9) % 256]


# what cannot be decoded


def sound() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="wav") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


BROKEN = {
    "empty": (b"", "empty"),
    "text": (b"These are words, not pictures.\n" * 20, "cannot be decoded"),
    "subtitles": (b"1\n00:00:01,000 --> 00:00:02,000\nhello\n\n" * 4, "not read here"),
    "sound": (sound(), "not read here"),
    "zeros": (bytes(5000), "cannot be decoded"),
    "unknown codec": (numbered_video("mkv").replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/XXX"), "no decoder"),
    "playlist": (b"ffconcat version 1.0\nfile beside.mp4\n", "not read here"),
    "header alone": (encode([numbered(0)])[:40], "."),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bytes_that_are_no_video_are_one_decode_error(name):
    media, reason = BROKEN[name]
    for attempt in (
        lambda: video.decode_clip(media, num_frames=2, size=SIDE),
        lambda: video.decode_clip(media, num_frames=2, size=SIDE, start=1.0, end=2.0),
        lambda: video.measure_duration(media),
    ):
        with pytest.raises(video.DecodeError, match=reason) as caught:
            attempt()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("start", "end"), [(4.5, 6.0), (100.0, math.inf), (3.0, 2.0), (2.0, 2.0), (-1.0, 2.0), (math.nan, 2.0)]
)
@pytest.mark.parametrize("name", ["mp4", "mkv", "avi-mpeg4", "mpg", "gif"])
def test_interval_outside_the_media_is_a_decode_error(name, start, end):
    with pytest.raises(video.DecodeError, match="interval"):
        video.decode_clip(numbered_video(name), num_frames=2, size=SIDE, start=start, end=end)


@pytest.mark.parametrize("ask", [{"num_frames": 0}, {"size": 0}, {"short": "loop"}])
def test_arguments_that_no_media_satisfies_are_input_errors(ask):
    with pytest.raises(InputError, match=next(iter(ask))):
        video.decode_clip(numbered_video("mp4"), **{"num_frames": 2, "size": 8, **ask})


@pytest.mark.parametrize("name", ["mkv", "ts", "mpg", "webm-vp9", "avi-mpeg4"])
def test_truncated_file_shows_the_frames_it_holds(name):
    media = numbered_video(name)
    shown = read_numbers(video.decode_clip(media[: len(media) // 2], num_frames=5, size=SIDE))
    assert shown == sorted(shown) and len(set(shown)) == 5 and shown[-1] < 80


def blanked(places: set[int]) -> bytes:
    """Ten numbered JPEGs in a Matroska file, some of whose packets are zeros: each frame stands alone."""
    media = encode([numbered(i) for i in range(10)], "matroska", "mjpeg", "yuvj420p")
    with av.open(io.BytesIO(media)) as container:
        coded = [bytes(packet) for packet in container.demux(video=0)]
    for place in places:
        assert media.count(coded[place]) == 1
        media = media.replace(coded[place], bytes(len(coded[place])))
    return media


def test_damaged_frame_shows_the_nearest_earlier_or_else_the_nearest_later():
    clip = video.decode_clip(blanked({0, 5, 6}), num_frames=10, size=SIDE)
    assert read_numbers(clip) == [1, 1, 2, 3, 4, 4, 4, 7, 8, 9]


def test_media_without_one_decodable_frame_is_a_decode_error():
    media = blanked(set(range(10)))
    for attempt in (lambda: video.decode_clip(media, num_frames=2, size=SIDE), lambda: video.measure_duration(media)):
        with pytest.raises(video.DecodeError, match="no frame"):
            attempt()


def test_time_stamps_that_the_decoder_contradicts_are_not_believed(monkeypatch):
    monkeypatch.setattr(packets, "_have_times", lambda *_: True)
    clip = video.decode_clip(numbered_video("avi-h264"), num_frames=10, size=SIDE)
    assert read_numbers(clip) == [4, 14, 24, 34, 44, 55, 65, 75, 85, 95]


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_damage_of_any_kind_decodes_or_is_a_decode_error(data):
    media = bytearray(numbered_video(data.draw(st.sampled_from(sorted(FORMATS)))))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    near = data.draw(st.sampled_from([200, len(media)]))  # headers are where damage surprises
    for place in rng.integers(0, min(near, len(media)), data.draw(st.integers(1, 30))):
        media[place] = rng.integers(0, 256)
    media = bytes(media[: data.draw(st.integers(1, len(media)))])
    try:
        clip = video.decode_clip(media, num_frames=3, size=8, start=data.draw(st.sampled_from([0.0, 2.5])))
    except video.DecodeError as error:
        assert "\n" not in str(error)
    else:
        assert clip.shape == (3, 8, 8, 3)
