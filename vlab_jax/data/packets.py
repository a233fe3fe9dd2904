"""The packets of an interval of a media, and the frames they hold (PyAV).

Packets are read without decoding, which gives every frame's time and where the key frames are, and only the
stretches from a key frame to a wanted frame are decoded. The packets of the interval are kept, so that going
back to a key frame needs no second seek in the file, which many containers do inexactly.

Where packets carry no usable times (AVI and raw streams with B-frames), the interval is decoded in full, and
frames are counted as the decoder hands them out.
"""

import bisect
import contextlib
import dataclasses
import functools
import io
import itertools
import math
import pathlib
import types
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, TypeVar

import av
import numpy as np
from jaxtyping import Float

from vlab_jax.data.packet_list import PacketList
from vlab_jax.data.sampling import even_times, fill_times

# How far before the start of an interval to seek, in seconds, until a key frame lies before it.
_SEEK_MARGINS = (0.0, 2.0, 20.0)
_DEFAULT_RATE = 25

T = TypeVar("T")


class DecodeError(ValueError):
    """Media that cannot be decoded as asked, said in one line."""


class UnreliableTimes(Exception):
    """The decoder's order of frames contradicts the packets' time stamps: use `with_decoded_times`."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """The packets that show an interval of a media, and when their frames are shown.

    `packets` are in decoding order. `times` are the frames' times in display order, in seconds from the
    beginning of the media; `stop` is the time at which the last one ends, infinite where the media goes on.
    `origin` is the beginning of the media on the stream's clock, in seconds.

    `stamps` holds each frame's time stamp, in ticks, and `places` the place of its packet in `packets`. Both
    are None where packets do not tell which frame they hold; frames are then counted as they are decoded.
    """

    stream: av.VideoStream
    packets: PacketList
    origin: Fraction
    times: Float[np.ndarray, " n"]
    stop: float
    stamps: list[int] | None = None
    places: list[int] | None = None


@contextlib.contextmanager
def open_interval(media: bytes | pathlib.Path, start: float, end: float) -> Iterator[Interval]:
    """The packets that show [start, end), in seconds: from a key frame before `start` on.

    Of a file, many packets are not kept in memory (`PacketList`).

    Raises `DecodeError`, and whatever PyAV raises, on media that cannot be read.
    """
    for seek in [start - margin for margin in _SEEK_MARGINS if start > margin] + [None]:
        with _open(media) as (container, stream):
            origin = _origin(container)
            packets = PacketList(container, stream, functools.partial(_open, media))
            packets, ended = _read_packets(packets, container, stream, origin, seek, start, end)
            if packets or seek is None:
                yield _with_packet_times(stream, packets, origin, ended)
                return


def decode_packets(
    context: av.VideoCodecContext, packets: Iterable[av.Packet], wanted: Container[int] | None = None
) -> Iterator[av.VideoFrame]:
    """The frames of consecutive packets, in display order; packets that the decoder rejects are passed over.

    With `wanted` (time stamps), other frames may be left out: those that no frame refers to are not decoded,
    which saves about a third of the work where there are B-frames.
    """
    context.flush_buffers()
    for packet in itertools.chain(packets, [None]):
        spare = wanted is not None and packet is not None and packet.pts not in wanted
        context.skip_frame = "NONREF" if spare else "DEFAULT"
        try:
            yield from context.decode(packet)
        except av.error.FFmpegError:
            continue


def decode_frames(interval: Interval, wanted: Sequence[int], take: Callable[[av.VideoFrame], T]) -> dict[int, T]:
    """What `take` makes of the frames at these places in display order, each decoded from the key frame before it.

    A frame is let go of as soon as it is taken, so memory holds what `take` returns. A frame that is damaged is
    replaced by the nearest earlier one that is not, or else by the nearest later.

    Raises:
        UnreliableTimes: the decoder's order of frames contradicts the packets' times.
        DecodeError: none of the frames can be decoded.
    """
    wanted = sorted(set(wanted))
    if interval.places is None:
        counted = enumerate(decode_packets(interval.stream.codec_context, interval.packets[:]))
        return _some(_collect(counted, wanted, take)[0])
    frames: dict[int, T] = {}
    damaged: list[int] = []
    for key, group in itertools.groupby(wanted, key=lambda frame: _key_place(interval, frame)):
        targets = list(group)
        last = max(interval.places[target] for target in targets)
        stretch = interval.packets[key : last + 1]
        stamps = {interval.stamps[target] for target in targets}
        # AVI's stamps are checked against the decoder's order, which takes every frame.
        wanted_only = None if _stores_no_times(interval.stream) else stamps
        found, inexact = _collect(_decode_numbered(interval, stretch, wanted_only), targets, take)
        frames |= found
        damaged += inexact
    # An open GOP, or a key frame that is damaged itself, can need packets from before the key frame.
    if damaged:
        frames |= _collect(_decode_numbered(interval, interval.packets[:], None), damaged, take)[0]
    return _some(frames)


def _some(frames: dict[int, T]) -> dict[int, T]:
    if not frames:
        raise DecodeError("no frame of the media can be decoded")
    return frames


def with_decoded_times(interval: Interval) -> Interval:
    """The same interval with times taken from its decoded frames: all its packets are decoded once.

    Frames keep the decoder's order; their times are their presentation stamps where these increase, else
    their decoding stamps, else they are counted at the mean rate.
    """
    frames = [(f.pts, f.dts) for f in decode_packets(interval.stream.codec_context, interval.packets[:])]
    if not frames:
        raise DecodeError("no frame of the media can be decoded")
    step = _mean_step(interval.stream)
    for stamps in (*zip(*frames, strict=True), [None] * len(frames)):
        ticks = fill_times(stamps, step)
        if (np.diff(ticks) > 0).all():
            break
    times, stop = _seconds(interval.stream, ticks, interval.origin, step)
    return dataclasses.replace(interval, times=times, stop=max(stop, interval.stop), stamps=None, places=None)


@contextlib.contextmanager
def _open(media: bytes | pathlib.Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The opened media and its video stream."""
    if not (media if isinstance(media, bytes) else media.stat().st_size):
        raise DecodeError("the media is empty (0 bytes)")
    # A playlist must not make us read other files: with no protocol allowed, only these bytes can be read.
    options = {"protocol_whitelist": "none"}
    with (
        io.BytesIO(media) if isinstance(media, bytes) else media.open("rb") as file,
        av.open(_without_name(file), metadata_errors="ignore", container_options=options) as container,
    ):
        videos = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
        if not videos:
            held = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
            raise DecodeError(f"the media has no video stream: a {container.format.name} file with {held}")
        best = container.streams.best("video")
        stream = best if best in videos else videos[0]
        if stream.codec_context is None:
            raise DecodeError("there is no decoder for the media's video stream")
        stream.codec_context.thread_count = 1
        yield container, stream


