"""A model that embeds the clips and texts of a split.

Several processes share the work: each takes every n-th batch of clips, on its own devices, and every n-th batch of
texts. The results are gathered in all of them, in the order of the source, before figures are computed, so that
figures do not depend on the number of processes.

Dimensions: `V` clips, `C` texts, `E` embedding width, `T` frames.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vlab_jax.data import pipeline, schema
from vlab_jax.data.batches import DEFAULT_MEMORY, Batch, PrefetchMemory
from vlab_jax.data.tokenizer import Tokenizer
from vlab_jax.models import generation, vlab
from vlab_jax.models.decoder import VisualCache
from vlab_jax.models.generation import chunks
from vlab_jax.models.vlab import VLAB
from vlab_jax.runtime import metrics, sharding

A = TypeVar("A")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A model with its parameters and everything that embedding clips and texts needs.

    With several processes, parameters and mesh are those of each process's own devices (`sharding.local_mesh`), and
    all processes must call the same methods in the same order.

    Attributes:
      max_failed_share: of a whole source; see `pipeline.FailureCount`.
      label: what progress bars call the evaluation.
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
    max_failed_share: float = 0.01
    label: str = ""

    @property
    def batch(self) -> int:
        """The batch size, rounded up to a multiple of the mesh's share."""
        divisor = sharding.batch_divisor(self.mesh)
        return -(-self.batch_size // divisor) * divisor

    def map_clips(
        self, source: Sequence, verb: str, of_batch: Callable[[Batch, jax.Array], Iterable[tuple[int, A]]]
    ) -> list[tuple[int, A]]:
        """Results for the clips that can be decoded, each with the clip's index, in the order of the source.

        Args:
          source: a data source of the schema.
          verb: what is done with the clips, for the progress bar.
          of_batch: for a batch (`pipeline.evaluation_batches`) and its video on the mesh, the index and the result of
            each valid clip. It is called with this process's share of the batches.

        Raises:
          InputError: too many clips cannot be decoded.
        """
        share = {"process": jax.process_index(), "processes": jax.process_count()}
        options = {"batch_size": self.batch, "workers": self.workers, "memory": self.memory, **share}
        count = pipeline.FailureCount(self.max_failed_share, whole=len(source))
        found, done = [], 0
        with (
            metrics.ProgressBar(f"{verb} {self.label}", len(source), shown=sharding.is_primary()) as bar,
            pipeline.evaluation_batches(source, self.frames, **options) as batches,
        ):
            for batch in batches:
                count.update(int(batch["valid"].sum()), batch["failures"])
                found += of_batch(batch, sharding.to_global({"video": batch["video"]}, self.mesh)["video"])
                done += int((batch["index"] >= 0).sum())
                bar.update(min(done * jax.process_count(), len(source)))  # the others are about as far
        count.join(sharding.all_gather)
        return sorted((pair for each in sharding.all_gather(found) for pair in each), key=lambda pair: pair[0])

    def cache_visual(self, video: jax.Array) -> VisualCache:
        """The decoder's visual cache of clips, uint8 `[B, T, S, S, 3]`."""
        return generation.cache_visual(self.model, self.streams, self.image_frames, self.parameters, video)

    def embed_clips(self, source: Sequence) -> tuple[Float[np.ndarray, "V E"], Int[np.ndarray, " V"]]:
        """Embeddings of the clips that can be decoded, and their indices in the source."""

        def embed(batch: Batch, video: jax.Array) -> Iterable[tuple[int, np.ndarray]]:
            embedded = vlab.embed_clips(self.model, self.streams, self.image_frames, self.parameters, video)
            valid = batch["valid"]
            return zip(batch["index"][valid].tolist(), np.asarray(embedded)[valid], strict=True)

        found = self.map_clips(source, "evaluate", embed)
        embeddings = np.array([row for _, row in found], np.float32)
        indices = np.array([index for index, _ in found], np.int32)
        return embeddings.reshape(len(found), self.model.vision["embed_width"]), indices

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "C E"]:
        """Embeddings of texts, in order."""

        def embed(part: Sequence[str]) -> np.ndarray:
            tokens, lengths = self.tokenizer([*part, *[""] * (self.batch - len(part))])
            arrays = sharding.to_global({"tokens": tokens, "lengths": lengths}, self.mesh)
            embedded = vlab.embed_texts(self.model, self.parameters, arrays["tokens"], arrays["lengths"])
            return np.asarray(embedded)[: len(part)]

        return np.concatenate(sharding.distributed_map(embed, list(chunks(texts, self.batch))))


def without_media(source: Sequence, index: int) -> schema.ClipRecord:
    """A clip of a source without its bytes, so that many fit into memory."""
    return dataclasses.replace(schema.from_example(source[index]), media=b"")


def all_without_media(source: Sequence, indices: Sequence[int]) -> list[schema.ClipRecord]:
    """Clips of a source without their bytes; each of several processes reads its share."""
    return sharding.distributed_map(functools.partial(without_media, source), indices)
