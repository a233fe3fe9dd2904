"""The packets of an interval of a video, and the frames they hold (PyAV).

Packets are read without decoding, which gives every frame's time and shows where the key frames are; only the packets
from a key frame to a wanted frame are decoded. Where packets carry no usable times (AVI and raw streams with B-frames),
the interval is decoded in full, and frames are counted as the decoder returns them.
"""

import bisect
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeVar

import av
import numpy as np
from jaxtyping import Float, Int

from vlab_jax.data.media import FIELDS, DecodeError, MediaReader, open_media
from vlab_jax.data.sampling import even_times, fill_times

_MOST_HELD = 2**28  # bytes of packets in memory
# How far before the start of an interval to seek, in seconds, until a key frame lies before it.
_SEEK_MARGINS = (0.0, 2.0, 20.0)
_DEFAULT_RATE = 25
_ALL = 2**63 - 1

T = TypeVar("T")
# Gets the times (seconds, increasing) at which frames start, and when the last one ends; returns which ones to take.
Choose = Callable[[Float[np.ndarray, " n"], float], Int[np.ndarray, " t"]]


class UnreliableTimes(Exception):
    """The decoder's order of frames contradicts the packets' time stamps: use `with_decoded_times`."""


class Stamp(NamedTuple):
    """What a packet says of its frame, named as in PyAV."""

    pts: int | None
    duration: int | None
    is_keyframe: bool
    is_discard: bool


class Packets:
    """The packets from before `start` to `end` (seconds from the beginning of the media), in decoding order.

    They are held in memory, so that going back to a key frame needs no second seek in the file, which many containers
    do inexactly. Where they are too large for that, `read` reads them anew from the same place on. There are none
    where seeking to `seek` seconds (None: the beginning) finds no key frame at or before `start`.

    `stamps` says what each packet says of its frame, `ended` whether the media ended before `end`, `origin` where the
    media begins on the stream's clock, in seconds, and `mean_step` the mean time between two frames, in ticks, as the
    header says.
    """

    def __init__(
        self, media: MediaReader, stream: av.VideoStream, start: float, end: float, seek: float | None
    ) -> None:
        self.media, self.stream = media, stream
        rate = stream.average_rate or stream.guessed_rate or _DEFAULT_RATE
        self.mean_step = float(1 / (rate * stream.time_base))
        streams = (*stream.container.streams.video, *stream.container.streams.audio)
        starts = [s.start_time * s.time_base for s in streams if s.start_time is not None and s.time_base]
        self.origin = min(starts, default=Fraction(0))  # exact, unlike the container's own, rounded one
        start, end = self._ticks(start), self._ticks(end)
        self._demuxed = None if seek is None else self._ticks(seek), start
        self._reading: Iterator[av.Packet] | None = None
        self._next = 0
        self.stamps: list[Stamp] = []
        self._held: list[av.Packet] | None = []
        self.ended, size = True, 0
        # Damage ends the reading; what was read before it can still be shown.
        with contextlib.suppress(av.error.FFmpegError):
            for packet in _demux(stream, *self._demuxed):
                if packet.dts is not None and packet.dts >= end:
                    self.ended = False
                    break
                self.stamps.append(Stamp(packet.pts, packet.duration, packet.is_keyframe, packet.is_discard))
                size += packet.size
                if size > _MOST_HELD:
                    self._held = None
                else:
                    self._held.append(packet)
                media.check_time()
                media.limits.check_frames(len(self.stamps))

    @property
    def stores_no_times(self) -> bool:
        """Whether the container has no presentation times, so that they are made up from the order of packets."""
        return self.stream.container.format.name == "avi"

    def _ticks(self, seconds: float) -> float:
        return (seconds + float(self.origin)) / float(self.stream.time_base)

    def read(self, first: int = 0, stop: int = _ALL) -> Iterator[av.Packet]:
        """The packets from one place to before another; use them up before the next call."""
        if self._held is not None:
            yield from self._held[first:stop]
            return
        if self._reading is None or first < self._next:
            self._reading, self._next = _demux_again(self.media, *self._demuxed), 0
        while self._next < min(stop, len(self.stamps)) and (packet := next(self._reading, None)) is not None:
            self._next += 1
            if self._next > first:
                yield packet

    def decode(self, first: int = 0, stop: int = _ALL, stamps: Collection[int] = ()) -> Iterator[av.VideoFrame]:
        """The frames of the packets that `read` reads, in display order; packets that the decoder rejects are skipped.

        Where time stamps are given, other frames may be left out: those that no frame refers to are not decoded, which
        saves about a third of the work where there are B-frames.

        Raises `DecodeError` where a frame is larger than it may be, whatever the header says, or time is up.
        """
        media, context = self.media, self.stream.codec_context
        context.flush_buffers()
        for packet in itertools.chain(self.read(first, stop), [None]):
            spare = stamps and packet is not None and packet.pts not in stamps
            context.skip_frame = "NONREF" if spare else "DEFAULT"
            media.check_time()
            width = context.width
            try:
                for frame in context.decode(packet):
                    media.limits.check_picture(frame.width, frame.height)
                    yield frame
            except av.error.FFmpegError as error:
                media.limits.check_picture(context.width, context.height)
                # Most decoders forget the size that they refuse, and dav1d calls it out of range.
                media.oversized |= width > context.width or isinstance(error, OverflowError)


