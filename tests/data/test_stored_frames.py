"""Clips as lists of JPEGs: which frames are stored, how they look, and that they read as the media itself does."""

import io
import math
import pathlib
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import numpy as np
import PIL.Image
import pytest
from numbered_video import SIDE, encode, encode_image, numbered, numbered_video, read_number, read_numbers

from vlab_jax.data import video

FORM = {"start": 0.0, "end": math.inf, "frame_rate": 4.0, "short_side": 256, "quality": 90}


def store(media: bytes, **form) -> list[bytes]:
    return video.store_frames(media, **{**FORM, **form})


def pixels(jpeg: bytes) -> np.ndarray:
    image = PIL.Image.open(io.BytesIO(jpeg))
    assert image.format == "JPEG"
    return np.asarray(image.convert("RGB"))


def numbers(jpegs: list[bytes]) -> list[int]:
    return [read_number(pixels(jpeg)) for jpeg in jpegs]


def test_the_frame_at_the_centre_of_each_part_is_stored():
    centres = [int((part + 0.5) * 100 / 16) for part in range(16)]  # 4 s at 4 a second, out of 100 frames
    assert numbers(store(numbered_video("mp4"))) == centres
    assert numbers(store(numbered_video("avi-h264"))) == centres
    assert numbers(store(numbered_video("mp4"), start=1.0, end=2.0)) == [28, 34, 40, 46]
    assert numbers(store(numbered_video("mp4"), start=3.5)) == [90, 96]  # parts of 6.25 frames


def test_a_clip_shorter_than_a_part_keeps_one_frame():
    assert numbers(store(numbered_video("mp4"), start=2.0, end=2.2)) == [52]
    assert numbers(store(numbered_video("mp4"), frame_rate=0.1)) == [50]


def test_no_frame_of_a_constant_rate_is_stored_twice():
    assert numbers(store(numbered_video("mp4"), frame_rate=1000.0)) == list(range(100))
    slow = encode([numbered(i) for i in range(10)], rate=2)
    assert numbers(store(slow)) == list(range(10))


def test_a_variable_rate_is_stored_by_time():
    stamps = [*range(0, 100, 5), *range(100, 500, 50)]  # 20 frames in a second, then 2 a second for 4 seconds
    media = encode([numbered(i) for i in range(28)], "matroska", options={"bf": "2"}, rate=100, stamps=stamps)
    shown = numbers(store(media, end=4.0))
    # Sixteen parts of a quarter of a second; after the first second each frame is shown in two of them.
    assert shown == [2, 7, 12, 17] + [20, 20, 21, 21, 22, 22, 23, 23, 24, 24, 25, 25]


