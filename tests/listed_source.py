"""Data sources of clips in memory, as `tfds.data_source` yields them, in a module that worker processes can import."""

import functools
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlab_jax.data import pipeline, schema, video

BROKEN = b"not a video"


class ListedSource(Sequence):
    """Clips by index, each as the dictionary of bytes and arrays that a data source of the schema yields."""

    def __init__(self, clips: Sequence[schema.ClipRecord]) -> None:
        self._examples = [_raw(clip) for clip in clips]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._examples[index]


class DeadlySource(ListedSource):
    """A source that crashes the process that reads it."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        os.abort()


def grey_clips(count: int, prefix: str = "clip", broken: Sequence[int] = ()) -> ListedSource:
    """`count` clips of 8 grey frames (frame k has level 30 k) and three captions; those in `broken` are no media."""
    return ListedSource(
        [
            schema.ClipRecord(
                id=f"{prefix}-{i}",
                media=BROKEN if i in broken else grey_frames(),
                captions=tuple(f"{prefix} {i} {way}" for way in ("one", "two", "three")),
            )
            for i in range(count)
        ]
    )


class StampedFrames(pipeline.FrameOptions):
    """Frames of one random grey each instead of decoded ones, for tests of random choices: they cost nothing."""

    def decode(self, clip: schema.ClipRecord, rng: np.random.Generator | None) -> np.ndarray:
        if clip.media == BROKEN:
            raise video.DecodeError("it is broken")
        levels = rng.integers(256, size=(self.num_frames, 1, 1, 1), dtype=np.uint8)
        return np.tile(levels, (1, self.size, self.size, 3))


class ProcessFrames(pipeline.FrameOptions):
    """Frames that begin with the process id of the process that makes them, in eight bytes."""

    def decode(self, clip: schema.ClipRecord, rng: np.random.Generator | None) -> np.ndarray:
        frames = np.zeros((self.num_frames, self.size, self.size, 3), np.uint8)
        frames.reshape(-1)[:8] = np.frombuffer(np.uint64(os.getpid()).tobytes(), np.uint8)
        return frames


@functools.cache
def grey_frames() -> tuple[bytes, ...]:
    """Eight JPEGs."""
    return tuple(_jpeg(30 * k) for k in range(8))


def _jpeg(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(buffer, "jpeg")
    return buffer.getvalue()


def _raw(clip: schema.ClipRecord) -> dict[str, Any]:
    example = schema.to_example(clip)
    columns = ("question", "answer", "type", "options")
    return {
        "id": example["id"].encode(),
        "media": example["media"],
        "start": np.float32(clip.start),
        "end": np.float32(clip.end),
        "captions": [caption.encode() for caption in example["captions"]],
        "questions": {key: [question[key].encode() for question in example["questions"]] for key in columns},
    }
