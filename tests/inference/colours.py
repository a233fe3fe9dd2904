"""Videos of plain colours, and an embedder that knows colours by name, as a trained model would.

As a program, it is `vlab_jax.predict` with that embedder, for one command or several with `then` between them;
`INDEX_KILLED` names a moment at which it kills itself.
"""

import argparse
import functools
import os
import pathlib
import signal
import sys

import numpy as np

sys.path += [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parents[2])]

from numbered_video import encode

from vlab_jax.inference.clips import Clip, FrameShape, load_frames
from vlab_jax.inference.predictor import Answer, Caption

RATE, SIDE, SIZE, NUM_FRAMES = 10, 32, 8, 2
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (128, 128, 128)}
NAMES = {**COLOURS, "红色": COLOURS["red"]}


@functools.cache
def colour_video(*parts: tuple[str, float]) -> bytes:
    """An mp4 of colours, each for so many seconds."""
    frames = [
        np.full((SIDE, SIDE, 3), COLOURS[name], np.uint8)
        for name, seconds in parts
        for _ in range(round(seconds * RATE))
    ]
    return encode(frames, options={"g": "5"}, rate=RATE)


class ColourEmbedder:
    """Embeds, describes and answers by mean colour; `embedded` counts windows."""

    name = "colours"
    frames = FrameShape(NUM_FRAMES, SIZE)

    def __init__(self, fingerprint: str = "colours") -> None:
        self.fingerprint, self.embedded = fingerprint, 0

    def embed_videos(self, videos):
        if not len(videos):
            return np.zeros((0, 4), np.float32)
        self.embedded += len(videos)
        read = [load_frames(Clip(video), self.frames) if isinstance(video, str) else video for video in videos]
        assert all(each.shape == (NUM_FRAMES, SIZE, SIZE, 3) for each in read)
        return np.stack([_unit(each.mean(axis=(0, 1, 2))) for each in read])

    def embed_texts(self, texts):
        return np.stack([_unit(np.array(NAMES.get(text, COLOURS["grey"]), float)) for text in texts])

    def caption(self, video):
        return Caption(video.name, f"all is {self._colour(video)}", -0.5)

    def answer(self, video, question):
        return Answer(video.name, question, self._colour(video), -0.25)

    def unknown_letters(self, text):
        known = "".join(NAMES) + "abcdefghijklmnopqrstuvwxyz"
        return "".join(letter for letter in text if letter.isalpha() and letter not in known)

    def _colour(self, video):
        mean = load_frames(video, self.frames).mean(axis=(0, 1, 2))
        return min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - mean).sum())


def open_colours(args: argparse.Namespace) -> ColourEmbedder:
    """Replaces `cli.open_model`; --model names the fingerprint."""
    return ColourEmbedder(pathlib.Path(args.model).name)


def _unit(colour: np.ndarray) -> np.ndarray:
    centred = np.append(colour - 127.5, 1.0)  # grey must not become zeros
    return (centred / np.linalg.norm(centred)).astype(np.float32)


def _kill_at(moment: str) -> None:
    """Makes this process kill itself in the middle of a write."""
    from vlab_jax.inference import indexing
    from vlab_jax.inference.search_index import SearchIndex

    def killing(self, *arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    indexing._COMMIT_SECONDS = 0.0  # each file by itself
    if moment == "between delete and add":
        remove = SearchIndex.remove

        def remove_and_die(self, files):
            remove(self, files)
            if files:
                killing(self)

        SearchIndex.remove = remove_and_die
    elif moment == "before optimizing":
        SearchIndex.optimize = killing
    elif moment == "from outside":  # writes one file after another, until the test kills it
        add = SearchIndex.add

        def slowly(self, files):
            add(self, files)
            print("written", flush=True)

        SearchIndex.add = slowly


if __name__ == "__main__":
    from vlab_jax import predict
    from vlab_jax.inference import cli

    cli.open_model = open_colours
    _kill_at(os.environ.get("INDEX_KILLED", ""))
    first, *then = " \0 ".join(sys.argv[1:]).split(" \0 then \0 ")
    for arguments in then:
        assert predict.main(first.split(" \0 ")) == 0
        first = arguments
    sys.exit(predict.main(first.split(" \0 ")))
