"""Evaluates a model on a split: embeds clips and texts, and scores retrieval and multiple choice.

Dimensions: `V` clips, `C` captions, `E` embedding width, `T` frames, `L` text tokens.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vlab_jax.data import pipeline, schema
from vlab_jax.data.pieces import Batch
from vlab_jax.data.prefetch import DEFAULT_MEMORY, PrefetchMemory
from vlab_jax.data.tokenizer import Tokenizer
from vlab_jax.errors import InputError
from vlab_jax.evaluation import retrieval
from vlab_jax.models import compiled
from vlab_jax.models.cached_decoder import Memory
from vlab_jax.models.vlab import VLAB
from vlab_jax.runtime import sharding


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A model with its parameters and everything that embedding clips and texts needs."""

    model: VLAB
    parameters: Any
    tokenizer: Tokenizer
    frames: pipeline.FrameOptions
    streams: tuple[str, ...]
    image_frames: tuple[int, ...]
    mesh: Mesh
    batch_size: int
    workers: int = 0
    memory: PrefetchMemory = DEFAULT_MEMORY

    @property
    def batch(self) -> int:
        """The batch size, rounded up to what the mesh divides."""
        divisor = sharding.batch_divisor(self.mesh)
        return -(-self.batch_size // divisor) * divisor

    def batches(
        self, source: Sequence, max_failed_share: float, update: Callable[[int], None]
    ) -> Iterator[tuple[Batch, jax.Array]]:
        """Batches of all clips of a source (`pipeline.evaluation_batches`), each with its video on the mesh.

        Args:
          source: a data source of the schema.
          max_failed_share: see `pipeline.FailureCount`.
          update: called with the number of clips done.
        """
        count = pipeline.FailureCount(max_failed_share)
        done = 0
        with pipeline.evaluation_batches(
            source, self.frames, batch_size=self.batch, workers=self.workers, memory=self.memory
        ) as batches:
            for batch in batches:
                count.update(int(batch["valid"].sum()), batch["failures"])
                yield batch, sharding.to_global({"video": batch["video"]}, self.mesh)["video"]
                done += int((batch["index"] >= 0).sum())
                update(done)

    def remember(self, video: jax.Array) -> Memory:
        """What the decoder needs of clips, uint8 `[B, T, S, S, 3]`, to write about them."""
        return compiled.remember(self.model, self.streams, self.image_frames, self.parameters, video)

    def embed_clips(
        self,
        source: Sequence,
        max_failed_share: float = 0.01,
        update: Callable[[int], None] = lambda done: None,
    ) -> tuple[Float[np.ndarray, "V E"], Int[np.ndarray, " V"]]:
        """Embeddings of the clips that can be decoded, and their indices in the source.

        Args:
          source: a data source of the schema.
          max_failed_share: see `pipeline.FailureCount`.
          update: called with the number of clips done.
        """
        embeddings, indices = [], []
        for batch, video in self.batches(source, max_failed_share, update):
            embedded = compiled.embed_clips(self.model, self.streams, self.image_frames, self.parameters, video)
            embeddings.append(np.asarray(embedded)[batch["valid"]])
            indices.append(batch["index"][batch["valid"]])
        return np.concatenate(embeddings), np.concatenate(indices)

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "C E"]:
        """Embeddings of texts, in order."""
        embeddings = []
        for first in range(0, len(texts), self.batch):
            chosen = list(texts[first : first + self.batch])
            tokens, lengths = self.tokenizer(chosen + [""] * (self.batch - len(chosen)))
            arrays = sharding.to_global({"tokens": tokens, "lengths": lengths}, self.mesh)
            embedded = compiled.embed_texts(self.model, self.parameters, arrays["tokens"], arrays["lengths"])
            embeddings.append(np.asarray(embedded)[: len(chosen)])
        return np.concatenate(embeddings)


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """The outcome of a retrieval evaluation.

    Attributes:
      metrics: named numbers; see `retrieval.retrieval_metrics`, and `<type>_accuracy` of multiple choice.
      captions: the `C` queries; clip_of_caption: the row of each one's clip.
      similarity: cosine of caption and clip, `[C, V]`.
      indices: each clip's index in the source, `[V]`.
      embeddings: the clips', `[V, E]`.
    """

    metrics: dict[str, float]
    captions: tuple[str, ...]
    clip_of_caption: np.ndarray
    similarity: np.ndarray
    indices: np.ndarray
    embeddings: np.ndarray


def without_media(source: Sequence, index: int) -> schema.Clip:
    """A clip of a source, as light as its texts."""
    return dataclasses.replace(schema.from_example(source[index]), media=b"")


def evaluate_retrieval(
    encoder: Encoder,
    source: Sequence,
    *,
    multiple_choice: Sequence[str] = (),
    max_failed_share: float = 0.01,
    update: Callable[[int], None] = lambda done: None,
) -> Retrieval:
    """Every caption is a query; `multiple_choice` names the types of questions to answer by similarity.

    Raises:
      InputError: the split is empty, or none of its clips has a caption.
    """
    if not len(source):
        raise InputError("the split to evaluate is empty")
    embeddings, indices = encoder.embed_clips(source, max_failed_share, update)
    clips = [without_media(source, int(i)) for i in indices]
    captions = [caption for clip in clips for caption in clip.captions]
    if not captions:
        raise InputError("no clip of the split to evaluate has a caption")
    clip_of_caption = np.repeat(np.arange(len(clips)), [len(clip.captions) for clip in clips])
    asked = [
        (row, question)
        for row, clip in enumerate(clips)
        for question in clip.questions
        if question.type in multiple_choice and question.options
    ]
    texts = list(dict.fromkeys([*captions, *(option for _, question in asked for option in question.options)]))
    place = {text: row for row, text in enumerate(texts)}
    embedded = encoder.embed_texts(texts)
    similarity = embedded[[place[caption] for caption in captions]] @ embeddings.T
    metrics = retrieval.retrieval_metrics(similarity, clip_of_caption)
    if asked:
        scores = [embedded[[place[option] for option in q.options]] @ embeddings[row] for row, q in asked]
        answers = [question.options.index(question.answer) for _, question in asked]
        accuracy = retrieval.by_type(scores, answers, [question.type for _, question in asked])
        metrics |= {f"{kind}_accuracy": share for kind, share in accuracy.items()}
    logging.info("evaluated %d clips with %d captions", len(clips), len(captions))
    return Retrieval(metrics, tuple(captions), clip_of_caption, similarity, indices, embeddings)
