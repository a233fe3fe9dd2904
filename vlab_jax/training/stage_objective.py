"""What a stage minimises: its objectives, weighted, over its streams.

Losses of the decoder are means over the tokens that count in the whole batch. So a batch's loss is the sum of its
parts' (`gradient_cache.py`), but for the contrastive one, which compares all clips with all texts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlab_jax.models.vlab import VLAB
from vlab_jax.training import objectives

Metrics = dict[str, jax.Array]
Clips = Mapping[str, jax.Array]


class Prepared(NamedTuple):
    """A batch, or a part of one: arrays with a row for each clip (`clips`), and how many tokens of the whole batch each
    of the decoder's objectives learns from (`counts`)."""

    clips: Clips
    counts: Metrics


class Embeddings(NamedTuple):
    """Of clips and of their captions, `[B, E]`, of unit length."""

    clips: jax.Array
    texts: jax.Array


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a stage minimises, and over which streams.

    Attributes:
      weights: of `contrastive`, `captioning`, `masked_lm` and `question_answering`; an objective that is absent or 0
        is not computed.
      streams: `video`, `image` or both.
      image_frames: the frames that the image stream takes.
      label_smoothing: of captioning and question answering.
      masked_share: of the tokens, for masked language modelling.
      contrastive_chunk: columns of the similarities that exist at once; 0: all.
    """

    weights: Mapping[str, float]
    streams: tuple[str, ...]
    image_frames: tuple[int, ...]
    label_smoothing: float = 0.1
    masked_share: float = 0.15
    contrastive_chunk: int = 0

    def __call__(self, model: VLAB, parameters: Any, batch: Clips, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """The weighted loss of a whole batch, and the metrics: each objective's own loss among them."""
        embeddings, metrics = self.read(model, parameters, self.prepare(batch, rng))
        if embeddings is not None:
            metrics = self.contrast(embeddings, parameters["logit_scale"], batch["clip"]) | metrics
        loss = self.weighted(metrics)
        return loss, {"loss": loss, **metrics}

    @property
    def contrasts(self) -> bool:
        """Whether clips and texts are contrasted."""
        return bool(self.weights.get("contrastive"))

    def prepare(self, batch: Clips, rng: jax.Array) -> Prepared:
        """What is drawn and counted over the whole batch."""
        clips, counts = dict(batch), {}
        for name, (texts, starts, ends) in self._read_causally(batch).items():
            counts[name] = objectives.learned_from(texts, starts, ends).sum()
        if self.weights.get("masked_lm"):
            masked = objectives.choose_masked(rng, batch["tokens"], batch["lengths"], self.masked_share)
            clips["masked"], counts["masked_lm"] = masked, masked.sum()
        return Prepared(clips, counts)

    def embed(self, model: VLAB, parameters: Any, clips: Clips) -> Embeddings:
        """What is contrasted, and nothing else."""
        return self._embed(model, parameters, clips, self._see(model, parameters, clips))

    def read(self, model: VLAB, parameters: Any, prepared: Prepared) -> tuple[Embeddings | None, Metrics]:
        """What is contrasted, if that is an objective, and the losses of the decoder."""
        clips, counts = prepared
        visual = self._see(model, parameters, clips)
        losses = {}

        def decode(texts: jax.Array, **options: Any) -> jax.Array:
            options |= {"states": True, "method": "decode"}
            return model.apply({"params": parameters}, texts, visual.streams, **options)  # [N, L, W]

        read = self._read_causally(clips)
        table = parameters["decoder"]["token_embedding"]
        if read:
            beside = jnp.concatenate([texts for texts, _, _ in read.values()], axis=1)  # [B, R, L]
            states = decode(beside.reshape(-1, beside.shape[-1]), causal=True)
            states = states.reshape(*beside.shape, -1)  # [B, R, L, W]
        for name, (texts, starts, ends) in read.items():
            own, states = jnp.split(states, [texts.shape[1]], axis=1)
            own, texts, starts, ends = (part.reshape(-1, *part.shape[2:]) for part in (own, texts, starts, ends))
            given = (own, table, texts, starts, ends, self.label_smoothing, counts[name])
            losses[f"{name}_loss"] = objectives.next_tokens(*given)
        if self.weights.get("masked_lm"):
            tokens, masked = clips["tokens"], clips["masked"]
            states = decode(tokens, causal=False, lengths=clips["lengths"], masked=masked)
            losses["masked_lm_loss"] = objectives.masked_lm(states, table, tokens, masked, counts["masked_lm"])
        return self._embed(model, parameters, clips, visual) if self.contrasts else None, losses

    def contrast(self, embeddings: Embeddings, logit_scale: jax.Array, identity: jax.Array) -> Metrics:
        """The contrastive loss of a whole batch, and its share of clips that find their caption."""
        loss, accuracy = objectives.contrastive(*embeddings, logit_scale, identity, self.contrastive_chunk)
        return {"contrastive_loss": loss, "batch_accuracy": accuracy}

    def weighted(self, losses: Metrics) -> jax.Array:
        """The weighted sum of those losses that are there."""
        return sum(
            (weight * losses[f"{name}_loss"] for name, weight in self.weights.items() if f"{name}_loss" in losses),
            start=jnp.zeros(()),
        )

    def _see(self, model: VLAB, parameters: Any, clips: Clips) -> Any:
        return model.apply(
            {"params": parameters}, clips["video"], self.streams, self.image_frames, method="encode_visual"
        )

    def _embed(self, model: VLAB, parameters: Any, clips: Clips, visual: Any) -> Embeddings:
        texts = model.apply({"params": parameters}, clips["tokens"], clips["lengths"], method="encode_text")
        return Embeddings(visual.embedding, texts)

    def _read_causally(self, batch: Clips) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
        """By objective, the texts that the decoder learns to go on with: tokens `[B, R, L]`, from where to where."""
        read = {}
        if self.weights.get("captioning"):
            tokens, lengths = batch["tokens"][:, None], batch["lengths"][:, None]
            read["captioning"] = (tokens, jnp.ones_like(lengths), lengths)
        if self.weights.get("question_answering"):
            read["question_answering"] = (batch["question_tokens"], batch["answer_starts"], batch["question_lengths"])
        return read
