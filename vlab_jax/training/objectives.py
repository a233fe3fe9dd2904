"""The losses of training, and their weighted sum in a stage. All are computed in float32.

A decoder loss is a mean over the target tokens of the whole batch, so the loss of a batch is the sum of the losses of
its micro-batches. The contrastive loss is not: it compares all clips with all texts.

Dimensions: `B` clips with a caption each, `R` texts of a clip, `E` embedding width, `L` text tokens, `V` vocabulary,
`W` the decoder's width.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlab_jax.models.decoder import token_losses
from vlab_jax.models.vlab import VLAB
from vlab_jax.runtime.sharding import batch_devices

MAX_LOGIT_SCALE = 100.0  # CLIP's clamp of the inverse temperature
# A product of float32 arrays is rounded to bfloat16 on TPU and to TF32 on NVIDIA GPUs unless it asks for this; its
# gradients ask for what it asks for.
FULL_FLOAT32 = jax.lax.Precision.HIGHEST


def contrastive_loss(
    clips: Float[Array, "B E"],
    texts: Float[Array, "B E"],
    logit_scale: Float[Array, ""],
    identity: Int[Array, " B"],
    chunk: int = 0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Symmetric InfoNCE over the whole batch (CLIP, section 2.3), with similarities in full float32 on every platform;
    and the share of clips whose own caption scores higher than all others.

    Args:
      clips, texts: embeddings of unit length; row i of one belongs to row i of the other.
      logit_scale: the logarithm of the inverse temperature.
      identity: equal for rows of the same clip, which are not negatives of each other.
      chunk: columns of the `[B, B]` similarities that exist at once, in the backward pass too; 0: all of them.
    """
    scale = jnp.exp(clamp_temperature(logit_scale))
    own = scale * (clips * texts).sum(axis=1)  # [B]
    by_clip, highest = _log_normalisers(scale * clips, texts, own, identity, chunk or len(clips))
    by_text, _ = _log_normalisers(scale * texts, clips, own, identity, chunk or len(clips))
    return (0.5 * (by_clip + by_text) - own).mean(), (own > highest).mean()


