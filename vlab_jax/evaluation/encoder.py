"""Evaluates a model on a split: embeds clips and texts, and scores retrieval and multiple choice.

Several processes share the work: each looks at every n-th batch of clips, on its own devices, and at every n-th batch
of texts. What they find is gathered in all of them, in the order of the source, before anything is computed of the
whole; so figures do not depend on their number.

Dimensions: `V` clips, `C` captions, `E` embedding width, `T` frames, `L` text tokens.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vlab_jax.data import pipeline, schema
from vlab_jax.data.pieces import DEFAULT_MEMORY, Batch, PrefetchMemory
from vlab_jax.data.tokenizer import Tokenizer
from vlab_jax.errors import InputError
from vlab_jax.evaluation import retrieval
from vlab_jax.models import generation
from vlab_jax.models.decoder import Memory
from vlab_jax.models.likelihood import chunks
from vlab_jax.models.vlab import VLAB
from vlab_jax.runtime import sharding

A = TypeVar("A")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A model with its parameters and everything that embedding clips and texts needs.

    With several processes, parameters and mesh are those of each one's own devices (`processes.own_mesh`), and all of
    them ask the same, in the same order.
    """

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

    def of_clips(
        self,
        source: Sequence,
        of_batch: Callable[[Batch, jax.Array], Iterable[tuple[int, A]]],
        max_failed_share: float,
        update: Callable[[int], None],
    ) -> list[tuple[int, A]]:
        """What is found of the clips that can be decoded, each with the clip's index, in the order of the source.

        Args:
          source: a data source of the schema.
          of_batch: indices of valid clips, and what is found of each, for a batch (`pipeline.evaluation_batches`) and
            its video on the mesh. It is asked for this process's share of the batches.
          max_failed_share: see `pipeline.FailureCount`; of the whole source.
          update: called with the number of clips done.
        """
        count = pipeline.FailureCount(max_failed_share, whole=len(source))
        found = [pair for batch, video in self.batches(source, count, update) for pair in of_batch(batch, video)]
        count.join(sharding.gathered)
        return sorted((pair for share in sharding.gathered(found) for pair in share), key=lambda pair: pair[0])

    def batches(
        self, source: Sequence, count: pipeline.FailureCount, update: Callable[[int], None]
    ) -> Iterator[tuple[Batch, jax.Array]]:
        """This process's share of the batches of a source, each with its video on the mesh; see `of_clips`."""
        share = {"process": jax.process_index(), "processes": jax.process_count()}
        given = {"batch_size": self.batch, "workers": self.workers, "memory": self.memory, **share}
        done = 0
        with pipeline.evaluation_batches(source, self.frames, **given) as batches:
            for batch in batches:
                count.update(int(batch["valid"].sum()), batch["failures"])
                yield batch, sharding.to_global({"video": batch["video"]}, self.mesh)["video"]
                done += int((batch["index"] >= 0).sum())
                update(min(done * jax.process_count(), len(source)))  # others are about as far

    def remember(self, video: jax.Array) -> Memory:
        """What the decoder needs of clips, uint8 `[B, T, S, S, 3]`, to write about them."""
        return generation.remember(self.model, self.streams, self.image_frames, self.parameters, video)

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

        def embed(batch: Batch, video: jax.Array) -> Iterable[tuple[int, np.ndarray]]:
            embedded = generation.embed_clips(self.model, self.streams, self.image_frames, self.parameters, video)
            rows = np.asarray(embedded)[batch["valid"]]
            return zip(batch["index"][batch["valid"]].tolist(), rows, strict=True)

        found = self.of_clips(source, embed, max_failed_share, update)
        embeddings = np.array([row for _, row in found], np.float32)
        indices = np.array([index for index, _ in found], np.int32)
        return embeddings.reshape(len(found), self.model.vision["embed_width"]), indices

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "C E"]:
        """Embeddings of texts, in order."""
        return np.concatenate(sharding.shared_map(self._embed_texts, list(chunks(texts, self.batch))))

    def _embed_texts(self, chosen: Sequence[str]) -> np.ndarray:
        """Of a batch at most."""
        tokens, lengths = self.tokenizer([*chosen, *[""] * (self.batch - len(chosen))])
        arrays = sharding.to_global({"tokens": tokens, "lengths": lengths}, self.mesh)
        embedded = generation.embed_texts(self.model, self.parameters, arrays["tokens"], arrays["lengths"])
        return np.asarray(embedded)[: len(chosen)]


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


def without_media(source: Sequence, index: int) -> schema.ClipRecord:
    """A clip of a source, as light as its texts."""
    return dataclasses.replace(schema.from_example(source[index]), media=b"")


def all_without_media(source: Sequence, indices: Sequence[int]) -> list[schema.ClipRecord]:
    """Clips of a source, as light as their texts; of several processes, each reads its share."""
    return sharding.shared_map(functools.partial(without_media, source), indices)


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
    clips = all_without_media(source, indices.tolist())
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
