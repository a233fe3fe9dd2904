"""How many clips are decoded ahead of the training step: as many as a bound on memory allows.

Worker processes hand pieces of a batch over in shared memory, and the main process joins them. The size of a piece and
the number of workers follow from the bound, so that all pieces that exist at once fit into it.
"""

import os
from typing import NamedTuple

from vlab_jax.errors import InputError

PREFETCH_GIGABYTES = 8.0
SHARED_MEMORY = "/dev/shm"
# Pieces that exist at once for each worker, with Grain's buffer of one (`mp_prefetch` of Grain 0.2.18): one is decoded,
# one waits for room in the worker's queue, one is in the queue, and in the main process one waits for room in the
# buffer that a thread fills from the queue, and one is in that buffer. All but the first are in shared memory.
PIECES_PER_WORKER = 5
# One is copied into its batch, and the memory of the one before is being freed, by a thread of Grain's.
PIECES_IN_MAIN = 2
THREADS, PIECES_OF_THREADS = 2, 4  # without worker processes: two are decoded or wait, one is copied, one is freed
_TEXT_BYTES = 4096  # of a clip besides its frames: tokens, and rounding to pages


class PrefetchMemory(NamedTuple):
    """What an iterator over batches may hold ahead.

    Attributes:
      gigabytes: GiB of host memory, for all processes of a run on this host (`data.prefetch_gigabytes`).
      shared: bytes that are free in shared memory; None: not known, as where there is no `/dev/shm`.
      shares: iterators that share these, of all processes on this host.
    """

    gigabytes: float = 8.0
    shared: int | None = None
    shares: int = 1


DEFAULT_MEMORY = PrefetchMemory()


class Prefetch(NamedTuple):
    """How batches are made ahead.

    Attributes:
      workers: processes that decode; 0: threads of this one.
      piece: clips that a worker hands over at once.
      ahead: whether the next batch is joined while one is in use.
      note: what is less than asked for and why, in one line; empty: nothing.
    """

    workers: int
    piece: int
    ahead: bool = True
    note: str = ""


def free_shared_memory() -> int | None:
    """Bytes that are free in `/dev/shm`; None where there is none."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def plan_prefetch(memory: PrefetchMemory, *, batch: int, frame_bytes: int, workers: int) -> Prefetch:
    """The pieces that batches are made of, and the workers that make them, within a bound on memory.

    Pieces are so small that all workers take part in the first batch, and that no more than about three batches exist
    at once. Where the bound is too small for all workers, there are fewer.

    Args:
      batch: clips of a batch of this process.
      frame_bytes: of a clip's frames.
      workers: processes that may decode; 0: threads of this process, which need no shared memory and hold the least
        there can be where the bound is smaller.

    Raises:
      InputError: not even one worker with pieces of one clip fits.
    """
    clip = frame_bytes + _TEXT_BYTES
    asked = int(memory.gigabytes * 2**30) // memory.shares
    ahead = batch * clip <= asked // 2
    room = (asked - ahead * batch * clip) // clip
    if not workers:
        return Prefetch(0, max(1, min(room // PIECES_OF_THREADS, batch // PIECES_OF_THREADS)), ahead)
    free = room if memory.shared is None else min(room, memory.shared // memory.shares // clip)
    if free < pieces_at_once(1):
        raise InputError(_refusal(memory, clip, free < room))
    fitting, piece = _fit(free, batch, workers)
    note = ""
    if (fitting, piece) != _fit(room, batch, workers):
        note = (
            f"{SHARED_MEMORY} has {_mebibytes(memory.shared)} MiB free, less than data.prefetch_gigabytes="
            f"{memory.gigabytes:g}: {fitting} of {workers} worker processes decode, in pieces of {piece}; a larger one "
            "(in a container: --shm-size) may be faster"
        )
    elif fitting < workers:
        note = (
            f"data.prefetch_gigabytes={memory.gigabytes:g} is enough for {fitting} of {workers} worker processes; "
            "where memory allows more, raise it"
        )
    return Prefetch(fitting, piece, ahead, note)


def pieces_at_once(workers: int) -> int:
    """How many pieces exist at once with so many worker processes."""
    return PIECES_PER_WORKER * workers + PIECES_IN_MAIN


def _fit(clips: int, batch: int, workers: int) -> tuple[int, int]:
    """As many workers as so many clips allow, and the size of a piece."""
    fitting = min(workers, max(1, (clips - PIECES_IN_MAIN) // PIECES_PER_WORKER))
    return fitting, min(clips // pieces_at_once(fitting), max(1, batch // (2 * fitting)))


def _refusal(memory: PrefetchMemory, clip: int, is_shared: bool) -> str:
    least = pieces_at_once(1) * clip * memory.shares
    if is_shared:
        return (
            f"{SHARED_MEMORY}, through which worker processes hand clips over, has {_mebibytes(memory.shared)} MiB "
            f"free and must have {_mebibytes(least, up=True)} MiB: make it larger (in a container: --shm-size=8g), or "
            "decode in threads with --config.data.workers=0"
        )
    return (
        f"data.prefetch_gigabytes={memory.gigabytes:g} is too little for clips of {_mebibytes(clip, up=True)} MiB: set "
        f"at least --config.data.prefetch_gigabytes={-(-least // 2**26) / 16:g}, or decode in threads with "
        "--config.data.workers=0"
    )


def _mebibytes(size: int, up: bool = False) -> int:
    return -(-size // 2**20) if up else size // 2**20
