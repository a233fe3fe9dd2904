"""The packets of a stream: kept in memory, or, where they are many bytes, noted and read again when they are decoded.

So hours of video take as much memory as the notes on their packets.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import av

KEPT = 64 * 2**20  # bytes of packets that are kept


class Note(NamedTuple):
    """What is known of a packet without its data; `position` is its place in the file."""

    pts: int | None
    dts: int | None
    duration: int | None
    size: int
    position: int | None
    is_keyframe: bool
    is_discard: bool


class PacketList:
    """Packets in decoding order. Its items say what packets are, its slices give the packets themselves.

    Args:
      container, stream: which the packets are read from.
      reopen: opens the same media once more, for containers that do not seek exactly.
    """

    def __init__(
        self,
        container: av.container.InputContainer,
        stream: av.VideoStream,
        reopen: Callable[[], contextlib.AbstractContextManager[tuple[av.container.InputContainer, av.VideoStream]]],
    ) -> None:
        self._container, self._stream, self._reopen = container, stream, reopen
        self._items: list[av.Packet | Note] = []
        self._bytes = 0

    def append(self, packet: av.Packet) -> None:
        """Adds a packet."""
        before, self._bytes = self._bytes, self._bytes + packet.size
        if self._bytes > KEPT and before <= KEPT:
            self._items = [_note(each) for each in self._items]
        self._items.append(_note(packet) if self._bytes > KEPT else packet)

    @property
    def kept(self) -> bool:
        """Whether the packets are in memory."""
        return self._bytes <= KEPT

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[av.Packet | Note]:
        return iter(self._items)

    def __getitem__(self, place: int | slice) -> "av.Packet | Note | Iterable[av.Packet]":
        if isinstance(place, slice) and not self.kept:
            return self._read_again(self._items[place])
        return self._items[place]

    def _read_again(self, notes: list[Note]) -> Iterator[av.Packet]:
        """The packets that consecutive notes are of."""
        if not notes:
            return
        first = None
        if notes[0].pts is not None and notes[0].is_keyframe:
            with contextlib.suppress(av.error.FFmpegError):
                self._container.seek(notes[0].pts, stream=self._stream)
                packets = self._container.demux(self._stream)
                first = _find(packets, notes[0])
                if first is not None:
                    yield from _so_many(first, packets, len(notes))
        if first is None:
            with self._reopen() as (container, stream):
                packets = container.demux(stream)
                first = _find(packets, notes[0])
                if first is not None:
                    yield from _so_many(first, packets, len(notes))


def _note(packet: av.Packet) -> Note:
    if isinstance(packet, Note):
        return packet
    return Note(packet.pts, packet.dts, packet.duration, packet.size, packet.pos, packet.is_keyframe, packet.is_discard)


def _find(packets: Iterable[av.Packet], note: Note) -> av.Packet | None:
    """The packet that a note is of, if it is still to come."""
    for packet in packets:
        if packet.size and _same(packet, note):
            return packet
        if packet.size and None not in (packet.pos, note.position) and packet.pos > note.position:
            return None
    return None


def _same(packet: av.Packet, note: Note) -> bool:
    """Whether a note is of a packet: by their place, since times are made up anew where the container lacks some."""
    if None not in (packet.pos, note.position):
        return (packet.pos, packet.size) == (note.position, note.size)
    return (packet.pts, packet.dts, packet.size) == (note.pts, note.dts, note.size)


def _so_many(first: av.Packet, others: Iterator[av.Packet], count: int) -> Iterator[av.Packet]:
    yield first
    yield from itertools.islice((packet for packet in others if packet.size), count - 1)