def _without_name(file: io.BufferedIOBase) -> Any:
    """The file, to FFmpeg nothing but bytes: by its name alone it would take a `.txt` for a video of letters."""
    return types.SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)


def _origin(container: av.container.InputContainer) -> Fraction:
    """The beginning of the media on its streams' clock, in seconds; exact, where the container rounds it."""
    streams = (*container.streams.video, *container.streams.audio)
    starts = [s.start_time * s.time_base for s in streams if s.start_time is not None and s.time_base]
    return min(starts, default=Fraction(0))


def _read_packets(
    packets: PacketList,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    origin: Fraction,
    seek: float | None,
    start: float,
    end: float,
) -> tuple[PacketList, bool]:
    """Packets from before `start` to `end`, added to none, and whether the media ended first.

    None where seeking to `seek` gives no key frame at or before `start`.
    """

    def tick(seconds: float) -> float:
        return (seconds + float(origin)) / float(stream.time_base)

    # Damage ends the reading; what was read before it can still be shown.
    with contextlib.suppress(av.error.FFmpegError):
        if seek is not None:
            container.seek(math.floor(tick(seek)), stream=stream)
        for packet in _demux(container, stream):
            if not packet.size:
                continue
            if seek is not None and not packets:
                if not packet.is_keyframe:  # MPEG streams are cut anywhere
                    continue
                if packet.pts is None or packet.pts > tick(start):
                    return packets, False
            if packet.dts is not None and packet.dts >= tick(end):
                return packets, False
            packets.append(packet)
    return packets, True


