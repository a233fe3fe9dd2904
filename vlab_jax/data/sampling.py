"""Which frames a clip shows: arithmetic on times and indices, without decoding.

A clip is sampled segment by segment (TSN, arXiv 1608.00859, section 3.1). Evaluation takes the segments' centres, such
that a clip played backwards shows the same frames in reverse order; a model that ignores order then scores exactly the
same on both.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from vlab_jax.errors import InputError

# Moves a centre off a boundary between two frames. A centre that is no boundary lies at least 1 / (2 n)
# segments away from one, n the frames of the clip, so it stays in its frame for every n below 5 million.
_NUDGE = 1e-7


def segment_times(
    start: float | int, end: float | int, num_frames: int, rng: np.random.Generator | None = None
) -> Float[np.ndarray, " t"]:
    """One time, in seconds, in each of `num_frames` equal segments of [start, end), in increasing order.

    With an `rng` the time is uniformly random in its segment; without, it is the segment's centre. Centres in the first
    half are moved earlier, and the others later, by a ten-millionth of a segment: a centre between two frames then
    shows the outer one, and sampling is symmetric under time reversal (reconstruction).

    Raises `InputError` where `num_frames` is below 1.
    """
    _check_count("num_frames", num_frames)
    order = np.arange(num_frames)
    centres = 0.5 + np.where(2 * order + 1 < num_frames, -_NUDGE, _NUDGE)
    offsets = centres if rng is None else rng.random(num_frames)
    return start + (order + offsets) * ((end - start) / num_frames)


def frames_at(times: Float[np.ndarray, " t"], frame_times: Float[np.ndarray, " n"]) -> Int[np.ndarray, " t"]:
    """The index of the frame that is shown at each time: the latest that starts at or before it.

    `frame_times` (seconds) increase. A time before the first frame shows the first frame.
    """
    return np.maximum(np.searchsorted(frame_times, times, side="right") - 1, 0)


def even_times(frame_times: Float[np.ndarray, " n"], resolution: float) -> tuple[Float[np.ndarray, " n"], float | None]:
    """Frame times without the container's rounding, and the constant time between two frames (seconds).

    Containers round time stamps to multiples of `resolution` seconds (Matroska: 0.001), which makes a constant rate
    uneven. Times that lie on an even grid but for rounding are put on that grid. A variable rate is returned unchanged,
    with None, and so is a single frame.
    """
    if len(frame_times) < 2:
        return frame_times, None
    step = float(frame_times[-1] - frame_times[0]) / (len(frame_times) - 1)
    grid = frame_times[0] + step * np.arange(len(frame_times))
    # The second bound keeps the dropped frames of coarse clocks, where one tick is one whole frame (AVI).
    if np.abs(grid - frame_times).max() > min(resolution, step / 8) * 1.001:
        return frame_times, None
    return grid, step


def fill_times(stamps: Sequence[int | None], step: float) -> Float[np.ndarray, " n"]:
    """Time stamps (ticks, in display order) with missing ones interpolated, and continued by `step` at the ends.

    Without any stamp, frames are counted from 0.
    """
    order = np.arange(len(stamps))
    known = np.array([i for i, stamp in enumerate(stamps) if stamp is not None], dtype=np.int64)
    if len(known) == 0:
        return order * float(step)
    values = np.array([float(stamps[i]) for i in known])
    before = np.maximum(known[0] - order, 0)
    after = np.maximum(order - known[-1], 0)
    return np.interp(order, known, values) + step * (after - before)


def sample_image_frames(num_frames: int, num_image_frames: int) -> tuple[int, ...]:
    """Which of a clip's `num_frames` sampled frames the image stream sees: increasing and evenly spread.

    The frame at the centre of each of `num_image_frames` equal segments, as `segment_times` has them, so the choice is
    symmetric under time reversal (except the middle frame of an odd choice among an even number, which is the later
    one). Reconstruction.

    Raises `InputError` where `num_image_frames` is larger than `num_frames`, or a count is below 1.
    """
    _check_count("num_frames", num_frames)
    _check_count("num_image_frames", num_image_frames)
    if num_image_frames > num_frames:
        raise InputError(
            f"num_image_frames is {num_image_frames}, but a clip has num_frames = {num_frames}: "
            "the image stream sees a part of the clip's frames, so lower num_image_frames"
        )
    return tuple(segment_times(0, num_frames, num_image_frames).astype(int).tolist())


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{name} is {value}; it must be at least 1")
