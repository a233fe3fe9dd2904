"""Videos for the tests of decoding, in many formats: each frame shows its number."""

import functools
import io
import math
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
import PIL.Image

from vlab_jax.data import video

SIDE = 64
BITS = 8

# container, codec, pixel format, encoder options; all but one have B-frames or their like
FORMATS = {
    "mp4": ("mp4", "libx264", "yuv420p", {"bf": "3", "g": "20"}),
    "mp4-open-gop": ("mp4", "libx264", "yuv420p", {"x264-params": "open-gop=1:bframes=3:keyint=20"}),
    "mkv": ("matroska", "libx264", "yuv420p", {"bf": "2", "g": "20"}),
    "ts": ("mpegts", "libx264", "yuv420p", {"bf": "3", "g": "20"}),
    "mpg": ("mpeg", "mpeg2video", "yuv420p", {"bf": "2", "g": "15", "b": "4000000"}),
    "avi-mpeg4": ("avi", "mpeg4", "yuv420p", {"bf": "2", "g": "20", "b": "4000000"}),
    "avi-h264": ("avi", "libx264", "yuv420p", {"bf": "3", "g": "20"}),
    "webm-vp8": ("webm", "libvpx", "yuv420p", {"g": "20", "auto-alt-ref": "1", "lag-in-frames": "10"}),
    "webm-vp9": ("webm", "libvpx-vp9", "yuv420p", {"g": "20", "auto-alt-ref": "1", "cpu-used": "8"}),
    "raw-h264": ("h264", "libx264", "yuv420p", {"bf": "2", "g": "20"}),
    "gif": ("gif", "gif", "rgb8", {}),
}
# what an encoder's delay or an unknown clock adds to a frame's time, in frames
DELAYED = {"avi-mpeg4": 1, "avi-h264": 2}


def numbered(number: int) -> np.ndarray:
    """A frame that shows its number: eight stripes, dark or bright, are its bits."""
    bits = [(number >> bit) & 1 for bit in range(BITS)]
    row = np.repeat(np.array(bits, dtype=np.uint8) * 215 + 20, SIDE // BITS)
    return np.broadcast_to(row[None, :, None], (SIDE, SIDE, 3)).copy()


def read_number(frame: np.ndarray) -> int:
    columns = frame[:, SIDE // BITS // 2 :: SIDE // BITS].mean(axis=(0, 2))
    return sum(int(value > 128) << bit for bit, value in enumerate(columns))


def read_numbers(clip: np.ndarray) -> list[int]:
    return [read_number(frame) for frame in clip]


def encode(
    frames,
    container="mp4",
    codec="libx264",
    pix_fmt="yuv420p",
    options=None,
    *,
    rate=30,
    stamps=None,
    rotation=0,
    aspect=None,
    shift=0,
    tags=None,
) -> bytes:
    """A video of these frames; `stamps` are in 1/`rate` s, `shift` frames go before the start, `tags` are of colour."""
    frames = list(frames)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        coded = []
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = stamps[number] if stamps else number
            frame.time_base = Fraction(1, rate)
            coded += stream.encode(frame)
        coded += stream.encode(None)
        for packet in coded:
            if shift:
                packet.pts -= round(shift / rate / packet.time_base)
                packet.dts -= round(shift / rate / packet.time_base)
            output.mux(packet)
    return buffer.getvalue()


def encode_image(pixels: np.ndarray, kind: str, orientation: int = 1) -> bytes:
    image = PIL.Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(
        buffer,
        kind,
        **({} if kind == "GIF" else {"exif": exif}),
        **({"quality": 95} if kind == "JPEG" else {}),
    )
    return buffer.getvalue()


@functools.cache
def numbered_video(name: str) -> bytes:
    """100 numbered frames at 25 frames a second, in one of the formats."""
    container, codec, pix_fmt, options = FORMATS[name]
    return encode([numbered(i) for i in range(100)], container, codec, pix_fmt, options, rate=25)


class MediaInfo(NamedTuple):
    """The upright picture in square pixels, the number of frames, and the seconds that they last."""

    width: int
    height: int
    num_frames: int
    duration: float


def media_info(media: bytes) -> MediaInfo:
    """What decoding shows of a media file."""
    found = []

    def choose(times: np.ndarray, stop: float) -> np.ndarray:
        found[:] = len(times), stop - float(times[0])
        return np.zeros(1, np.int64)

    def size(frame: np.ndarray, aspect: float) -> tuple[int, int]:
        return video.shown_size(*frame.shape[:2], aspect)

    ((width, height),) = video.read_frames(media, 0.0, math.inf, choose, size)
    return MediaInfo(width, height, *found)
