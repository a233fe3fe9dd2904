"""No file takes more than it may: pixels, frames, seconds, bytes and time have limits, and what goes over is named."""

import argparse
import dataclasses
import io
import os
import time
import zlib

import av
import numpy as np
import pytest
from numbered_video import SIDE, encode, encode_image, numbered_video, read_numbers

from vlab_jax import config
from vlab_jax.data import media as limits
from vlab_jax.data import packets, pipeline, video
from vlab_jax.data.media import DecodeError, MediaLimits, MediaReader
from vlab_jax.data.tokenizer import train_bpe
from vlab_jax.datasets.records import read_file
from vlab_jax.errors import InputError

GREY = np.full((SIDE, SIDE, 3), 128, np.uint8)
LARGE = np.full((4 * SIDE, 4 * SIDE, 3), 128, np.uint8)


def refusal(media: bytes, **allowed: float) -> str:
    with pytest.raises(DecodeError) as caught:
        video.decode_clip(media, num_frames=2, size=SIDE, limits=MediaLimits(**allowed))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["mp4", "mkv", "avi-mpeg4", "mpg", "ts", "webm-vp9", "gif"])
def test_frames_with_more_pixels_than_allowed_are_refused_and_as_many_as_allowed_are_not(name):
    media = numbered_video(name)
    assert refusal(media, max_pixels=SIDE**2 - 1).endswith(
        f"a picture of {SIDE} x {SIDE} pixels, and data.limits.max_pixels allows 4,095"
    )
    with pytest.raises(DecodeError, match=r"max_pixels allows 4,095"):
        video.measure_duration(media, MediaLimits(max_pixels=SIDE**2 - 1))
    assert read_numbers(video.decode_clip(media, num_frames=2, size=SIDE, limits=MediaLimits(max_pixels=SIDE**2)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_photographs_are_refused_before_they_are_decoded(kind, monkeypatch):
    media = encode_image(GREY, kind)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert "64 x 64 pixels, and data.limits.max_pixels allows 4,000" in refusal(media, max_pixels=4000)


def test_a_small_file_that_claims_a_huge_picture_is_refused_at_once():
    header = (60_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    media = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + b"IHDR" + header + zlib.crc32(b"IHDR" + header).to_bytes(4)
    media += bytes(4) + b"IDAT" + zlib.crc32(b"IDAT").to_bytes(4)
    assert "60,000 x 60,000 pixels" in refusal(media) or "exceeds limit" in refusal(media)


@pytest.mark.parametrize(
    ("container", "codec"),
    [("h264", "libx264"), ("hevc", "libx265"), ("mpegvideo", "mpeg2video"), ("m4v", "mpeg4"), ("mjpeg", "mjpeg")],
)
def test_frames_that_grow_in_midstream_are_never_decoded(container, codec):
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    writer = "mpeg2video" if container == "mpegvideo" else container
    small, large = (encode([each] * 6, writer, codec, pix_fmt) for each in (GREY, np.tile(LARGE, (4, 4, 1))))
    allowed = MediaLimits(max_pixels=SIDE**2)
    try:
        clip = video.decode_clip(small + large, num_frames=12, size=SIDE, limits=allowed)
    except DecodeError as error:
        assert "1,024 x 1,024 pixels, and data.limits.max_pixels allows 4,096" in str(error)
    else:  # the decoder does not tell the size that it refuses: these frames count as damaged
        assert np.abs(clip.astype(int) - 128).max() < 5


def test_media_of_which_every_frame_is_larger_than_its_header_says_name_the_limit():
    small, large = (encode([each] * 3, "matroska", "mjpeg", "yuvj420p") for each in (GREY, LARGE))
    with av.open(io.BytesIO(large)) as container:
        frame = bytes(next(container.demux(video=0)))
    with packets.open_interval(MediaReader(small, MediaLimits(max_pixels=SIDE**2)), 0.0, 1.0) as lying:
        lying.packets._held[:] = [av.Packet(frame)]
        with pytest.raises(DecodeError, match=r"max_pixels(=4,096| allows 4,096)"):
            packets.with_decoded_times(lying)


def test_a_picture_of_one_line_is_not_resized_to_one_of_gigabytes():
    line = encode_image(np.full((1, 60_000, 3), 100, np.uint8), "PNG")
    assert "resized for a square of 64, the media has a picture of 64 x 3,840,000 pixels" in refusal(line)
    assert video.decode_clip(line, num_frames=1, size=1).shape == (1, 1, 1, 3)


def test_clips_of_too_many_frames_or_seconds_or_bytes_are_refused():
    media = numbered_video("mkv")
    assert "has 100 frames or more, and data.limits.max_frames allows 99" in refusal(media, max_frames=99)
    assert "lasts 4 s, and data.limits.max_seconds allows 3" in refusal(media, max_seconds=3)
    size = len(media)
    assert f"of {size:,} bytes, and data.limits.max_bytes allows {size - 1:,}" in refusal(media, max_bytes=size - 1)
    video.decode_clip(media, num_frames=1, size=8, limits=MediaLimits(max_frames=100, max_seconds=4.1, max_bytes=size))
    # An interval is held to the limits, not what lies around it.
    part = MediaLimits(max_frames=60, max_seconds=2.5)
    assert len(video.decode_clip(media, num_frames=1, size=8, start=1.0, end=2.0, limits=part)) == 1


def test_a_time_stamp_ages_away_does_not_make_stored_frames_without_end():
    stamps = [0, 1, 2, 4_000_000]
    media = encode([GREY] * 4, "matroska", "mjpeg", "yuvj420p", rate=100, stamps=stamps)
    form = {"start": 0.0, "end": float("inf"), "frame_rate": 4.0, "short_side": 32, "quality": 90}
    with pytest.raises(DecodeError, match=r"max_bytes allows 1,000,000"):
        video.store_frames(media, **form, limits=MediaLimits(max_bytes=1_000_000))
    with pytest.raises(DecodeError, match=r"max_frames allows 1,000"):
        video.store_frames(media, **form, limits=MediaLimits(max_frames=1000))
    with pytest.raises(DecodeError, match=r"max_seconds allows 1,000"):
        video.store_frames(media, **form, limits=MediaLimits(max_seconds=1000))


def test_a_clip_that_takes_too_long_is_refused_between_frames(monkeypatch):
    clock = iter(range(10**9))
    monkeypatch.setattr(limits.time, "thread_time", lambda: next(clock) / 10)
    reason = refusal(numbered_video("avi-h264"), decode_seconds=10)
    assert reason.startswith("the media takes longer to decode than it may: data.limits.decode_seconds allows 10 s")
    assert next(clock) < 120


def test_a_file_that_is_larger_than_allowed_is_not_read(tmp_path):
    (tmp_path / "a.mp4").write_bytes(bytes(1000))
    assert len(read_file(str(tmp_path / "a.mp4"), 1000)) == 1000
    with pytest.raises(OSError, match=r"larger than 999 bytes, which data\.limits\.max_bytes allows"):
        read_file(str(tmp_path / "a.mp4"), 999)
    with pytest.raises(OSError, match="larger than 5,000 bytes"):
        read_file("/dev/zero", 5000)


def test_limits_are_fields_of_the_config_and_flags_of_the_commands():
    given = config.training_config().data.limits
    assert MediaLimits(**given) == MediaLimits()
    assert {field.name for field in dataclasses.fields(MediaLimits)} == set(given)
    assert MediaLimits().max_pixels >= 7680 * 4320 * 1.1
    parser = argparse.ArgumentParser()
    limits.add_limit_flags(parser)
    told = vars(parser.parse_args(["--limits.max_pixels=100", "--limits.max_seconds=1.5"]))
    assert MediaLimits(**limits.limit_fields(told)) == MediaLimits(max_pixels=100, max_seconds=1.5)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(MediaLimits)])
def test_a_limit_of_nothing_is_refused_by_its_name(field):
    with pytest.raises(InputError, match=rf"data\.limits\.{field} is 0; it must be more than 0"):
        MediaLimits(**{field: 0})


# Decoders that do not come back


@dataclasses.dataclass(frozen=True)
class Treacherous(pipeline.FrameOptions):
    """Decodes grey frames, but for some clips: a decoder that crashes, and one that never returns."""

    def decode(self, clip, rng):
        if clip.media == b"crash":
            os.abort()
        if clip.media == b"hang":
            time.sleep(1000)
        if clip.media == b"broken":
            raise DecodeError("it is broken")
        return np.full((self.num_frames, self.size, self.size, 3), len(clip.media), np.uint8)


def clips(*media: bytes) -> list[dict]:
    asked = {"question": [], "answer": [], "type": [], "options": []}
    shared = {"start": 0.0, "end": float("inf"), "captions": [b"a clip"], "questions": asked}
    return [{"id": b"%d" % i, "media": each, **shared} for i, each in enumerate(media)]


def test_a_clip_that_hangs_is_named_and_every_other_is_decoded():
    asked = Treacherous(1, 4, limits=MediaLimits(decode_seconds=1.0))
    source = clips(b"1", b"hang", b"broken", b"4444")
    with pipeline.evaluation_batches(source, asked, batch_size=2, workers=1) as batches:
        made = list(batches)
    assert [int(i) for batch in made for i in batch["index"]] == [*range(4)]
    assert [int(frames[0, 0, 0, 0]) for batch in made for frames in batch["video"]] == [1, 0, 0, 4]
    hung = "1: it was not decoded within 2 s, after which its process was ended"
    assert [failure for batch in made for failure in batch["failures"]] == [hung, "2: it is broken"]


def test_training_goes_on_with_other_clips_as_if_the_one_that_crashed_could_not_be_decoded():
    def drawn(bad: bytes, workers: int) -> list[tuple]:
        source = clips(b"1", bad, b"333", b"4444")
        asked = Treacherous(1, 4, limits=MediaLimits(decode_seconds=60.0))
        tokenizer = train_bpe(["a clip"] * 4, 300, 8)
        with pipeline.training_batches(
            [source], [1.0], asked, tokenizer, batch_size=2, seed=3, workers=workers, first=1
        ) as batches:
            made = [next(batches) for _ in range(5)]
        return [(batch["ids"], [f.split(":")[0] for f in batch["failures"]]) for batch in made]

    crashed = drawn(b"crash", 1)
    assert crashed == drawn(b"broken", 0) and any(failures == ["1"] for _, failures in crashed)