def _demux_again(media: MediaReader, seek: float | None, start: float) -> Iterator[av.Packet]:
    with open_media(media) as (_, stream):
        yield from _demux(stream, seek, start)


def _demux(stream: av.VideoStream, seek: float | None, start: float) -> Iterator[av.Packet]:
    """Packets from `seek` on (ticks, as `start`); see `Packets`."""
    if seek is not None:
        stream.container.seek(math.floor(seek), stream=stream)
    begun = seek is None
    for packet in _demux_all(stream):
        if not packet.size or not (begun or packet.is_keyframe):  # MPEG streams are cut anywhere
            continue
        if not begun and (packet.pts is None or packet.pts > start):
            return
        begun = True
        yield packet


def _demux_all(stream: av.VideoStream) -> Iterator[av.Packet]:
    while True:
        try:
            yield from stream.container.demux(stream)
            return
        except IndexError:  # PyAV does not expect a stream that first appears late, as MPEG files allow
            continue


@dataclasses.dataclass(frozen=True)
class Interval:
    """The packets that show an interval of a media, and when their frames are shown.

    `times` are the frames' times in display order, in seconds from the beginning of the media; `stop` is the time at
    which the last one ends, infinite where the media goes on. `stamps` holds each frame's time stamp, in ticks, and
    `places` the place of its packet in `packets`. Both are None where packets do not say which frame they hold; frames
    are then counted as they are decoded.
    """

    packets: Packets
    times: Float[np.ndarray, " n"]
    stop: float
    stamps: list[int] | None = None
    places: list[int] | None = None


@contextlib.contextmanager
def open_interval(media: MediaReader, start: float, end: float) -> Iterator[Interval]:
    """The packets that show [start, end), in seconds: from a key frame before `start` on.

    Raises `DecodeError`, and whatever PyAV raises, on media that cannot be read.
    """
    for seek in [start - margin for margin in _SEEK_MARGINS if start > margin] + [None]:
        with open_media(media) as (_, stream):
            packets = Packets(media, stream, start, end, seek)
            if packets.stamps or seek is None:
                yield _with_packet_times(packets)
                return


def decode_frames(interval: Interval, choose: Choose, take: Callable[[av.VideoFrame], T]) -> list[T]:
    """What `take` makes of the frames that `choose` picks, each decoded from the key frame before it.

    Frames are freed as soon as they are taken, so memory holds what `take` returns. A damaged frame is replaced by the
    nearest earlier one that is sound, or else by the nearest later one. Raises `UnreliableTimes`, and `DecodeError`
    where none of the frames can be decoded.
    """
    chosen, packets = choose(interval.times, interval.stop).tolist(), interval.packets
    wanted = sorted(set(chosen))
    if interval.places is None:
        frames, _ = _collect(enumerate(packets.decode()), wanted, take)
    else:
        frames = _decode_from_key_frames(interval, wanted, take)
    _check_decoded(frames, packets.media)
    return [frames[number] for number in chosen]


def _decode_from_key_frames(
    interval: Interval, wanted: Sequence[int], take: Callable[[av.VideoFrame], T]
) -> dict[int, T]:
    packets, frames, damaged = interval.packets, {}, []
    for key, group in itertools.groupby(wanted, key=lambda frame: _key_place(interval, frame)):
        targets = list(group)
        stop = max(interval.places[target] for target in targets) + 1
        # AVI's stamps are checked against the decoder's order, which takes every frame.
        stamps = () if packets.stores_no_times else {interval.stamps[target] for target in targets}
        taken, inexact = _collect(_number(interval, packets.decode(key, stop, stamps)), targets, take)
        frames |= taken
        damaged += inexact
    # An open GOP, or a key frame that is damaged itself, can need packets from before the key frame.
    if damaged:
        frames |= _collect(_number(interval, packets.decode()), damaged, take)[0]
    return frames


