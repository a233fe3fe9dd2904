"""Encoded media decode to the right frames: by time, upright, in order."""

import io
import math
import pathlib
from fractions import Fraction

import av
import hypothesis
import hypothesis.strategies as st
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from numbered_video import (
    DELAYED,
    FORMATS,
    SIDE,
    encode,
    encode_image,
    media_info,
    numbered,
    numbered_video,
    read_numbers,
)

from vlab_jax.data import video


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_shows_the_centre_frames_in_order(name):
    clip = video.decode_clip(numbered_video(name), num_frames=10, size=SIDE)
    assert clip.shape == (10, SIDE, SIDE, 3) and clip.dtype == np.uint8
    assert read_numbers(clip) == [4, 14, 24, 34, 44, 55, 65, 75, 85, 95]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_shows_each_frame_once_where_all_are_asked(name):
    clip = video.decode_clip(numbered_video(name), num_frames=100, size=SIDE)
    assert read_numbers(clip) == list(range(100))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("start", "end"), [(2.2, 3.0), (0.0, 0.8), (3.2, math.inf), (3.2, 99.0)])
def test_interval_shows_its_own_frames(name, start, end):
    clip = video.decode_clip(numbered_video(name), num_frames=4, size=SIDE, start=start, end=end)
    first, last = round(start * 25), min(100, round(min(end, 9.0) * 25))
    centres = [first + (last - first) * (k + 0.5) / 4 for k in range(4)]
    delay = DELAYED.get(name, 0)
    for shown, centre in zip(read_numbers(clip), centres, strict=True):
        assert centre - 1.01 - delay <= shown <= centre + 0.01, (read_numbers(clip), centres)


@pytest.mark.parametrize("name", FORMATS)
def test_frames_equal_those_of_a_plain_sequential_decode(name):
    media = numbered_video(name)
    with av.open(io.BytesIO(media)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    clip = video.decode_clip(media, num_frames=6, size=SIDE, rng=np.random.default_rng(3))
    numbers = read_numbers(clip)
    assert numbers == sorted(numbers) and len(set(numbers)) == 6
    for number, frame in zip(numbers, clip, strict=True):
        assert 0 <= number < len(frames)
        np.testing.assert_array_equal(frame, frames[number])


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_its_size_its_frames_and_its_duration(name):
    info = media_info(numbered_video(name))
    assert info[:3] == (SIDE, SIDE, 100) and info.duration == pytest.approx(4.0, abs=0.02)
    assert video.measure_duration(numbered_video(name)) == info.duration


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
@pytest.mark.parametrize("count", [16, 17, 23, 48])
def test_reversed_video_shows_the_same_frames_in_reverse(container, count):
    options = {"bf": "2"} if container == "mp4" else {"bf": "0"}
    forward = encode([numbered(i) for i in range(count)], container, options=options)
    backward = encode([numbered(i) for i in reversed(range(count))], container, options=options)
    for num_frames in (4, 8, 16):
        shown = read_numbers(video.decode_clip(forward, num_frames=num_frames, size=SIDE))
        assert len(set(shown)) == num_frames
        assert shown == read_numbers(video.decode_clip(backward, num_frames=num_frames, size=SIDE))[::-1]


def test_odd_and_tiny_sizes_decode():
    for height, width in [(47, 65), (33, 2), (1, 1)]:
        pixels = np.full((height, width, 3), 130, np.uint8)
        media = encode([pixels] * 3, pix_fmt="yuv444p") if height > 1 else encode_image(pixels, "PNG")
        clip = video.decode_clip(media, num_frames=3, size=24)
        assert clip.shape == (3, 24, 24, 3)
        assert np.abs(clip.astype(int) - 130).max() <= 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_image_is_a_video_of_one_frame(kind):
    media = encode_image(numbered(0b10110), kind)
    clip = video.decode_clip(media, num_frames=3, size=SIDE)
    assert read_numbers(clip) == [0b10110] * 3
    assert media_info(media).num_frames == 1


def test_frames_before_an_edit_list_are_not_shown():
    media = encode([numbered(i) for i in range(60)], options={"bf": "3"}, shift=20)
    assert media_info(media).num_frames == 40
    assert read_numbers(video.decode_clip(media, num_frames=40, size=SIDE)) == list(range(20, 60))


# time


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_variable_frame_rate_is_sampled_by_time(container):
    # Twenty frames in the first second, then one every half second for four seconds.
    stamps = [*range(0, 100, 5), *range(100, 500, 50)]
    frames = [numbered(i) for i in range(len(stamps))]
    media = encode(frames, container, options={"bf": "2"}, rate=100, stamps=stamps)
    shown = read_numbers(video.decode_clip(media, num_frames=4, size=SIDE, start=0.0, end=4.5))
    assert shown == [11, 21, 23, 25]  # at 0.5625, 1.6875, 2.8125 and 3.9375 s
    assert shown != [3, 10, 17, 24]  # by index


def test_held_last_frame_of_a_gif_counts_by_time():
    images = [PIL.Image.fromarray(numbered(i)) for i in range(3)]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=[100, 100, 800])
    media = buffer.getvalue()
    assert video.measure_duration(media) == pytest.approx(1.0)
    assert read_numbers(video.decode_clip(media, num_frames=5, size=SIDE)) == [0, 2, 2, 2, 2]


