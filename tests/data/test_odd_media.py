"""Media as the world has them: odd sizes, depths and colours, senseless times, files that are joined or misnamed."""

import io
import socket
import threading

import av
import numpy as np
import pytest
from numbered_video import SIDE, encode, encode_image, media_info, numbered, numbered_video, read_numbers

from vlab_jax.data import video
from vlab_jax.datasets.check import probe_file

QUIET = {"x265-params": "log-level=none"}


def grey(height: int, width: int, value: int = 130) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def decoded(media: bytes, frames: int = 4, size: int = SIDE) -> np.ndarray:
    return video.decode_clip(media, num_frames=frames, size=size)


# pictures


@pytest.mark.parametrize(
    ("pix_fmt", "codec", "height", "width"),
    [
        ("yuv410p", "ffv1", 64, 72),
        ("yuv411p", "ffv1", 33, 71),
        ("yuv440p", "ffv1", 35, 33),
        ("yuv444p", "libx264", 33, 35),
        ("gray", "ffv1", 33, 35),
        ("yuva420p", "ffv1", 33, 35),
        ("gray10le", "ffv1", 32, 48),
        ("yuv420p10le", "libx265", 64, 66),
        ("yuv422p10le", "ffv1", 31, 33),
        ("yuv444p16le", "ffv1", 31, 33),
        ("rgb48le", "ffv1", 31, 33),
    ],
)
def test_every_sampling_of_colours_and_every_depth_shows_the_same_grey(pix_fmt, codec, height, width):
    media = encode([grey(height, width)] * 3, "matroska", codec, pix_fmt, QUIET if codec == "libx265" else None)
    assert np.abs(decoded(media, 3, 32).astype(int) - 130).max() <= 2
    info = media_info(media)
    assert (info.width, info.height, info.num_frames) == (width, height, 3)


