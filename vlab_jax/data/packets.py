"""The packets of an interval of a media, and the frames they hold (PyAV).

Packets are read without decoding (`packet_reader.py`), which gives every frame's time and where the key frames are,
and only the stretches from a key frame to a wanted frame are decoded.

Where packets carry no usable times (AVI and raw streams with B-frames), the interval is decoded in full, and
frames are counted as the decoder hands them out.
"""

import bisect
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import TypeVar

import av
import numpy as np
from jaxtyping import Float

from vlab_jax.data.media import FIELDS, DecodeError, Encoded, Watch, open_media
from vlab_jax.data.sampling import even_times, fill_times

# FOLDED vlab_jax/data/packets.py: The packets of an interval of a media, read without decoding (PyAV).  They
# are kept, so that going back to a key frame needs no second seek in the file, which many containers do inexactly.
# Those of a long video can be more than fits into memory: then only what they say of themselves is kept, and those
# that are wanted are read again, in the same order from the same place on.

_MOST_HELD = 2**28  # bytes of packets


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Which packets are read: from before `start` to `end`.

    `start`, `end` and `seek`, the time to seek to first (None: the beginning of the file), are seconds from the
    beginning of the media, which is at `origin` on its streams' clock.
    """

    origin: Fraction
    seek: float | None
    start: float
    end: float

    def tick(self, stream: av.VideoStream, seconds: float) -> float:
        """A time on the stream's clock."""
        return (seconds + float(self.origin)) / float(stream.time_base)


@dataclasses.dataclass(frozen=True, slots=True)
class Stamp:
    """What a packet says of itself, named as in PyAV."""

    pts: int | None
    dts: int | None
    duration: int | None
    is_keyframe: bool
    is_discard: bool


class HeldPackets:
    """Packets in memory, in decoding order; `stamps` are what they say of themselves."""

    def __init__(self, packets: list[av.Packet]) -> None:
        self.stamps: Sequence[av.Packet | Stamp] = packets

    def __len__(self) -> int:
        return len(self.stamps)

    def read(self, first: int, stop: int) -> Iterator[av.Packet]:
        """Those from one place to before another."""
        yield from self.stamps[first:stop]

    def close(self) -> None:
        """Nothing is open."""


class PacketsReadAgain:
    """Packets that are too many to hold, in decoding order: they are read again, forwards, and anew to go back."""

    def __init__(self, media: Encoded, watch: Watch, stretch: Stretch, stamps: list[Stamp]) -> None:
        self.stamps: Sequence[av.Packet | Stamp] = stamps
        self._media, self._watch, self._stretch = media, watch, stretch
        self._following: Iterator[av.Packet] | None = None
        self._next = 0

    def __len__(self) -> int:
        return len(self.stamps)

    def read(self, first: int, stop: int) -> Iterator[av.Packet]:
        """Those from one place to before another; one reading at a time."""
        if self._following is None or first < self._next:
            self.close()
            self._following, self._next = self._from_the_start(), 0
        while self._next < stop:
            packet = next(self._following, None)
            if packet is None:
                return
            self._next += 1
            if self._next > first:
                yield packet

    def close(self) -> None:
        """Closes the media, where it is read."""
        if self._following is not None:
            self._following.close()
        self._following = None

    def _from_the_start(self) -> Iterator[av.Packet]:
        with open_media(self._media, self._watch) as (container, stream):
            yield from _following(container, stream, self._stretch)


Packets = HeldPackets | PacketsReadAgain


def read_packets(
    media: Encoded, container: av.container.InputContainer, stream: av.VideoStream, watch: Watch, stretch: Stretch
) -> tuple[Packets, bool]:
    """Packets from before `stretch.start` to its end, and whether the media ended first.

    There are none where seeking to `stretch.seek` gives no key frame at or before `stretch.start`.
    """
    packets: list[av.Packet | Stamp] = []
    size, ended, until = 0, True, stretch.tick(stream, stretch.end)
    # Damage ends the reading; what was read before it can still be shown.
    with contextlib.suppress(av.error.FFmpegError):
        for packet in _following(container, stream, stretch):
            if packet.dts is not None and packet.dts >= until:
                ended = False
                break
            if size <= _MOST_HELD < size + packet.size:
                packets = [_stamp(each) for each in packets]
            size += packet.size
            packets.append(packet if size <= _MOST_HELD else _stamp(packet))
            watch.check_time()
            watch.limits.check_frames(len(packets))
    held = size <= _MOST_HELD
    return HeldPackets(packets) if held else PacketsReadAgain(media, watch, stretch, packets), ended


def _stamp(packet: av.Packet) -> Stamp:
    return Stamp(packet.pts, packet.dts, packet.duration, packet.is_keyframe, packet.is_discard)


