"""A trained model on one's own videos: it embeds, describes and answers.

    from vlab_jax import Clip, Predictor

    model = Predictor.load("my_vlab")
    print(model.caption("clip.mp4"))
    print(model.answer(Clip("talk.mp4", start=60, end=75), "what is the man doing?"))

A video is a path or a `file://` URL of a video or an image, the bytes of one, its frames as an array, or a `Clip`: a
part of one; see `clip.Clip`. Lists of any length are taken in batches and read as they are needed. The methods whose
names are plurals (`embeddings`, `captions`, `answers`, `rankings`) take any iterable, and yield each result as soon
as it is there.

Dimensions: `V` videos, `C` texts, `E` embedding width.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from vlab_jax.data import sampling
from vlab_jax.errors import InputError
from vlab_jax.inference.clips import DecodedClip, FrameShape, is_video, read_clips
from vlab_jax.inference.engine import Engine, Trained, bucket, fingerprint, load_trained, one_ahead, padded, parts
from vlab_jax.runtime import sharding

# FOLDED vlab_jax/inference/predictor.py: What a predictor answers with: plain values that print as what they say.  A
# result of a video that could not be read has its reason in `error`, which is empty elsewhere; there is one only
# where `on_error="skip"` was asked for.


@dataclasses.dataclass(frozen=True, eq=False)
class Embedding:
    """The embedding of a video: float32 `[E]`, of unit length; None where it could not be read."""

    video: str
    vector: np.ndarray | None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Caption:
    """What is to be seen in a video, in the model's words.

    `score` is the log-likelihood of the words; of beam search, divided by their number to the length penalty's power.
    """

    video: str
    text: str
    score: float
    error: str = ""

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a question on a video, in the model's words or the likeliest of the options.

    `score` is as in `Caption`; of an option, its log-likelihood.
    """

    video: str
    question: str
    text: str
    score: float
    error: str = ""

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class ScoredText:
    """A text with its score: a cosine, or a log-likelihood."""

    text: str
    score: float

    def __str__(self) -> str:
        return f"{self.score:.3f}  {self.text}"


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Texts by how well they describe a video, the best first; equal ones in the order in which they were given."""

    video: str
    by: str
    texts: tuple[ScoredText, ...]
    error: str = ""

    def __str__(self) -> str:
        return "\n".join(map(str, self.texts))


R = TypeVar("R")

ON_ERROR = ("raise", "skip")
RANK_BY = ("similarity", "likelihood")


class Predictor:
    """A trained model, ready for use; `load` makes one.

    Every method that takes videos has `on_error`: `raise` ends with the first video that cannot be read, `skip` goes on
    without it, and its result says why in `error`.

    Attributes:
      name: what it was loaded as.
      frames: how it looks at a clip: `num_frames` frames, squares of `size` pixels.
      engine: what computes batches of these.
    """

    def __init__(
        self,
        trained: Trained,
        *,
        frames: int | None = None,
        beams: int | None = None,
        batch_size: int = 8,
        workers: int = -1,
    ) -> None:
        """Of a model in memory; see `load`."""
        config = trained.config
        count = config["frames"] if frames is None else frames
        _check_numbers(frames, beams, batch_size)
        self.name = trained.name
        self.frames = FrameShape(count, config["model"]["vision"]["image_size"])
        self._image_frames = sampling.sample_image_frames(count, min(count, config["image_frames"]))
        self._trained, self._workers = trained, workers
        self.engine = Engine(trained, self._image_frames, trained.search(beams))
        self._batch_size = -(-batch_size // self.engine.divisor) * self.engine.divisor
        self._has_cut = False

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        frames: int | None = None,
        beams: int | None = None,
        batch_size: int = 8,
        workers: int = -1,
        dtype: str | None = None,
    ) -> "Predictor":
        """Loads a model, onto all of JAX's devices.

        Args:
          path: a run's workdir (the checkpoint it was tested with, or its newest), its `checkpoints/<step>`, a
            directory that `vlab_jax.export` wrote, or such a model on the hub.
          frames: of a clip; None: as in training. Positions in time are interpolated to other numbers.
          beams: of beam search, for captions and answers; 1 is greedy; None: as the run was evaluated.
          batch_size: clips at once. Batches are filled up to a power of two, and a program is compiled for each.
          workers: processes that decode where there are many clips (`reading.FEW`); -1: two fewer than there are cores,
            0: none. A script that lets them start does its work under `if __name__ == "__main__":`.
          dtype: what matrix products are computed in; None: as in training.

        Raises:
          InputError: there is no such model, it cannot be read, or its parameters are not finite.
        """
        _check_numbers(frames, beams, batch_size)
        trained = load_trained(os.fspath(path), sharding.make_mesh(), dtype)
        return cls(trained, frames=frames, beams=beams, batch_size=batch_size, workers=workers)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of what embeddings depend on: two predictors with the same one embed alike, but for rounding."""
        return fingerprint(self._trained, self.frames, self._image_frames)

    def embed_videos(
        self, videos: Iterable[Any] | Any, *, on_error: str = "raise", progress: bool = False
    ) -> Float[np.ndarray, "V E"]:
        """Embeddings of videos, float32, of unit length; of one that is skipped, NaN, and the log says why.

        Raises:
          InputError: a video cannot be read; it is named.
        """
        many = [videos] if is_video(videos) else videos
        rows = [np.zeros((0, self.engine.embed_width), np.float32)]
        for found in counted(self.embeddings(many, on_error=on_error), _length(many), progress):
            if found.vector is None:
                logging.warning("skipped: %s", found.error)
            rows.append(
                np.full_like(rows[0], np.nan, shape=(1, rows[0].shape[1])) if found.error else found.vector[None]
            )
        return np.concatenate(rows)

    def embeddings(self, videos: Iterable[Any], *, on_error: str = "raise") -> Iterator[Embedding]:
        """The embedding of each video."""
        return self._each(videos, self.engine.embed, lambda read, row: Embedding(read.name, row, read.error), on_error)

    def embed_texts(self, texts: Sequence[str] | str) -> Float[np.ndarray, "C E"]:
        """Embeddings of texts, float32, of unit length. What a text has beyond the model's context is cut off."""
        return self.engine.embed_texts(self._readable(texts, self._trained.tokenizer.context_length - 2))

    def unknown_letters(self, text: str) -> str:
        """Letters of a text that the model's vocabulary lacks, each once: what has them, it cannot have learned."""
        return self._trained.tokenizer.unknown_letters(self._readable(text, self._trained.tokenizer.context_length)[0])

    def similarity(self, videos: Iterable[Any] | Any, texts: Sequence[str] | str) -> Float[np.ndarray, "V C"]:
        """The cosine of each video and each text, -1 to 1."""
        return self.embed_videos(videos) @ self.embed_texts(texts).T

    def caption(self, video: Any, *, on_error: str = "raise", progress: bool = False) -> Caption | list[Caption]:
        """A caption of the video, or of each of a list."""
        return _one_or_all(functools.partial(self.captions, on_error=on_error), video, progress)

    def captions(self, videos: Iterable[Any], *, on_error: str = "raise") -> Iterator[Caption]:
        """A caption of each video."""

        def made(read: DecodedClip, written: tuple[str, float] | None) -> Caption:
            return Caption(read.name, *(written or ("", float("nan"))), read.error)

        return self._each(videos, self.engine.caption, made, on_error)

    def answer(
        self,
        video: Any,
        question: str | Sequence[str],
        *,
        options: Sequence[str] = (),
        on_error: str = "raise",
        progress: bool = False,
    ) -> Answer | list[Answer] | list[list[Answer]]:
        """The answer to a question on a video; of a list of videos, and of a list of questions, a list of answers.

        Args:
          options: answers to choose the likeliest of; without, the model answers in its own words.
        """
        each = functools.partial(self.answers, question=question, options=options, on_error=on_error)
        return _one_or_all(each, video, progress)

    def answers(
        self,
        videos: Iterable[Any],
        question: str | Sequence[str],
        *,
        options: Sequence[str] = (),
        on_error: str = "raise",
    ) -> Iterator[Answer | list[Answer]]:
        """The answer, or the list of answers, of each video."""
        room = self._trained.tokenizer.answer_room
        asked = self._readable(question, self._trained.tokenizer.context_length - room - 1)
        choice = self._readable(list(options), room - 1)

        def made(read: DecodedClip, written: list[tuple[str, float]] | None) -> Answer | list[Answer]:
            words = written or [("", float("nan"))] * len(asked)
            answers = [
                Answer(read.name, *each, read.error) for each in zip(asked, *zip(*words, strict=True), strict=True)
            ]
            return answers[0] if isinstance(question, str) else answers

        return self._each(videos, lambda video: self.engine.answer(video, asked, choice), made, on_error)

    def rank(
        self,
        video: Any,
        texts: Sequence[str],
        *,
        by: str = "similarity",
        on_error: str = "raise",
        progress: bool = False,
    ) -> Ranking | list[Ranking]:
        """Texts by how well they describe the video, or each of a list of videos.

        Args:
          by: `similarity` (the cosine of embeddings), or `likelihood` (how likely the decoder holds the whole text as a
            caption: the logarithm, which favours short texts).
        """
        return _one_or_all(functools.partial(self.rankings, texts=texts, by=by, on_error=on_error), video, progress)

    def rankings(
        self, videos: Iterable[Any], texts: Sequence[str], *, by: str = "similarity", on_error: str = "raise"
    ) -> Iterator[Ranking]:
        """The ranking of the texts for each video."""
        _check_choice("by", by, RANK_BY)
        readable = self._readable(texts, self._trained.tokenizer.context_length - 2)
        if by == "likelihood":
            ask = functools.partial(self.engine.likelihoods, texts=readable)
        else:
            embedded = self.engine.embed_texts(readable).T

            def ask(video: np.ndarray) -> Callable[[], np.ndarray]:
                fetch = self.engine.embed(video)
                return lambda: fetch() @ embedded

        def made(read: DecodedClip, scores: np.ndarray | None) -> Ranking:
            order = [] if scores is None else np.argsort(-scores, kind="stable").tolist()
            return Ranking(read.name, by, tuple(ScoredText(texts[i], float(scores[i])) for i in order), read.error)

        return self._each(videos, ask, made, on_error)

    def _each(
        self,
        videos: Iterable[Any],
        ask: Callable[[np.ndarray], Callable[[], Sequence[Any]]],
        made: Callable[[DecodedClip, Any], R],
        on_error: str,
    ) -> Iterator[R]:
        """A result of each video, in order; `ask` starts the work on a batch, and gives what fetches it."""
        _check_choice("on_error", on_error, ON_ERROR)
        return self._results(videos, ask, made, on_error)

    def _results(self, videos: Any, ask: Any, made: Any, on_error: str) -> Iterator[Any]:
        with contextlib.closing(read_clips(videos, self.frames, self._workers)) as reads:
            batches = parts(_checked(reads, on_error), self._batch_size, lambda read: read.frames is not None)
            for reads_of_batch, rows in one_ahead(self._started(batch, ask) for batch in batches):
                values = iter(rows)
                for read in reads_of_batch:
                    yield made(read, None if read.error else next(values))

    def _started(self, batch: list[DecodedClip], ask: Any) -> Callable[[], tuple[list[DecodedClip], Any]]:
        frames = [read.frames for read in batch if read.frames is not None]
        if not frames:
            return lambda: (batch, ())
        fetch = ask(padded(frames, bucket(len(frames), self._batch_size, self.engine.divisor)))
        return lambda: (batch, fetch())

    def _readable(self, texts: Sequence[str] | str, room: int) -> list[str]:
        """Texts as a tokenizer takes them; that one is longer than `room` tokens is logged once."""
        many = [texts] if isinstance(texts, str) else list(texts)
        # What is no character by itself (half of a pair, bytes of a command line) is read as a question mark.
        readable = [text.encode("utf-8", "replace").decode() for text in many]
        if not self._has_cut:
            for text, count in zip(readable, self._trained.tokenizer.counts(readable), strict=True):
                if count > room:
                    self._has_cut = True
                    logging.warning(
                        "a text of %d tokens is cut to the %d that are read (further ones are not named): %.60s",
                        count,
                        room,
                        text,
                    )
                    break
        return readable


