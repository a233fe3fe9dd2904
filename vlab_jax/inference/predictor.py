"""A trained model on one's own videos: it embeds, describes and answers.

A video is a path or a `file://` URL of a video or an image, the bytes of one, its frames as an array, or a `Clip`, a
part of one. Lists of any length are decoded in batches, as they are needed. The methods with plural names
(`embeddings`, `captions`, `answers`, `rankings`) take any iterable, and yield each result as soon as it is there.
Results are plain values that print as their text.

Dimensions: `V` videos, `C` texts, `E` embedding width.
"""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from vlab_jax.data import sampling
from vlab_jax.errors import InputError
from vlab_jax.inference import engine
from vlab_jax.inference.clips import DecodedClip, FrameShape, is_video, load_clips
from vlab_jax.runtime import sharding


@dataclasses.dataclass(frozen=True, eq=False)
class Embedding:
    """The embedding of a video: float32 `[E]`, of unit length; None where it could not be read."""

    video: str
    vector: np.ndarray | None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Caption:
    """A description of a video in the model's words, and the log-likelihood of the text.

    With beam search, the score is divided by the text's length to the length penalty's power.
    """

    video: str
    text: str
    score: float
    error: str = ""

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a question on a video: in the model's words, scored as a `Caption`, or the likeliest option."""

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
    """Texts by how well they describe a video, the best first; equal ones in their original order."""

    video: str
    by: str
    texts: tuple[ScoredText, ...]
    error: str = ""

    def __str__(self) -> str:
        return "\n".join(map(str, self.texts))


R = TypeVar("R")

_NO_TEXT: engine.TextAndScore = ("", float("nan"))