def _demux(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    while True:
        try:
            yield from container.demux(stream)
            return
        except IndexError:  # PyAV does not expect a stream that first appears late, as MPEG files allow
            continue


def _with_packet_times(stream: av.VideoStream, packets: PacketList, origin: Fraction, ended: bool) -> Interval:
    """The interval with times from its packets, or without any where these do not tell."""
    stop = 0.0 if ended else math.inf
    # A frame that comes before the first key frame refers to frames that are not there.
    first = packets[0].pts if packets and packets[0].is_keyframe else None
    shown = [
        place
        for place, packet in enumerate(packets)
        if not packet.is_discard and (first is None or packet.pts is None or packet.pts >= first)
    ]
    if not shown:
        raise DecodeError("the media holds no frame in the interval")
    if not _tell_times(stream, [packets[place].pts for place in shown]):
        return Interval(stream, packets, origin, np.zeros(0), stop)
    places = sorted(shown, key=lambda place: packets[place].pts)
    stamps = [packets[place].pts for place in places]
    duration = float(packets[places[-1]].duration or 0)
    times, shown_until = _seconds(stream, np.array(stamps, dtype=np.float64), origin, duration)
    return Interval(stream, packets, origin, times, max(stop, shown_until), stamps, places)


def _tell_times(stream: av.VideoStream, stamps: list[int | None]) -> bool:
    """Whether the packets' stamps (in decoding order) are the times of their frames."""
    if None in stamps or len(set(stamps)) < len(stamps):
        return False
    # In a stream with B-frames, time stamps that follow the decoding order cannot be presentation times.
    return not (_stores_no_times(stream) and stream.codec_context.has_b_frames and stamps == sorted(stamps))


def _stores_no_times(stream: av.VideoStream) -> bool:
    """Whether the container has no presentation times, so that they are made up from the order of packets."""
    return stream.container.format.name == "avi"


def _mean_step(stream: av.VideoStream) -> float:
    """The mean time between two frames, in ticks, as the header says."""
    rate = stream.average_rate or stream.guessed_rate or _DEFAULT_RATE
    return float(1 / (rate * stream.time_base))


def _seconds(
    stream: av.VideoStream, ticks: Float[np.ndarray, " n"], origin: Fraction, duration: float
) -> tuple[Float[np.ndarray, " n"], float]:
    """Times of frames, and the end of the last one, in seconds; `duration` is the last one's, in ticks."""
    resolution = float(stream.time_base)
    times, step = even_times(ticks * resolution - float(origin), resolution)
    last = duration * resolution
    # A last frame that is held counts; one that a muxer cut short would make a constant rate look uneven.
    if step is not None and last < 1.5 * step:
        last = step
    return times, float(times[-1]) + (last or _mean_step(stream) * resolution)


def _key_place(interval: Interval, frame: int) -> int:
    """The packet to decode from: the last key frame that is neither stored nor shown after `frame`."""
    place, stamp = interval.places[frame], interval.stamps[frame]
    while place > 0:
        packet = interval.packets[place]
        if packet.is_keyframe and packet.pts is not None and packet.pts <= stamp:
            return place
        place -= 1
    return 0


def _decode_numbered(
    interval: Interval, packets: Iterable[av.Packet], wanted: Container[int] | None
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames of some of the interval's packets, with their places in display order."""
    stamps, previous = interval.stamps, -1
    for frame in decode_packets(interval.stream.codec_context, packets, wanted):
        if frame.pts is not None and frame.pts < stamps[0]:
            continue
        number = bisect.bisect_left(stamps, frame.pts) if frame.pts is not None else len(stamps)
        if number == len(stamps) or stamps[number] != frame.pts or number <= previous:
            raise UnreliableTimes
        previous = number
        yield number, frame


def _collect(
    numbered: Iterable[tuple[int, av.VideoFrame]], wanted: Sequence[int], take: Callable[[av.VideoFrame], T]
) -> tuple[dict[int, T], list[int]]:
    """Each wanted number's frame, or the nearest before it, or else after it, taken; and which are not exact."""
    frames: dict[int, T] = {}
    inexact: list[int] = []
    pending = list(wanted)
    latest = None
    for number, frame in numbered:
        while pending and pending[0] < number:
            inexact.append(pending[0])
            frames[pending.pop(0)] = take(latest or frame)
        latest = frame
        if pending and pending[0] == number:
            frames[pending.pop(0)] = take(frame)
        if not pending:
            break
    inexact += pending
    if pending and latest is not None:
        frames |= dict.fromkeys(pending, take(latest))
    return frames, inexact