def _following(container: av.container.InputContainer, stream: av.VideoStream, stretch: Stretch) -> Iterator[av.Packet]:
    """Packets from the place to seek to on, or from the beginning; none where that is after `stretch.start`."""
    if stretch.seek is not None:
        container.seek(math.floor(stretch.tick(stream, stretch.seek)), stream=stream)
    begun = stretch.seek is None
    for packet in _demux(container, stream):
        if not packet.size:
            continue
        if not begun:
            if not packet.is_keyframe:  # MPEG streams are cut anywhere
                continue
            if packet.pts is None or packet.pts > stretch.tick(stream, stretch.start):
                return
            begun = True
        yield packet


def _demux(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    while True:
        try:
            yield from container.demux(stream)
            return
        except IndexError:  # PyAV does not expect a stream that first appears late, as MPEG files allow
            continue


# How far before the start of an interval to seek, in seconds, until a key frame lies before it.
_SEEK_MARGINS = (0.0, 2.0, 20.0)
_DEFAULT_RATE = 25

T = TypeVar("T")
C = TypeVar("C", bound=Collection)


class UnreliableTimes(Exception):
    """The decoder's order of frames contradicts the packets' time stamps: use `with_decoded_times`."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """The packets that show an interval of a media, and when their frames are shown.

    `packets` are in decoding order. `times` are the frames' times in display order, in seconds from the
    beginning of the media; `stop` is the time at which the last one ends, infinite where the media goes on.
    `origin` is the beginning of the media on the stream's clock, in seconds; `watch` holds the decoding to its limits.

    `stamps` holds each frame's time stamp, in ticks, and `places` the place of its packet in `packets`. Both
    are None where packets do not tell which frame they hold; frames are then counted as they are decoded.
    """

    stream: av.VideoStream
    packets: Packets
    watch: Watch
    origin: Fraction
    times: Float[np.ndarray, " n"]
    stop: float
    stamps: list[int] | None = None
    places: list[int] | None = None


@contextlib.contextmanager
def open_interval(media: Encoded, start: float, end: float, watch: Watch) -> Iterator[Interval]:
    """The packets that show [start, end), in seconds: from a key frame before `start` on.

    Raises `DecodeError`, and whatever PyAV raises, on media that cannot be read.
    """
    for seek in [start - margin for margin in _SEEK_MARGINS if start > margin] + [None]:
        with open_media(media, watch) as (container, stream):
            origin = _origin(container)
            packets, ended = read_packets(media, container, stream, watch, Stretch(origin, seek, start, end))
            if len(packets) or seek is None:
                with contextlib.closing(packets):
                    yield _with_packet_times(stream, packets, watch, origin, ended)
                return


def decode_packets(
    context: av.VideoCodecContext, packets: Iterable[av.Packet], watch: Watch, wanted: Container[int] | None = None
) -> Iterator[av.VideoFrame]:
    """The frames of consecutive packets, in display order; packets that the decoder rejects are passed over.

    Raises `DecodeError` where a frame is larger than it may be, whatever the header said, or time is up.

    With `wanted` (time stamps), other frames may be left out: those that no frame refers to are not decoded,
    which saves about a third of the work where there are B-frames.
    """
    context.flush_buffers()
    for packet in itertools.chain(packets, [None]):
        spare = wanted is not None and packet is not None and packet.pts not in wanted
        context.skip_frame = "NONREF" if spare else "DEFAULT"
        watch.check_time()
        width = context.width
        try:
            for frame in context.decode(packet):
                watch.limits.check_picture(frame.width, frame.height)
                yield frame
        except av.error.FFmpegError as error:
            watch.limits.check_picture(context.width, context.height)
            # Most decoders forget the size that they refuse, and dav1d calls it out of range.
            watch.oversized |= width > context.width or isinstance(error, OverflowError)


def decode_all(interval: Interval) -> Iterator[av.VideoFrame]:
    """The frames of all packets of an interval, in display order; see `decode_packets`."""
    packets = interval.packets.read(0, len(interval.packets))
    return decode_packets(interval.stream.codec_context, packets, interval.watch)


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
        counted = enumerate(decode_all(interval))
        return _some(_collect(counted, wanted, take)[0], interval.watch)
    frames: dict[int, T] = {}
    damaged: list[int] = []
    for key, group in itertools.groupby(wanted, key=lambda frame: _key_place(interval, frame)):
        targets = list(group)
        last = max(interval.places[target] for target in targets)
        stretch = interval.packets.read(key, last + 1)
        stamps = {interval.stamps[target] for target in targets}
        # AVI's stamps are checked against the decoder's order, which takes every frame.
        wanted_only = None if _stores_no_times(interval.stream) else stamps
        found, inexact = _collect(_decode_numbered(interval, stretch, wanted_only), targets, take)
        frames |= found
        damaged += inexact
    # An open GOP, or a key frame that is damaged itself, can need packets from before the key frame.
    if damaged:
        every = interval.packets.read(0, len(interval.packets))
        frames |= _collect(_decode_numbered(interval, every, None), damaged, take)[0]
    return _some(frames, interval.watch)


def _some(frames: C, watch: Watch) -> C:
    if not frames:
        raise DecodeError(no_frame(watch))
    return frames


def no_frame(watch: Watch) -> str:
    """What to say of media of which no frame can be decoded."""
    limit = f"{FIELDS}.max_pixels={watch.limits.max_pixels:,}"
    return f"no frame of the media can be decoded{f', or each has more than {limit} pixels' if watch.oversized else ''}"


def with_decoded_times(interval: Interval) -> Interval:
    """The same interval with times taken from its decoded frames: all its packets are decoded once.

    Frames keep the decoder's order; their times are their presentation stamps where these increase, else
    their decoding stamps, else they are counted at the mean rate.
    """
    frames = _some([(frame.pts, frame.dts) for frame in decode_all(interval)], interval.watch)
    step = _mean_step(interval.stream)
    for stamps in (*zip(*frames, strict=True), [None] * len(frames)):
        ticks = fill_times(stamps, step)
        if (np.diff(ticks) > 0).all():
            break
    times, stop = _seconds(interval.stream, ticks, interval.watch, interval.origin, step)
    if stop <= 0:  # stamps that contradict the beginning of the media: it begins with its first frame
        times, stop = times - times[0], stop - float(times[0])
    return dataclasses.replace(interval, times=times, stop=max(stop, interval.stop), stamps=None, places=None)


def _origin(container: av.container.InputContainer) -> Fraction:
    """The beginning of the media on its streams' clock, in seconds; exact, where the container rounds it."""
    streams = (*container.streams.video, *container.streams.audio)
    starts = [s.start_time * s.time_base for s in streams if s.start_time is not None and s.time_base]
    return min(starts, default=Fraction(0))


def _with_packet_times(
    stream: av.VideoStream, packets: Packets, watch: Watch, origin: Fraction, ended: bool
) -> Interval:
    """The interval with times from its packets, or without any where these do not tell."""
    stop, stamped = 0.0 if ended else math.inf, packets.stamps
    # A frame that comes before the first key frame refers to frames that are not there.
    first = stamped[0].pts if stamped and stamped[0].is_keyframe else None
    shown = [
        place
        for place, packet in enumerate(stamped)
        if not packet.is_discard and (first is None or packet.pts is None or packet.pts >= first)
    ]
    if not shown:
        raise DecodeError("the media holds no frame in the interval")
    if not _tell_times(stream, [stamped[place].pts for place in shown]):
        return Interval(stream, packets, watch, origin, np.zeros(0), stop)
    places = sorted(shown, key=lambda place: stamped[place].pts)
    stamps = [stamped[place].pts for place in places]
    duration = float(stamped[places[-1]].duration or 0)
    times, shown_until = _seconds(stream, np.array(stamps, dtype=np.float64), watch, origin, duration)
    return Interval(stream, packets, watch, origin, times, max(stop, shown_until), stamps, places)


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
    stream: av.VideoStream, ticks: Float[np.ndarray, " n"], watch: Watch, origin: Fraction, duration: float
) -> tuple[Float[np.ndarray, " n"], float]:
    """Times of frames, and the end of the last one, in seconds; `duration` is the last one's, in ticks."""
    resolution = float(stream.time_base)
    times, step = even_times(ticks * resolution - float(origin), resolution)
    last = duration * resolution
    # A last frame that is held counts; one that a muxer cut short would make a constant rate look uneven.
    if step is not None and last < 1.5 * step:
        last = step
    stop = float(times[-1]) + (last or _mean_step(stream) * resolution)
    watch.limits.check_duration(stop - float(times[0]))
    return times, stop


def _key_place(interval: Interval, frame: int) -> int:
    """The packet to decode from: the last key frame that is neither stored nor shown after `frame`."""
    place, stamp = interval.places[frame], interval.stamps[frame]
    while place > 0:
        packet = interval.packets.stamps[place]
        if packet.is_keyframe and packet.pts is not None and packet.pts <= stamp:
            return place
        place -= 1
    return 0


def _decode_numbered(
    interval: Interval, packets: Iterable[av.Packet], wanted: Container[int] | None
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames of some of the interval's packets, with their places in display order."""
    stamps, previous = interval.stamps, -1
    for frame in decode_packets(interval.stream.codec_context, packets, interval.watch, wanted):
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
