"""Media files are opened (PyAV): which kinds are, and that nothing but their own bytes is read.

FFmpeg knows hundreds of formats. Some name other files or addresses for it to read (playlists, lists of parts,
session descriptions), and most are of no use here and rarely looked at by anyone. Only the formats and decoders
listed here are used, whatever a file's name says and whatever its first bytes claim.
"""

import contextlib
from collections.abc import Iterator

import av

from vlab_jax.data.limits import DecodeError, Watch
from vlab_jax.data.media import Encoded, WatchedReader, size

# As FFmpeg calls its demuxers: containers, raw streams, images.
FORMATS = (
    *("mov", "matroska", "avi", "mpeg", "mpegvideo", "mpegts", "asf", "flv", "ogg", "rm", "mxf", "dv", "nut", "ivf"),
    *("h264", "hevc", "m4v", "obu", "mjpeg"),
    *("gif", "apng", "webp", "webp_anim", "jpeg_pipe", "png_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe"),
)
# As FFmpeg calls its decoders.
DECODERS = (
    *("h264", "hevc", "vvc", "av1", "libdav1d", "vp3", "theora", "vp6", "vp6a", "vp6f", "vp8", "vp9"),
    *("mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4", "h263", "h263i", "h263p", "flv"),
    *("wmv1", "wmv2", "wmv3", "vc1", "rv10", "rv20", "rv30", "rv40", "svq1", "svq3", "cinepak", "indeo3", "indeo5"),
    *("msvideo1", "msrle", "rawvideo", "mjpeg", "dvvideo", "dnxhd", "prores", "ffv1", "huffyuv", "ffvhuff", "utvideo"),
    *("gif", "apng", "png", "webp", "libwebp", "libwebp_anim", "bmp", "tiff", "jpeg2000", "qtrle", "rpza"),
)
_READ_HERE = "mp4, mov, mkv, webm, avi, mpg, ts, wmv, flv, ogv, rm, mxf, gif, and images"


@contextlib.contextmanager
def open_media(media: Encoded, watch: Watch) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The opened media and its video stream, whose decoder refuses frames that are larger than they may be.

    Raises `DecodeError`, and whatever PyAV raises, on media that cannot be opened.
    """
    if not size(media):
        raise DecodeError("the media is empty (0 bytes)")
    if isinstance(media, bytes):
        watch.limits.check_bytes(len(media), "the media is a file")
    with _opened(media, watch) as container:
        stream = _video_stream(container)
        context = stream.codec_context
        if context is None:
            raise DecodeError("there is no decoder for the media's video stream")
        if context.name not in DECODERS:
            raise DecodeError(f"the media's video is coded as {context.name}, which is not read here; convert it")
        watch.limits.check_picture(context.width, context.height)
        context.options = _decoder_options(watch)
        context.thread_count = 1
        yield container, stream


def _opened(media: Encoded, watch: Watch) -> av.container.InputContainer:
    options = {
        # A playlist must not make us read other files: with no protocol allowed, only these bytes can be read.
        "protocol_whitelist": "none",
        "format_whitelist": ",".join(FORMATS),
        "codec_whitelist": ",".join(DECODERS),
    }
    try:
        return av.open(
            WatchedReader(media, watch),
            metadata_errors="ignore",
            container_options=options,
            options=_decoder_options(watch),  # opening may decode a frame
        )
    except av.error.ArgumentError as error:
        raise DecodeError(
            f"the media is damaged, or of a format that is not read here; read are {_READ_HERE}"
        ) from error


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    videos = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not videos:
        held = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
        raise DecodeError(f"the media has no video stream: a {container.format.name} file with {held}")
    best = container.streams.best("video")
    return best if best in videos else videos[0]


def _decoder_options(watch: Watch) -> dict[str, str]:
    # Decoders count the edges that they add to a frame, too.
    return {"max_pixels": str(min(watch.limits.max_pixels * 5 // 4 + 2**17, 2**31 - 1))}
