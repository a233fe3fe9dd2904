"""A clip as a list of JPEGs: decoded once, resized, and kept at a low rate (the `frames` variant of a data set).

Videos have few key frames, so whoever wants 8 frames of a minute decodes most of that minute, in every epoch. Of a
list of JPEGs, 8 are decoded.

Which frames are stored: a clip that is shown for D seconds is divided into round(D x frame_rate) equal parts, at least
one, and the frame at the centre of each is taken, as evaluation takes frames of a video (`sampling.segment_times`). So
the list is evenly spread over the clip, and a clip played backwards has the same list backwards (but for the middle
one of an odd number, where that falls between two frames). The rate is never above that at which frames follow each
other in the media: nothing is stored twice where the rate is constant.

How: upright, in square pixels, the short side brought down (never up) to `short_side` with CLIP's filter, aspect kept.
Chroma is stored at half the resolution, as nearly all videos have it. A JPEG that is as small as that and upright
already is stored as it is.
"""

import io

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from vlab_jax.data import video
from vlab_jax.data.media import DEFAULT_LIMITS, MediaLimits
from vlab_jax.data.sampling import frames_at, segment_times


def store(
    media: bytes,
    *,
    start: float | int,
    end: float | int,
    frame_rate: float | int,
    short_side: int,
    quality: int,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> list[bytes]:
    """The frames of a clip as JPEGs, in display order.

    Args:
        media: an encoded video, or an image: a one-frame video.
        start, end: the clip's interval within the media, in seconds; the end is cut to that of the media.
        frame_rate: frames a second, at most.
        short_side: pixels of a frame's short side, at most.
        quality: of the JPEGs, 1 to 100.
        limits: what decoding may take, and how much what is stored.

    Raises:
        DecodeError: the media cannot be decoded, or not within the limits, or the interval lies outside it.
    """

    def choose(times: Float[np.ndarray, " n"], stop: float) -> Int[np.ndarray, " t"]:
        first, last = video.shown_interval(times, stop, start, end)
        count = frame_count(times, first, last, frame_rate)
        limits.check_frames(count)
        return frames_at(segment_times(first, last, count), times)

    def jpeg(frame: UInt8[np.ndarray, "h w 3"], pixel_aspect: float) -> bytes:
        short = min(short_side, *video.shown_size(*frame.shape[:2], pixel_aspect))
        buffer = io.BytesIO()
        image = Image.fromarray(np.ascontiguousarray(video.resize(frame, short, pixel_aspect)))
        image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0", optimize=True)
        return buffer.getvalue()

    frames = video.read_frames(media, start, end, choose, jpeg, limits)
    limits.check_bytes(sum(map(len, frames)), "the clip's frames are JPEGs")  # one that is held long is stored often
    return [media] if video.is_upright_jpeg(media, short_side) else frames


def frame_count(times: Float[np.ndarray, " n"], first: float | int, last: float | int, frame_rate: float | int) -> int:
    """How many frames are stored of [first, last), in seconds, out of frames that start at `times`."""
    shown = times[frames_at(np.array([first]), times)[0] : np.searchsorted(times, last)]
    if len(shown) < 2:
        return 1
    return max(1, round((last - first) * min(frame_rate, 1 / float(np.diff(shown).min()))))
