"""The packets of an interval of a media, read without decoding (PyAV).

They are kept, so that going back to a key frame needs no second seek in the file, which many containers do inexactly.
Those of a long video can be more than fits into memory: then only what they say of themselves is kept, and those that
are wanted are read again, in the same order from the same place on.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av

from vlab_jax.data.container import open_media
from vlab_jax.data.limits import Watch
from vlab_jax.data.media import Encoded

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