def test_one_frame_of_8k_is_within_the_limits():
    picture = np.repeat(np.repeat(numbered(77), 4320 // SIDE + 1, 0)[:4320], 4320 // SIDE, 1)
    media = encode_image(picture, "JPEG")
    assert read_numbers(decoded(media, 1)) == [77]
    media = encode([grey(4320, 7680)], "matroska", "mjpeg", "yuvj420p")
    assert np.abs(decoded(media, 1).astype(int) - 130).max() <= 3


def test_one_frame_is_a_video_that_shows_it_as_often_as_asked():
    for container, codec in (("mp4", "libx264"), ("matroska", "libx264"), ("avi", "mpeg4"), ("gif", "gif")):
        media = encode([numbered(85)], container, codec, "rgb8" if codec == "gif" else "yuv420p")
        assert read_numbers(decoded(media, 3)) == [85] * 3
        assert media_info(media).num_frames == 1


def test_pixels_of_two_by_two_are_a_picture():
    media = encode([grey(2, 2)] * 2, options={"preset": "ultrafast"})
    assert np.abs(decoded(media, 2, 8).astype(int) - 130).max() <= 3


@pytest.mark.parametrize("transfer", [16, 18])  # SMPTE 2084 (PQ) and ARIB STD-B67 (HLG)
def test_hdr_is_shown_by_its_codes_without_tone_mapping(transfer):
    """As docs/untrusted.md says: codes are scaled to eight bits, and PQ or HLG curves are left in them."""
    ramp = np.repeat(np.repeat(np.arange(20, 240, 28, dtype=np.uint8), 8)[None, :, None], SIDE, 0).repeat(3, 2)

    def shown(**tags: int) -> np.ndarray:
        media = encode([ramp] * 2, "matroska", "ffv1", "yuv420p10le", tags=tags)
        with av.open(io.BytesIO(media)) as container:
            assert tags.items() <= {"color_trc": next(container.decode(video=0)).color_trc}.items()
        return decoded(media, 1)[0]

    hdr = shown(color_trc=transfer)
    np.testing.assert_array_equal(hdr, shown())
    assert np.abs(hdr.astype(int) - ramp).max() <= 2


def test_full_range_colours_are_not_taken_for_limited_ones():
    media = encode([grey(SIDE, SIDE, 0), grey(SIDE, SIDE, 255)], "avi", "mjpeg", "yuvj420p")
    black, white = decoded(media, 2)
    assert black.max() <= 2 and white.min() >= 253


# times


def stamped(stamps: list[int | None], container: str = "matroska", decoding: bool = True) -> bytes:
    """Numbered JPEGs, each shown on its own, with these time stamps in milliseconds."""
    plain = encode([numbered(i) for i in range(len(stamps))], "matroska", "mjpeg", "yuvj420p")
    buffer = io.BytesIO()
    with av.open(io.BytesIO(plain)) as source, av.open(buffer, "w", format=container) as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        coded = [packet for packet in source.demux(video=0) if packet.size]
        for packet, stamp in zip(coded, stamps, strict=True):
            packet.stream, packet.pts = stream, stamp
            packet.dts = packet.dts if decoding else None
            output.mux(packet)
    return buffer.getvalue()


def test_time_stamps_that_go_back_and_forth_are_an_order():
    stamps = [0, 300, 100, 400, 200, 700, 500, 600, 900, 800]
    for container in ("matroska", "nut"):
        shown = read_numbers(decoded(stamped(stamps, container), 10))
        assert shown == [stamps.index(time) for time in sorted(stamps)]


@pytest.mark.parametrize("stamps", [[0, 0, 0, 100, 100, 200, 200, 300, 300, 300], [5000] * 10, [None] * 10])
@pytest.mark.parametrize("decoding", [True, False])
def test_time_stamps_that_are_missing_or_all_the_same_lose_no_frame(stamps, decoding):
    try:
        media = stamped(stamps, decoding=decoding)
    except av.error.ArgumentError:
        assert decoding and stamps[0] == 0  # no muxer writes a frame that is shown before it is stored
        return
    assert media_info(media).num_frames == 10
    assert read_numbers(decoded(media, 10)) == [*range(10)]


def test_hours_at_a_low_rate_are_read_as_fast_as_a_few_frames():
    media = encode(
        [numbered(i) for i in range(60)], "matroska", "mjpeg", "yuvj420p", rate=1, stamps=range(0, 14400, 240)
    )
    assert video.measure_duration(media) == pytest.approx(14_400, abs=250)
    assert read_numbers(decoded(media, 4)) == [7, 22, 37, 52]
    assert read_numbers(video.decode_clip(media, num_frames=1, size=SIDE, start=7200, end=7201)) == [30]


def test_media_that_begin_before_or_long_after_zero_are_shown_from_their_beginning():
    late = encode([numbered(i) for i in range(20)], "matroska", stamps=range(300, 320))
    assert read_numbers(decoded(late, 20)) == [*range(20)]
    assert video.measure_duration(late) == pytest.approx(20 / 30, abs=0.01)
    early = encode([numbered(i) for i in range(40)], "mpegts", options={"bf": "0"}, shift=10)
    assert read_numbers(decoded(early, 40)) == [*range(40)]


# files


@pytest.mark.parametrize("name", ["mkv", "ts", "mpg", "gif"])
def test_two_files_joined_are_shown_one_behind_the_other(name):
    shown = read_numbers(decoded(numbered_video(name) * 2, 4))
    assert np.abs(np.subtract(shown, [25, 75, 25, 75])).max() <= 12


@pytest.mark.parametrize("name", ["mp4", "mkv", "ts", "avi-mpeg4", "webm-vp9"])
def test_what_follows_a_file_is_not_shown(name):
    for behind in (b"trailing" * 500, numbered_video("mp4")):
        assert read_numbers(decoded(numbered_video(name) + behind, 10)) == [4, 14, 24, 34, 44, 55, 65, 75, 85, 95]


@pytest.mark.parametrize(("kind", "behind"), [("JPEG", numbered_video("mp4")), ("PNG", b"garbage" * 20)])
def test_what_follows_a_photograph_is_no_second_frame(kind, behind):
    media = encode_image(numbered(9), kind) + behind
    assert read_numbers(decoded(media, 2)) == [9, 9] and media_info(media).num_frames == 1


def test_what_comes_before_a_file_is_skipped_or_refused_in_one_line():
    assert read_numbers(decoded(b"x" * 300 + numbered_video("ts"), 2)) == [24, 75]
    for name in ("mp4", "mkv"):
        with pytest.raises(video.DecodeError) as caught:
            decoded(b"GARBAGE!" * 50 + numbered_video(name))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["wrong.jpg", "wrong.txt", "none", "-i.mp4", "$(touch x);.mp4", "`touch x`", "a\nb.mp4", "ü😀.mp4", "pipe:"],
)
def test_a_file_is_read_by_what_it_holds_whatever_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(numbered_video("mkv"))
    assert probe_file(name).duration == pytest.approx(4.0, abs=0.1)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_sound_with_a_cover_picture_is_no_video():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        sound = output.add_stream("aac", rate=16000, layout="mono")
        cover = output.add_stream("mjpeg", rate=1)
        cover.width = cover.height = SIDE
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        output.mux(cover.encode(av.VideoFrame.from_ndarray(numbered(3), format="rgb24")))
        output.mux(sound.encode(frame))
        output.mux([*cover.encode(None), *sound.encode(None)])
    with av.open(io.BytesIO(buffer.getvalue())) as container:
        assert [stream.type for stream in container.streams] == ["audio", "video"]
    with pytest.raises(video.DecodeError, match=r"no video stream: a mov.* file with audio, video"):
        decoded(buffer.getvalue())


# files that name other files


@pytest.fixture
def address():
    """A port of this machine, and how many have called."""
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                calls.append(connection)
                connection.close()

        threading.Thread(target=answer, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}", calls
        server.shutdown(socket.SHUT_RDWR)


PLAYLISTS = {
    "concat": "ffconcat version 1.0\nfile {0}\n",
    "hls": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{0}\n#EXT-X-ENDLIST\n",
    "hls master": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{0}\n",
    "hls key": '#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXT-X-KEY:METHOD=AES-128,URI="{0}"\n#EXTINF:5,\n{0}\n',
    "dash": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{0}</BaseURL></Representation></AdaptationSet>'
    "</Period></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\na=control:{0}\n",
    "smooth": '<SmoothStreamingMedia MajorVersion="2"><StreamIndex Url="{0}"/></SmoothStreamingMedia>',
    "svg": '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="{0}" width="9"/></svg>',
    "html": '<!DOCTYPE html><html><head><title>404</title></head><body><video src="{0}"></video></body></html>',
    "path": "{0}\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_file_that_names_others_is_refused_and_nothing_else_is_opened(kind, tmp_path, address):
    (tmp_path / "beside.ts").write_bytes(numbered_video("ts"))
    host, calls = address
    file = str(tmp_path / "beside.ts")
    for target in (file, f"file:{file}", f"concat:{file}", f"subfile,,start,0,end,0,,:{file}", f"http://{host}/a.ts"):
        media = PLAYLISTS[kind].format(target).encode()
        for attempt in (decoded, video.measure_duration):
            with pytest.raises(video.DecodeError, match=r"not read here|cannot be decoded"):
                attempt(media)
    assert not calls
    with pytest.raises(av.error.FFmpegError), av.open(f"http://{host}/a.ts", timeout=5):
        pass
    assert calls  # whoever calls is seen
