"""The clip that a worker process is at: known after a decoder has brought the process down, or did not come back.

Before a worker decodes a clip it notes which, and sets the system's alarm clock, which ends the process where decoding
takes too long, even if the decoder never returns to Python. What a dead worker has noted is tried again in a process of
its own, so that a clip is blamed for what it does and not for what the system did.
"""

import contextlib
import dataclasses
import os
import pathlib
import pickle
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vlab_jax.data.workers import alone, end_after

ENDED = "the process that decoded it ended: a crash of the decoder, too little memory, or more time than it may take"


@dataclasses.dataclass(frozen=True)
class Note:
    """A clip that is being decoded: its source and place there, its id, and the generator its frames are drawn by."""

    source: int
    index: int
    id: str
    rng: np.random.Generator | None

    @property
    def clip(self) -> tuple[int, str]:
        """What tells the clip from others."""
        return self.source, self.id


@dataclasses.dataclass(frozen=True)
class InHand:
    """Where worker processes note what they are at.

    Attributes:
      folder: of the notes, one a process; empty: nothing is noted or timed, as where threads of the main process
        decode.
      seconds: after which a process that is at one clip is ended.
    """

    folder: str = ""
    seconds: float | int = 0.0

    @contextlib.contextmanager
    def noted(self, note: Note) -> Iterator[None]:
        """Notes a clip while it is decoded."""
        if not self.folder:
            yield
            return
        path = pathlib.Path(self.folder, str(os.getpid()))
        path.write_bytes(pickle.dumps(note))  # a folder that this program made for its own processes
        try:
            with end_after(self.seconds):
                yield
        finally:
            path.unlink()

    def left(self) -> list[Note]:
        """What processes that have ended were at, the longest first; their notes are removed."""
        paths = sorted(pathlib.Path(self.folder).iterdir(), key=lambda path: path.stat().st_mtime_ns)
        contents = [path.read_bytes() for path in paths]
        for path in paths:
            path.unlink()
        return [pickle.loads(content) for content in contents if content]


NOWHERE = InHand()


def guilty(notes: Sequence[Note], exit_code: int | None, read: Any, seconds: float | int) -> dict[tuple[int, str], str]:
    """Which of the clips that dead workers were at are to blame, and why.

    Args:
      notes: the longest in hand first.
      exit_code: of the process whose end was seen first, where it is known.
      read: decodes a note's clip again; pickled.
      seconds: after which a process that is at one clip is ended.
    """
    if exit_code == -signal.SIGALRM and notes:
        return {notes[0].clip: f"it was not decoded within {seconds:g} s, after which its process was ended"}
    tried = {note.clip: alone(_Again(read, seconds), note, lambda note: ENDED) for note in notes}
    return {clip: reason for clip, reason in tried.items() if reason}


@dataclasses.dataclass(frozen=True)
class _Again:
    """Decodes what a note says; that it cannot be decoded is no crime."""

    read: Any
    seconds: float | int

    def __call__(self, note: Note) -> str:
        with end_after(self.seconds), contextlib.suppress(Exception):
            self.read(note)
        return ""