def _log_normalisers(
    rows: Float[Array, "B E"],
    columns: Float[Array, "B E"],
    own: Float[Array, " B"],
    identity: Int[Array, " B"],
    chunk: int,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """For each row, the log-sum-exp of its similarities, and the highest similarity to another clip's column.

    An online log-sum-exp, chunk by chunk. `own` is the diagonal: it is the start of the sum, because columns of the
    same clip, the diagonal among them, are masked in the chunks.
    """

    @jax.checkpoint  # else every chunk's similarities would be kept for the backward pass
    def add(carry, part):
        top, total, highest = carry
        columns, ids = part
        similarities = jnp.matmul(rows, columns.T, precision=FULL_FLOAT32)  # [B, chunk]
        others = jnp.where(identity[:, None] == ids[None], -jnp.inf, similarities)
        highest = jnp.maximum(highest, others.max(axis=1))
        new_top = jax.lax.stop_gradient(jnp.maximum(top, highest))
        total = total * jnp.exp(top - new_top) + jnp.exp(others - new_top[:, None]).sum(axis=1)
        return (new_top, total, jax.lax.stop_gradient(highest)), None

    start = jax.lax.stop_gradient(own)
    parts = tuple(array.reshape(-1, chunk, *array.shape[1:]) for array in (columns, identity))
    lowest = jnp.full_like(start, -jnp.inf)
    (top, total, highest), _ = jax.lax.scan(add, (start, jnp.exp(own - start), lowest), parts)
    return top + jnp.log(total), highest


def clamp_temperature(logit_scale: Float[Array, ""]) -> Float[Array, ""]:
    """The logarithm of the inverse temperature, at most that of `MAX_LOGIT_SCALE`.

    CLIP clamps the parameter itself after each step, and so does the train step here: if only the loss clamped it, a
    temperature past the limit would have no gradient to come back by. Published weights stand exactly at the limit,
    where the gradient is whole (with `jnp.minimum` it would be halved).
    """
    limit = jnp.asarray(math.log(MAX_LOGIT_SCALE), logit_scale.dtype)
    return jnp.where(logit_scale > limit, limit, logit_scale)


def next_token_loss(
    states: Float[Array, "B L W"],
    table: Float[Array, "V W"],
    tokens: Int[Array, "B L"],
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    smoothing: float,
    count: Int[Array, ""],
) -> Float[Array, ""]:
    """Cross-entropy of the target tokens, those from `starts` to `lengths`, each predicted from the tokens before it.

    Captioning has targets from the first token on, the end of text included; question answering from the answer's
    first token on. A text without targets has `starts` equal to `lengths`. The other arguments are those of
    `mean_token_loss`, but position i of the decoder's states predicts the token at i + 1.
    """
    present = target_mask(tokens, starts, lengths)[:, 1:]
    return mean_token_loss(states[:, :-1], table, tokens[:, 1:], present, smoothing, count)


def target_mask(
    tokens: Int[Array, "... L"], starts: Int[Array, " ..."], lengths: Int[Array, " ..."]
) -> Bool[Array, "... L"]:
    """The positions from `starts` to `lengths`, without the first one of a text, which nothing predicts."""
    position = jnp.arange(tokens.shape[-1])
    return (position >= jnp.maximum(starts, 1)[..., None]) & (position < lengths[..., None])


def mean_token_loss(
    states: Float[Array, "B L W"],
    table: Float[Array, "V W"],
    targets: Int[Array, "B L"],
    present: Bool[Array, "B L"],
    smoothing: float,
    count: Int[Array, ""],
) -> Float[Array, ""]:
    """Cross-entropy of the targets that are present, each predicted by the decoder's state at its own position.

    Args:
      table: the token embeddings, which turn states into logits.
      smoothing: the share of probability that label smoothing spreads over the vocabulary.
      count: of the targets in the whole batch, by which the sum is divided.
    """
    losses = token_losses(states, table, targets, present, smoothing, batch_devices())
    return losses.sum() / jnp.maximum(count, 1)


def draw_masked_tokens(
    rng: jax.Array, tokens: Int[Array, "B L"], lengths: Int[Array, " B"], share: float = 0.15
) -> Bool[Array, "B L"]:
    """Masks each token with probability `share`, and at least one of a text that has any, but never start or end."""
    position = jnp.arange(tokens.shape[1])
    inner = (position > 0) & (position < lengths[:, None] - 1)
    draw = jnp.where(inner, jax.random.uniform(rng, tokens.shape), jnp.inf)
    lowest = position == draw.argmin(axis=1, keepdims=True)
    return inner & ((draw < share) | lowest)


Metrics = dict[str, jax.Array]
Arrays = Mapping[str, jax.Array]  # of a batch, by name


class PreparedBatch(NamedTuple):
    """A batch or micro-batch: arrays with one row a clip, and the targets of each decoder loss in the whole batch."""

    clips: Arrays
    counts: Metrics


class Embeddings(NamedTuple):
    """Embeddings of clips and of their captions, `[B, E]`, of unit length."""

    clips: jax.Array
    texts: jax.Array


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a stage: a weighted sum of losses, over one or both streams."""

    # Of `contrastive`, `captioning`, `masked_lm` and `question_answering`; a loss that is absent or has weight 0 is not
    # computed.
    weights: Mapping[str, float]
    streams: tuple[str, ...]  # `video`, `image` or both
    image_frames: tuple[int, ...]  # those that the image stream takes
    label_smoothing: float = 0.1  # of captioning and question answering
    masked_share: float = 0.15
    contrastive_chunk: int = 0

    def __call__(self, model: VLAB, parameters: Any, batch: Arrays, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """The weighted loss of a whole batch, and the metrics, each single loss among them."""
        embeddings, metrics = self.forward(model, parameters, self.prepare(batch, rng))
        if embeddings is not None:
            metrics = self.contrast(embeddings, parameters["logit_scale"], batch["clip"]) | metrics
        loss = self.weighted_sum(metrics)
        return loss, {"loss": loss, **metrics}

    @property
    def is_contrastive(self) -> bool:
        """Whether clips and texts are contrasted."""
        return bool(self.weights.get("contrastive"))

    def prepare(self, batch: Arrays, rng: jax.Array) -> PreparedBatch:
        """Draws the masked tokens and counts the targets of the whole batch."""
        clips = dict(batch)
        counts = {name: target_mask(*texts).sum() for name, texts in self._causal_texts(batch).items()}
        if self.weights.get("masked_lm"):
            masked = draw_masked_tokens(rng, batch["tokens"], batch["lengths"], self.masked_share)
            clips["masked"], counts["masked_lm"] = masked, masked.sum()
        return PreparedBatch(clips, counts)

    def embed(self, model: VLAB, parameters: Any, clips: Arrays) -> Embeddings:
        """The embeddings that the contrastive loss compares, and nothing else."""
        return self._embed(model, parameters, clips, self._encode_visual(model, parameters, clips))

    def forward(self, model: VLAB, parameters: Any, prepared: PreparedBatch) -> tuple[Embeddings | None, Metrics]:
        """The embeddings, if there is a contrastive loss, and the losses of the decoder."""
        clips, counts = prepared
        visual = self._encode_visual(model, parameters, clips)
        losses = {}

        def decode(texts: jax.Array, **options: Any) -> jax.Array:
            options |= {"states": True, "method": "decode"}
            return model.apply({"params": parameters}, texts, visual.streams, **options)  # [N, L, W]

        causal = self._causal_texts(clips)
        table = parameters["decoder"]["token_embedding"]
        if causal:
            joined = jnp.concatenate([texts for texts, _, _ in causal.values()], axis=1)  # [B, R, L]
            states = decode(joined.reshape(-1, joined.shape[-1]), causal=True)
            states = states.reshape(*joined.shape, -1)  # [B, R, L, W]
        for name, (texts, starts, ends) in causal.items():
            own, states = jnp.split(states, [texts.shape[1]], axis=1)
            own, texts, starts, ends = (array.reshape(-1, *array.shape[2:]) for array in (own, texts, starts, ends))
            smoothing, count = self.label_smoothing, counts[name]
            losses[f"{name}_loss"] = next_token_loss(own, table, texts, starts, ends, smoothing, count)
        if self.weights.get("masked_lm"):
            tokens, masked = clips["tokens"], clips["masked"]
            states = decode(tokens, causal=False, lengths=clips["lengths"], masked=masked)
            losses["masked_lm_loss"] = mean_token_loss(states, table, tokens, masked, 0.0, counts["masked_lm"])
        return self._embed(model, parameters, clips, visual) if self.is_contrastive else None, losses

    def contrast(self, embeddings: Embeddings, logit_scale: jax.Array, identity: jax.Array) -> Metrics:
        """The contrastive loss of a whole batch, and the share of its clips that find their caption."""
        loss, accuracy = contrastive_loss(*embeddings, logit_scale, identity, self.contrastive_chunk)
        return {"contrastive_loss": loss, "batch_accuracy": accuracy}

    def weighted_sum(self, losses: Metrics) -> jax.Array:
        """The weighted sum of those losses that are present."""
        present = {name: weight for name, weight in self.weights.items() if f"{name}_loss" in losses}
        return sum((weight * losses[f"{name}_loss"] for name, weight in present.items()), start=jnp.zeros(()))

    def _encode_visual(self, model: VLAB, parameters: Any, clips: Arrays) -> Any:
        return model.apply(
            {"params": parameters}, clips["video"], self.streams, self.image_frames, method="encode_visual"
        )

    def _embed(self, model: VLAB, parameters: Any, clips: Arrays, visual: Any) -> Embeddings:
        texts = model.apply({"params": parameters}, clips["tokens"], clips["lengths"], method="encode_text")
        return Embeddings(visual.embedding, texts)

    def _causal_texts(self, batch: Arrays) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
        """By loss, the texts that the decoder reads in order: tokens `[B, R, L]`, starts, ends of targets `[B, R]`."""
        texts = {}
        if self.weights.get("captioning"):
            tokens, lengths = batch["tokens"][:, None], batch["lengths"][:, None]
            texts["captioning"] = (tokens, jnp.ones_like(lengths), lengths)
        if self.weights.get("question_answering"):
            texts["question_answering"] = (batch["question_tokens"], batch["answer_starts"], batch["question_lengths"])
        return texts
