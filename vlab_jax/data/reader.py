"""Clips of data sources, read and decoded; a clip that has ended a worker process is not decoded again."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from vlab_jax.data import schema, video
from vlab_jax.data.in_hand import NOWHERE, InHand, Note
from vlab_jax.data.limits import DEFAULT_LIMITS, MediaLimits
from vlab_jax.data.patience import DamagedRecord


class Unreadable(Exception):
    """A clip that cannot be decoded, or whose record is damaged; it says which and why."""


@dataclasses.dataclass(frozen=True)
class FrameOptions:
    """How a clip becomes frames; see `video.decode_clip`."""

    num_frames: int
    size: int
    short: str = "repeat"
    limits: MediaLimits = DEFAULT_LIMITS

    @property
    def nbytes(self) -> int:
        """Bytes of a clip's frames."""
        return self.num_frames * self.size**2 * 3

    def decode(self, clip: schema.Clip, rng: np.random.Generator | None) -> np.ndarray:
        """uint8 RGB frames `[T, S, S, 3]`."""
        return video.decode_clip(
            clip.media,
            num_frames=self.num_frames,
            size=self.size,
            start=clip.start,
            end=clip.end,
            rng=rng,
            short=self.short,
            limits=self.limits,
        )


@dataclasses.dataclass(frozen=True)
class Reader:
    """Decodes clips of the sources, and notes which one while it does.

    `lost` are clips that have brought a worker process down, with the reason: they are not decoded again.
    """

    sources: tuple[Sequence, ...]
    frames: FrameOptions
    in_hand: InHand = NOWHERE
    lost: Mapping[tuple[int, str], str] = dataclasses.field(default_factory=dict)

    def clip(self, number: int, index: int) -> schema.Clip:
        """The clip at a place of a source."""
        return schema.from_example(self.sources[number][index])

    def read(
        self, number: int, index: int, rng: np.random.Generator | None
    ) -> tuple[schema.Clip, UInt8[np.ndarray, "t s s 3"]]:
        """The clip at a place of a source, and its frames. Raises `Unreadable`."""
        try:
            clip = self.clip(number, index)
        except DamagedRecord as error:
            raise Unreadable(str(error)) from error
        if reason := self.lost.get((number, clip.id)):
            raise Unreadable(f"{clip.id}: {reason}")
        try:
            with self.in_hand.noted(Note(number, index, clip.id, rng)):
                return clip, self.frames.decode(clip, rng)
        except video.DecodeError as error:
            raise Unreadable(f"{clip.id}: {error}") from error

    def again(self, note: Note) -> None:
        """Decodes what a process was at when it ended."""
        self.frames.decode(self.clip(note.source, note.index), note.rng)
