"""The device's side of a predictor: batches of clips and texts in, numbers and words out.

What is asked of a batch is started at once; the function that comes back waits for it, and fetches it.

Dimensions: `B` clips, `T` frames, `S` pixels, `C` texts, `E` embedding width.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from vlab_jax.inference.batches import bucket
from vlab_jax.inference.trained import Trained
from vlab_jax.models import compiled
from vlab_jax.models.cached_decoder import Memory
from vlab_jax.models.generation import Search, Texts
from vlab_jax.models.likelihood import TEXTS_AT_ONCE, chunks, stacked, text_likelihoods
from vlab_jax.runtime import sharding

TEXTS = 64  # that are embedded at once

Written = tuple[str, float]  # words, and their score


class Engine:
    """A model on its mesh, as it looks at clips.

    Args:
      image_frames: which of a clip's frames the image stream sees.
      search: how texts are written.
    """

    def __init__(self, trained: Trained, image_frames: tuple[int, ...], search: Search) -> None:
        self._trained, self._mesh, self._search = trained, trained.mesh, search
        self._model, self._tokenizer = trained.model, trained.tokenizer
        self._looks = (trained.model, trained.streams, image_frames, trained.parameters)
        self._decoder_parameters = trained.parameters["decoder"]
        self.divisor = sharding.batch_divisor(trained.mesh)  # of batches

    @property
    def embed_width(self) -> int:
        """`E`."""
        return self._model.vision["embed_width"]

    def embed(self, video: UInt8[np.ndarray, "B T S S 3"]) -> Callable[[], Float[np.ndarray, "B E"]]:
        """Embeddings of clips, of unit length."""
        embedded = self._on_mesh(compiled.embed_clips, *self._looks, self._placed(video))
        return lambda: np.asarray(embedded)

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "C E"]:
        """Embeddings of texts, of unit length."""
        rows = [np.zeros((0, self.embed_width), np.float32)]
        most = -(-TEXTS // self.divisor) * self.divisor
        for part in chunks(texts, most):
            full = [*part, *[""] * (bucket(len(part), most, self.divisor) - len(part))]
            tokens, lengths = map(self._placed, self._tokenizer(full))
            embedded = self._on_mesh(compiled.embed_texts, self._model, self._trained.parameters, tokens, lengths)
            rows.append(np.asarray(embedded)[: len(part)])
        return np.concatenate(rows)

    def caption(self, video: UInt8[np.ndarray, "B T S S 3"]) -> Callable[[], list[Written]]:
        """A caption of each clip."""
        prefix = np.full((len(video), 1), self._tokenizer.start, np.int32)
        return self._write(self._remember(video), self._search, prefix, np.ones(len(video), np.int32))

    def answer(
        self, video: UInt8[np.ndarray, "B T S S 3"], questions: Sequence[str], options: Sequence[str]
    ) -> Callable[[], list[list[Written]]]:
        """For each clip its answers to all of the questions: the model's own words, or the likeliest option."""
        memory = self._remember(video)
        asked = [self._tokenizer.questions([question] * len(video)) for question in questions]
        if options:
            texts = self._tokenizer.answers(options)
            scores = [self._likelihoods(memory, prefix, texts, self._tokenizer.answer_room) for prefix in asked]
            best = [[(options[row.argmax()], float(row.max())) for row in each] for each in scores]
            return lambda: [list(answers) for answers in zip(*best, strict=True)]
        room = min(self._search.max_tokens, self._tokenizer.answer_room)
        search = dataclasses.replace(self._search, max_tokens=room)
        fetches = [self._write(memory, search, *prefix) for prefix in asked]
        return lambda: [list(answers) for answers in zip(*[fetch() for fetch in fetches], strict=True)]

    def likelihoods(
        self, video: UInt8[np.ndarray, "B T S S 3"], texts: Sequence[str]
    ) -> Callable[[], Float[np.ndarray, "B C"]]:
        """Log-likelihoods of texts as captions of each clip."""
        start = np.full((len(video), 1), self._tokenizer.start, np.int32), np.ones(len(video), np.int32)
        ids = self._tokenizer.behind_start(texts)
        scores = self._likelihoods(self._remember(video), start, ids, self._tokenizer.context_length - 1)
        return lambda: scores

    def _remember(self, video: np.ndarray) -> Memory:
        return self._on_mesh(compiled.remember, *self._looks, self._placed(video))

    def _write(
        self, memory: Memory, search: Search, prefix: np.ndarray, lengths: np.ndarray
    ) -> Callable[[], list[Written]]:
        given = (memory, None, self._placed(prefix), self._placed(lengths))
        texts: Texts = self._on_mesh(compiled.write, self._model, search, self._decoder_parameters, *given)

        def fetch() -> list[Written]:
            words = [self._tokenizer.decode(row) for row in np.asarray(texts.tokens)]
            return list(zip(words, np.asarray(texts.scores).tolist(), strict=True))

        return fetch

    def _likelihoods(
        self, memory: Memory, prefix: tuple[np.ndarray, np.ndarray], texts: Sequence[np.ndarray], longest: int
    ) -> np.ndarray:
        """`[B, C]`; the texts are filled up to a power of two, so that few shapes are compiled."""
        most = max(TEXTS_AT_ONCE, len(texts))
        full = [*texts, *[np.zeros(0, np.int32)] * (bucket(len(texts), most) - len(texts))]
        ids, lengths = (np.repeat(each, len(prefix[1]), axis=0) for each in stacked([full], longest))
        given = (memory, None, prefix, (ids, lengths))
        found = self._on_mesh(text_likelihoods, self._model, self._decoder_parameters, *given)
        return found[:, : len(texts)]

    def _placed(self, array: np.ndarray) -> jax.Array:
        return sharding.to_global({"": array}, self._mesh)[""]

    def _on_mesh(self, function: Callable[..., Any], *given: Any) -> Any:
        precision = self._trained.config["matmul_precision"]
        with jax.set_mesh(self._mesh), jax.default_matmul_precision(precision):
            return function(*given)