@pytest.mark.parametrize("count", [17, 48])
def test_a_reversed_video_is_stored_in_reverse(count):
    forward = encode([numbered(i) for i in range(count)], options={"bf": "2"})
    backward = encode([numbered(i) for i in reversed(range(count))], options={"bf": "2"})
    for rate in (4.0, 7.0, 15.0):
        one, other = (np.array(numbers(store(media, frame_rate=rate))) for media in (forward, backward))
        differ = np.flatnonzero(one != other[::-1]).tolist()
        # The middle one of an odd number falls between the two middle frames of an even number, and is the later.
        assert len(one) > 1 and differ in ([], [len(one) // 2] if len(one) % 2 > count % 2 else [])


@hypothesis.given(num_frames=st.integers(1, 12), rate=st.sampled_from([3.0, 4.0, 10.0]), seed=st.integers(0, 99))
@hypothesis.settings(max_examples=15, deadline=None)
def test_stored_frames_are_read_as_near_to_the_medias_as_their_rate_allows(num_frames, rate, seed):
    media, apart = numbered_video("mp4"), 25 / rate
    jpegs = store(media, frame_rate=rate)
    ask = {"num_frames": num_frames, "size": SIDE}
    direct, stored = (read_numbers(video.decode_clip(clip, **ask)) for clip in (media, jpegs))
    assert all(abs(a - b) <= apart / 2 + 1 for a, b in zip(direct, stored, strict=True)), (direct, stored)
    drawn = read_numbers(video.decode_clip(jpegs, **ask, rng=np.random.default_rng(seed)))
    assert drawn == sorted(drawn)
    for segment, number in enumerate(drawn):
        low, high = (100 * bound / num_frames for bound in (segment, segment + 1))
        assert low - apart <= number <= high + apart


# geometry


@pytest.mark.parametrize(
    ("height", "width", "shown"), [(480, 640, (256, 341)), (640, 480, (341, 256)), (20, 30, (20, 30))]
)
def test_the_short_side_comes_down_and_never_up(height, width, shown):
    media = encode([np.full((height, width, 3), 90, np.uint8)] * 2)
    assert {pixels(jpeg).shape[:2] for jpeg in store(media)} == {shown}


def test_pixels_are_stored_square():
    media = encode([np.full((64, 96, 3), 90, np.uint8)] * 2, aspect=Fraction(2, 1))
    assert pixels(store(media)[0]).shape == (64, 192, 3)
    assert pixels(store(media, short_side=32)[0]).shape == (32, 96, 3)


def test_a_rotated_video_is_stored_upright():
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:, :48] = 230  # bright on the left
    stored = pixels(store(encode([picture] * 3, rotation=90))[0])  # counterclockwise: left comes down
    assert stored.shape == (96, 64, 3)
    assert stored[:40].max() < 60 and stored[56:].min() > 190


def test_a_photo_is_one_frame_upright_and_small_ones_stay_as_they_are():
    photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    as_it_is = encode_image(photo, "JPEG")
    assert store(as_it_is) == [as_it_is]
    turned = encode_image(photo, "JPEG", orientation=6)
    assert [pixels(jpeg).shape for jpeg in store(turned)] == [(60, 40, 3)]
    assert [pixels(jpeg).shape for jpeg in store(as_it_is, short_side=20)] == [(20, 30, 3)]
    assert [pixels(jpeg).shape for jpeg in store(encode_image(photo, "PNG"), frame_rate=100.0)] == [(40, 60, 3)]


# errors


@pytest.mark.parametrize(
    ("media", "form", "words"),
    [
        (numbered_video("mp4"), {"start": 5.0, "end": 9.0}, r"\[5 s, 9 s\) lies outside the media, which ends at 4 s"),
        (numbered_video("mp4"), {"start": 2.0, "end": 2.0}, "is empty"),
        (numbered_video("mp4")[:200], {}, "cannot be decoded"),
        (b"not a video", {}, "cannot be decoded"),
        (b"", {}, "0 bytes"),
        (encode_image(np.zeros((9, 9, 3), np.uint8), "JPEG"), {"start": 3.0}, "lies outside"),
    ],
)
def test_what_cannot_be_stored_is_said_in_one_line(media, form, words):
    with pytest.raises(video.DecodeError, match=words) as caught:
        store(media, **form)
    assert "\n" not in str(caught.value)


# real files


def test_every_real_file_is_stored_as_direct_decoding_shows_it(assets):
    """Within JPEG's error: as many frames are asked of the media, and nothing is resized twice."""
    folder = assets / "videos"
    files = [p for sub in ("misc", "msvd", "tgif") for p in sorted((folder / sub).iterdir()) if p.suffix != ".json"]
    files += [*sorted(folder.glob("fight/*/*.mp4"))[::40], *sorted((assets / "clip/images").iterdir())[:2]]
    assert {p.suffix for p in files} >= {".mp4", ".mkv", ".avi", ".mpg", ".gif"} and len(files) >= 26
    for path in files:
        media = pathlib.Path(path).read_bytes()
        jpegs = store(media, frame_rate=1.0, short_side=64, end=3.0)
        direct = video.decode_clip(media, num_frames=len(jpegs), size=64, end=3.0)
        stored = video.decode_clip(jpegs, num_frames=len(jpegs), size=64)
        error = np.abs(direct.astype(int) - stored)
        assert error.mean() < 6 and np.percentile(error, 99) < 40, (path.name, error.mean(), np.percentile(error, 99))
        for row in direct[:: max(1, len(jpegs) // 3)]:  # and not another frame
            assert len(jpegs) == 1 or np.abs(row.astype(int) - stored).mean(axis=(1, 2, 3)).min() < 6