@hypothesis.given(seed=st.integers(0, 2**32), num_frames=st.integers(1, 12))
@hypothesis.settings(max_examples=20, deadline=None)
def test_random_frames_stay_in_their_segments_and_repeat_for_a_seed(seed, num_frames):
    media = numbered_video("mp4")
    decoded = [
        video.decode_clip(media, num_frames=num_frames, size=SIDE, rng=np.random.default_rng(seed)) for _ in range(2)
    ]
    np.testing.assert_array_equal(*decoded)
    for segment, number in enumerate(read_numbers(decoded[0])):
        assert math.floor(100 * segment / num_frames) <= number <= 100 * (segment + 1) / num_frames


def test_short_clip_repeats_or_fails():
    media = encode([numbered(i) for i in range(3)])
    assert read_numbers(video.decode_clip(media, num_frames=6, size=SIDE)) == [0, 0, 1, 1, 2, 2]
    with pytest.raises(video.DecodeError, match="3 frames and 6 were asked"):
        video.decode_clip(media, num_frames=6, size=SIDE, short="fail")
    assert video.decode_clip(media, num_frames=3, size=SIDE, short="fail").shape[0] == 3


def test_short_clip_counts_the_frames_of_its_interval_alone():
    ask = {"num_frames": 6, "size": SIDE, "start": 1.0, "end": 1.2, "short": "fail"}
    with pytest.raises(video.DecodeError, match="5 frames and 6 were asked"):
        video.decode_clip(numbered_video("mp4"), **ask)


# geometry

CORNERS = np.array([[[250, 10, 10], [10, 250, 10]], [[10, 10, 250], [240, 240, 240]]], dtype=np.uint8)