def _checked(reads: Iterable[DecodedClip], on_error: str) -> Iterator[DecodedClip]:
    for read in reads:
        if read.error and on_error == "raise":
            raise InputError(read.error)
        yield read


def _check_numbers(frames: int | None, beams: int | None, batch_size: int) -> None:
    for name, value in (("frames", frames), ("beams", beams), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{name} is {value!r}; it must be {' or '.join(map(repr, known))}")


def _one_or_all(each: Callable[[Iterable[Any]], Iterator[R]], given: Any, progress: bool) -> R | list[R]:
    """A result for each of several videos, or of the one that is given."""
    if is_video(given):
        return next(each([given]))
    return list(counted(each(given), _length(given), progress))


def _length(videos: Iterable[Any]) -> int | None:
    return len(videos) if isinstance(videos, Sized) else None


# FOLDED vlab_jax/inference/predictor.py: A progress bar over what is computed clip by clip, on standard error.


def counted(results: Iterable[R], total: int | None, shown: bool, unit: str = " clips") -> Iterator[R]:
    """The results, counted on the bar as they come, if it is to be shown."""
    yield from _bar(total, shown, iterable=results, unit=unit)


def filled(shares: Iterable[float], total: int, shown: bool, unit: str) -> Iterator[float]:
    """Shares of so many things, added up on the bar as they are done, if it is to be shown."""
    looks = f"{{percentage:3.0f}}%|{{bar}}| {{n:.1f}}/{{total}} {unit} [{{elapsed}}<{{remaining}}]"
    with _bar(total, shown, bar_format=looks) as bar:
        for share in shares:
            bar.update(share)
            yield share


def _bar(total: int | None, shown: bool, **looks: Any) -> tqdm:
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, disable=not shown, file=sys.stderr, mininterval=interval, **looks)


def print_beside(line: str, stream: Any) -> None:
    """Prints a line on a line of its own, where a bar may be in its way."""
    if stream is sys.stderr or (sys.stderr.isatty() and stream.isatty()):
        tqdm.write(line, file=stream)
    else:
        print(line, file=stream, flush=True)