def _check_decoded(frames: Collection, media: MediaReader) -> None:
    if not frames:
        limit = f"{FIELDS}.max_pixels={media.limits.max_pixels:,}"
        larger = f", or each has more than {limit} pixels" if media.oversized else ""
        raise DecodeError(f"no frame of the media can be decoded{larger}")


def with_decoded_times(interval: Interval) -> Interval:
    """The same interval with times taken from its decoded frames: all its packets are decoded once.

    Frames keep the decoder's order. Their times are their presentation stamps where these increase, else their decoding
    stamps, else they are counted at the mean rate.
    """
    packets = interval.packets
    frames = [(frame.pts, frame.dts) for frame in packets.decode()]
    _check_decoded(frames, packets.media)
    for stamps in (*zip(*frames, strict=True), [None] * len(frames)):
        ticks = fill_times(stamps, packets.mean_step)
        if (np.diff(ticks) > 0).all():
            break
    times, stop = _seconds(packets, ticks, packets.mean_step)
    if stop <= 0:  # stamps that contradict the beginning of the media: it begins with its first frame
        times, stop = times - times[0], stop - float(times[0])
    return Interval(packets, times, max(stop, interval.stop))


def _with_packet_times(packets: Packets) -> Interval:
    """The interval with times from its packets, or without any where these have none."""
    stop, stamped = 0.0 if packets.ended else math.inf, packets.stamps
    # A frame that comes before the first key frame refers to frames that are not there.
    first = stamped[0].pts if stamped and stamped[0].is_keyframe else None
    shown = [
        place
        for place, packet in enumerate(stamped)
        if not packet.is_discard and (first is None or packet.pts is None or packet.pts >= first)
    ]
    if not shown:
        raise DecodeError("the media holds no frame in the interval")
    if not _have_times(packets, [stamped[place].pts for place in shown]):
        return Interval(packets, np.zeros(0), stop)
    places = sorted(shown, key=lambda place: stamped[place].pts)
    stamps = [stamped[place].pts for place in places]
    duration = float(stamped[places[-1]].duration or 0)
    times, shown_until = _seconds(packets, np.array(stamps, dtype=np.float64), duration)
    return Interval(packets, times, max(stop, shown_until), stamps, places)


def _have_times(packets: Packets, stamps: list[int | None]) -> bool:
    """Whether the packets' stamps, in decoding order, are the times of their frames."""
    if None in stamps or len(set(stamps)) < len(stamps):
        return False
    # In a stream with B-frames, time stamps that follow the decoding order cannot be presentation times.
    has_b_frames = packets.stream.codec_context.has_b_frames
    return not (packets.stores_no_times and has_b_frames and stamps == sorted(stamps))


def _seconds(
    packets: Packets, ticks: Float[np.ndarray, " n"], duration: float
) -> tuple[Float[np.ndarray, " n"], float]:
    """Times of frames, and the end of the last one, in seconds; `duration` is the last one's, in ticks."""
    resolution = float(packets.stream.time_base)
    times, step = even_times(ticks * resolution - float(packets.origin), resolution)
    last = duration * resolution
    # A last frame that is held counts; one that a muxer cut short would make a constant rate look uneven.
    if step is not None and last < 1.5 * step:
        last = step
    stop = float(times[-1]) + (last or packets.mean_step * resolution)
    length = stop - float(times[0])
    packets.media.limits.check("max_seconds", length, f"by its time stamps the clip lasts {length:,.0f} s")
    return times, stop


def _key_place(interval: Interval, frame: int) -> int:
    """The packet to decode from: the last key frame that is neither stored nor shown after `frame`."""
    for place in range(interval.places[frame], 0, -1):
        packet = interval.packets.stamps[place]
        if packet.is_keyframe and packet.pts is not None and packet.pts <= interval.stamps[frame]:
            return place
    return 0


def _number(interval: Interval, decoded: Iterable[av.VideoFrame]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames of some of the interval's packets, with their places in display order."""
    stamps, previous = interval.stamps, -1
    for frame in decoded:
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
