"""The ways in which each library reads chosen frames of a video: ours, torchcodec, OpenCV. One thread each.

A reader is a function (the file's bytes, its path, increasing numbers of frames in display order) → the frames, RGB,
upright, in full size. It uses the bytes or the path, whichever suits the library best.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlab_jax.data import video

Reader = Callable[[bytes, pathlib.Path, Sequence[int]], list[np.ndarray]]


class NotRead(Exception):
    """The library returns no frame, or lacks one that exists."""


def ours(media: bytes, _path: pathlib.Path, numbers: Sequence[int]) -> list[np.ndarray]:
    """Reads the time stamps of all packets, then seeks to the key frame before each run of frames."""
    return video.read_frames(media, 0.0, float("inf"), lambda *_: np.array(numbers), lambda frame, _aspect: frame)


def torchcodec(mode: str) -> Reader:
    """`exact` first scans the file for its frames, `approximate` trusts its header."""

    def read(media: bytes, _path: pathlib.Path, numbers: Sequence[int]) -> list[np.ndarray]:
        from torchcodec.decoders import VideoDecoder

        decoder = VideoDecoder(media, seek_mode=mode, num_ffmpeg_threads=1, dimension_order="NHWC")
        return list(decoder.get_frames_at([int(number) for number in numbers]).data.numpy())

    return read


def opencv(seeks: bool) -> Reader:
    """Seeks to each frame by its number, or decodes all frames up to the last one and converts the chosen ones."""

    def read(_media: bytes, path: pathlib.Path, numbers: Sequence[int]) -> list[np.ndarray]:
        import cv2

        # One thread, like the others: in a pipeline, worker processes provide the parallelism.
        capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        try:
            found = _by_seeks(cv2, capture, numbers) if seeks else _in_a_row(capture, numbers)
        finally:
            capture.release()
        return [np.ascontiguousarray(frame[..., ::-1]) for frame in found]

    return read


def _by_seeks(cv2: Any, capture: Any, numbers: Sequence[int]) -> list[np.ndarray]:
    found = []
    for number in numbers:
        capture.set(cv2.CAP_PROP_POS_FRAMES, int(number))
        there, frame = capture.read()
        if not there:
            raise NotRead(f"no frame {number}")
        found.append(frame)
    return found


def _in_a_row(capture: Any, numbers: Sequence[int]) -> list[np.ndarray]:
    wanted, found = set(map(int, numbers)), {}
    for number in range(max(wanted) + 1):
        if not capture.grab():
            raise NotRead(f"no frame {number}")
        if number in wanted:
            found[number] = capture.retrieve()[1]
    return [found[int(number)] for number in numbers]


READERS: dict[str, Reader] = {
    "ours": ours,
    "torchcodec, exact": torchcodec("exact"),
    "torchcodec, approximate": torchcodec("approximate"),
    "OpenCV, seeks": opencv(True),
    "OpenCV, in a row": opencv(False),
}