class Predictor:
    """A trained model, ready for use; `load` makes one from the place `name`. It sees `frames` of a clip.

    Every method that takes videos has `on_error`: `raise` ends with the first video that cannot be read; `skip` goes on
    with the others, and the result of that video has the reason in `error`, which is empty elsewhere.
    """

    def __init__(
        self,
        trained: engine.TrainedModel,
        *,
        frames: int | None = None,
        beams: int | None = None,
        batch_size: int = 8,
        workers: int = -1,
    ) -> None:
        """Makes a predictor of a model in memory; for the arguments see `load`."""
        config = trained.config
        count = config["frames"] if frames is None else frames
        _check_numbers(frames, beams, batch_size)
        self.name = trained.name
        self.frames = FrameShape(count, config["model"]["vision"]["image_size"])
        self._image_frames = sampling.sample_image_frames(count, min(count, config["image_frames"]))
        self._trained, self._tokenizer, self._workers = trained, trained.tokenizer, workers
        self.engine = engine.Engine(trained, self._image_frames, trained.generation(beams))
        self._batch_size = -(-batch_size // self.engine.divisor) * self.engine.divisor
        self._warned_of_cut = False

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
        """Loads a model onto all of JAX's devices.

        Args:
          path: a run's workdir (the checkpoint it was tested with, or its newest), its `checkpoints/<step>`, a
            directory that `vlab_jax.export` wrote, or such a model on the hub.
          frames: how many of a clip the model sees; None: as in training. For other numbers, temporal positions are
            interpolated.
          beams: of beam search, for captions and answers; 1 is greedy; None: as the run was evaluated.
          batch_size: clips at once. Batches are padded to a power of two, and a program is compiled for each.
          workers: processes that decode where there are over `clips.MAX_IN_PROCESS` clips; -1: two fewer than there
            are cores, 0: none. A script that uses them does its work under `if __name__ == "__main__":`.
          dtype: of matrix products; None: as in training.

        Raises:
          InputError: there is no such model, it cannot be read, or its parameters are not finite.
        """
        _check_numbers(frames, beams, batch_size)
        trained = engine.load_trained_model(os.fspath(path), sharding.make_mesh(), dtype)
        return cls(trained, frames=frames, beams=beams, batch_size=batch_size, workers=workers)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of all that embeddings depend on: predictors with the same one embed alike, but for rounding."""
        return engine.fingerprint(self._trained, self.frames, self._image_frames)

    def embed_videos(self, videos: Iterable[Any] | Any, *, on_error: str = "raise") -> Float[np.ndarray, "V E"]:
        """Embeddings of videos, float32, of unit length; a skipped video has NaN, and the log has the reason."""
        rows, missing = [], np.full(self.engine.embed_width, np.nan, np.float32)
        for each in self.embeddings([videos] if is_video(videos) else videos, on_error=on_error):
            if each.error:
                logging.warning("skipped: %s", each.error)
            rows.append(missing if each.vector is None else each.vector)
        return np.array(rows, np.float32).reshape(len(rows), self.engine.embed_width)

    def embeddings(self, videos: Iterable[Any], *, on_error: str = "raise") -> Iterator[Embedding]:
        """The embedding of each video."""
        return self._map(videos, self.engine.embed, lambda clip, row: Embedding(clip.name, row, clip.error), on_error)

    def embed_texts(self, texts: Sequence[str] | str) -> Float[np.ndarray, "C E"]:
        """Embeddings of texts, float32, of unit length. A text is cut where it exceeds the model's context."""
        return self.engine.embed_texts(self._clean(texts, self._tokenizer.context_length - 2))

    def unknown_letters(self, text: str) -> str:
        """The letters of a text that the model's vocabulary lacks, each once: words with them mean nothing to it."""
        return self._tokenizer.unknown_letters(self._clean(text, self._tokenizer.context_length)[0])

    def similarity(self, videos: Iterable[Any] | Any, texts: Sequence[str] | str) -> Float[np.ndarray, "V C"]:
        """The cosine of each video and each text, -1 to 1."""
        return self.embed_videos(videos) @ self.embed_texts(texts).T

    def caption(self, video: Any, *, on_error: str = "raise") -> Caption | list[Caption]:
        """A caption of the video, or of each of a list."""
        return _one_or_all(self.captions, video, on_error=on_error)

    def captions(self, videos: Iterable[Any], *, on_error: str = "raise") -> Iterator[Caption]:
        """A caption of each video."""

        def make(clip: DecodedClip, generated: engine.TextAndScore | None) -> Caption:
            return Caption(clip.name, *(generated or _NO_TEXT), clip.error)

        return self._map(videos, self.engine.caption, make, on_error)

    def answer(
        self, video: Any, question: str | Sequence[str], *, options: Sequence[str] = (), on_error: str = "raise"
    ) -> Answer | list[Answer] | list[list[Answer]]:
        """The answer to a question on a video; a list of answers for a list of videos, or for a list of questions.

        Args:
          options: answers to choose the likeliest of; without, the model answers in its own words.
        """
        return _one_or_all(self.answers, video, question=question, options=options, on_error=on_error)

    def answers(
        self,
        videos: Iterable[Any],
        question: str | Sequence[str],
        *,
        options: Sequence[str] = (),
        on_error: str = "raise",
    ) -> Iterator[Answer | list[Answer]]:
        """The answer, or the list of answers, of each video."""
        room = self._tokenizer.max_answer_tokens
        questions = self._clean(question, self._tokenizer.context_length - room - 1)
        choice = self._clean(options, room - 1)

        def make(clip: DecodedClip, texts: list[engine.TextAndScore] | None) -> Answer | list[Answer]:
            pairs = zip(questions, texts or [_NO_TEXT] * len(questions), strict=True)
            answers = [Answer(clip.name, each, *text, clip.error) for each, text in pairs]
            return answers[0] if isinstance(question, str) else answers

        return self._map(videos, lambda batch: self.engine.answer(batch, questions, choice), make, on_error)

    def rank(
        self, video: Any, texts: Sequence[str], *, by: str = "similarity", on_error: str = "raise"
    ) -> Ranking | list[Ranking]:
        """Texts by how well they describe the video, or each of a list of videos.

        Args:
          by: `similarity` (the cosine of embeddings), or `likelihood` (the log-likelihood of the whole text as a
            caption, by the decoder; it favours short texts).
        """
        return _one_or_all(self.rankings, video, texts=texts, by=by, on_error=on_error)

    def rankings(
        self, videos: Iterable[Any], texts: Sequence[str], *, by: str = "similarity", on_error: str = "raise"
    ) -> Iterator[Ranking]:
        """The ranking of the texts for each video."""
        _check_choice("by", by, ("similarity", "likelihood"))
        texts = self._clean(texts, self._tokenizer.context_length - 2)
        if by == "likelihood":
            start = functools.partial(self.engine.likelihoods, texts=texts)
        else:
            of_texts = self.engine.embed_texts(texts).T

            def start(batch: np.ndarray) -> Callable[[], np.ndarray]:
                fetch = self.engine.embed(batch)
                return lambda: fetch() @ of_texts

        def make(clip: DecodedClip, scores: np.ndarray | None) -> Ranking:
            order = [] if scores is None else np.argsort(-scores, kind="stable").tolist()
            ranked = tuple(ScoredText(texts[place], float(scores[place])) for place in order)
            return Ranking(clip.name, by, ranked, clip.error)

        return self._map(videos, start, make, on_error)

    def _map(
        self,
        videos: Iterable[Any],
        start: Callable[[np.ndarray], Callable[[], Sequence[Any]]],
        make: Callable[[DecodedClip, Any], R],
        on_error: str,
    ) -> Iterator[R]:
        """The results of videos, in order.

        Args:
          start: starts the work on a batch of frames, and returns a function that fetches a value for each clip.
          make: makes the result of a clip and its value, which is None where the clip could not be read.
        """
        _check_choice("on_error", on_error, ("raise", "skip"))
        with contextlib.closing(load_clips(videos, self.frames, self._workers)) as clips:
            started = (self._start(batch, start) for batch in engine.split_batches(clips, self._batch_size, on_error))
            for batch, values in engine.one_ahead(started):
                values = iter(values)
                for clip in batch:
                    yield make(clip, None if clip.error else next(values))

    def _start(self, batch: list[DecodedClip], start: Any) -> Callable[[], tuple[list[DecodedClip], Any]]:
        frames = [clip.frames for clip in batch if clip.frames is not None]
        if not frames:
            return lambda: (batch, ())
        fetch = start(engine.pad_batch(frames, engine.bucket_size(len(frames), self._batch_size, self.engine.divisor)))
        return lambda: (batch, fetch())

    def _clean(self, texts: Sequence[str] | str, max_tokens: int) -> list[str]:
        """Texts that the tokenizer accepts; the first one that is longer than `max_tokens` is logged."""
        texts = [texts] if isinstance(texts, str) else texts
        # What is no character by itself (half of a surrogate pair, bytes of a command line) becomes a question mark.
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        for text, count in zip(texts, self._tokenizer.count_tokens(texts), strict=True):
            if count > max_tokens and not self._warned_of_cut:
                self._warned_of_cut = True
                message = "a text of %d tokens is cut to the %d that the model reads (logged once): %.60s"
                logging.warning(message, count, max_tokens, text)
        return texts


def _check_numbers(frames: int | None, beams: int | None, batch_size: int) -> None:
    for name, value in (("frames", frames), ("beams", beams), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name} is {value!r}; it must be {' or '.join(map(repr, choices))}")


def _one_or_all(method: Callable[..., Iterator[R]], videos: Any, **options: Any) -> R | list[R]:
    """The result of one video, or the list of results of several."""
    return next(method([videos], **options)) if is_video(videos) else list(method(videos, **options))