def quadrants(height: int, width: int) -> np.ndarray:
    """Red, green / blue, white."""
    return np.repeat(np.repeat(CORNERS, height // 2, axis=0), width // 2, axis=1)


def read_corners(frame: np.ndarray) -> list[str]:
    side = frame.shape[0]
    names = ["red", "green", "blue", "white"]
    points = [(y, x) for y in (side // 4, 3 * side // 4) for x in (side // 4, 3 * side // 4)]
    distance = [np.abs(CORNERS.reshape(4, 3).astype(int) - frame[point]).sum(axis=1) for point in points]
    return [names[int(d.argmin())] for d in distance]


@pytest.mark.parametrize(
    ("rotation", "corners"),
    [
        (0, ["red", "green", "blue", "white"]),
        (90, ["green", "white", "red", "blue"]),
        (180, ["white", "blue", "green", "red"]),
        (-90, ["blue", "red", "white", "green"]),
    ],
)
def test_rotated_video_stands_upright(rotation, corners):
    """The display matrix of an mp4 turns counterclockwise (libavutil/display.h)."""
    media = encode([quadrants(96, 64)] * 4, rotation=rotation)
    clip = video.decode_clip(media, num_frames=2, size=32)
    assert read_corners(clip[0]) == read_corners(clip[1]) == corners
    info = media_info(media)
    assert (info.width, info.height) == ((64, 96) if rotation in (0, 180) else (96, 64))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photo_stands_upright_in_each_exif_orientation(orientation):
    media = encode_image(quadrants(64, 64), "JPEG", orientation)
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(media)))
    clip = video.decode_clip(media, num_frames=1, size=64)
    assert read_corners(clip[0]) == read_corners(np.asarray(upright))


def test_pixel_aspect_ratio_stretches_the_picture():
    # A centred 32 x 64 bar of a 96 x 64 picture whose pixels are twice as wide: 64 x 64 as shown.
    pixels = np.full((64, 96, 3), 20, np.uint8)
    pixels[:, 32:64] = 230
    media = encode([pixels] * 3, aspect=Fraction(2, 1))
    info = media_info(media)
    assert (info.width, info.height) == (192, 64)
    assert video.decode_clip(media, num_frames=1, size=64)[0, :, 4:-4].min() > 190
    turned = encode([pixels] * 3, aspect=Fraction(2, 1), rotation=90)
    assert media_info(turned)[:2] == (64, 192)
    assert video.decode_clip(turned, num_frames=1, size=64)[0, 4:-4].min() > 190


@pytest.mark.parametrize(("height", "width", "size"), [(64, 96, 64), (50, 77, 32), (77, 50, 33), (20, 31, 40)])
def test_resize_and_crop_equal_clips_preprocessing(height, width, size):
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    short, long = min(height, width), max(height, width)
    new = (size, int(size * long / short))
    image = PIL.Image.fromarray(frame).resize(new if width == short else new[::-1], PIL.Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2.0) for side in image.size)
    expected = np.asarray(image.crop((left, top, left + size, top + size)))
    np.testing.assert_array_equal(video.resize_and_crop(frame, size), expected)


def test_frame_of_the_right_short_side_is_not_resampled():
    frame = np.random.default_rng(0).integers(0, 256, (32, 41, 3), dtype=np.uint8)
    np.testing.assert_array_equal(video.resize_and_crop(frame, 32), frame[:, 4:36])


# lists of frames


def test_list_of_frames_decodes_only_the_chosen(monkeypatch):
    jpegs = [encode_image(numbered(i), "JPEG") for i in range(40)]
    seen = []
    plain = video.resize_and_crop
    monkeypatch.setattr(video, "resize_and_crop", lambda frame, *args: seen.append(frame) or plain(frame, *args))
    clip = video.decode_clip(jpegs, num_frames=4, size=SIDE)
    assert read_numbers(clip) == [4, 14, 25, 35]
    assert len(seen) == 4
    assert read_numbers(video.decode_clip(tuple(jpegs[:2]), num_frames=4, size=SIDE)) == [0, 0, 1, 1]


def test_damaged_frame_of_a_list_shows_the_nearest_earlier():
    jpegs = [encode_image(numbered(i), "JPEG") for i in range(4)]
    jpegs[2] = b"not a picture"
    assert read_numbers(video.decode_clip(jpegs, num_frames=4, size=SIDE)) == [0, 1, 1, 3]
    jpegs[0] = b""
    assert read_numbers(video.decode_clip(jpegs, num_frames=4, size=SIDE)) == [1, 1, 1, 3]
    with pytest.raises(video.DecodeError, match="none of the 3 frames"):
        video.decode_clip([b"", b"x", b"y"], num_frames=2, size=SIDE)
    with pytest.raises(video.DecodeError, match="has no frames"):
        video.decode_clip([], num_frames=2, size=SIDE)
    with pytest.raises(video.DecodeError, match="4 frames and 5 were asked"):
        video.decode_clip(jpegs, num_frames=5, size=SIDE, short="fail")


# real files


def real_files(assets: pathlib.Path) -> list[pathlib.Path]:
    folder = assets / "videos"
    found = [p for sub in ("misc", "msvd", "tgif") for p in sorted((folder / sub).iterdir()) if p.suffix != ".json"]
    return found + sorted(folder.glob("fight/*/*.mp4"))[::20]


def reference_frames(path: pathlib.Path) -> tuple[list[av.VideoFrame], list[Fraction], Fraction]:
    """Every frame decoded in order, with its time and the end of the last: nothing of the code under test."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        times = [frame.pts * stream.time_base for frame in frames]
        if times != sorted(set(times)):  # one AVI's stamps are out of order; its rate is constant
            assert path.suffix == ".avi"
            times = [i / stream.average_rate for i in range(len(frames))]
        return frames, times, times[-1] + frames[-1].duration * stream.time_base


def reference_square(frame: av.VideoFrame, aspect: float, size: int) -> np.ndarray:
    image = frame.to_image()
    sides = (round(image.width * aspect), image.height)
    resized = [size if side == min(sides) else int(side * size / min(sides)) for side in sides]
    left, top = (round((side - size) / 2.0) for side in resized)
    image = image.resize(resized, PIL.Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def reference_clip(path: pathlib.Path, num_frames: int, size: int) -> np.ndarray:
    frames, times, end = reference_frames(path)
    with av.open(str(path)) as container:
        aspect = float(container.streams.video[0].sample_aspect_ratio or 1)
    chosen = []
    for k in range(num_frames):
        outward = -1e-4 if 2 * k + 1 < num_frames else 1e-4
        time = times[0] + (end - times[0]) * (2 * k + 1) / (2 * num_frames) + outward
        chosen.append(max(i for i, t in enumerate(times) if t <= time))
    return np.stack([reference_square(frames[i], aspect, size) for i in chosen])


def test_every_real_file_equals_its_sequential_decode(assets):
    files = real_files(assets)
    assert {p.suffix for p in files} >= {".mp4", ".mkv", ".avi", ".mpg", ".gif"} and len(files) >= 24
    for path in files:
        clip = video.decode_clip(path.read_bytes(), num_frames=6, size=48)
        np.testing.assert_array_equal(clip, reference_clip(path, 6, 48), err_msg=path.name)


def test_real_interval_equals_the_same_time_of_the_whole(assets):
    for name in (
        "misc/bikes.mp4",
        "misc/flipping_a_pancake.mkv",
        "misc/cityCC0.mpg",
        "misc/v_GGSY1Qvo990.mp4",
    ):
        media = (assets / "videos" / name).read_bytes()
        info = media_info(media)
        whole = video.decode_clip(media, num_frames=9, size=32, end=info.duration)
        third = info.duration / 3
        part = video.decode_clip(media, num_frames=3, size=32, start=2 * third, end=3 * third)
        np.testing.assert_array_equal(part, whole[6:], err_msg=name)


def test_real_phone_video_decodes_as_its_matrix_says(assets):
    """This portrait-named phone clip carries no rotation: its stored landscape picture is upright."""
    info = media_info((assets / "videos/misc/VID_20191220_170832.mp4").read_bytes())
    assert info[:3] == (1920, 1080, 41)
    assert info.duration == pytest.approx(136570 / 90000)
