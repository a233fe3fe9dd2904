"""What training minimises: pure functions of arrays, computed in float32.

Dimensions: `B` clips with a caption each, `E` embedding width, `L` text tokens, `V` vocabulary, `W` the
decoder's width.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlab_jax.models.partition import batch_devices
from vlab_jax.models.vlab import VLAB
from vlab_jax.models.vocabulary import token_losses

MAX_LOGIT_SCALE = 100.0  # CLIP's clamp of the inverse temperature
# A product of float32 arrays is rounded to bfloat16 on TPU and to TF32 on NVIDIA GPUs unless it asks for this; its
# gradients ask for what it asks for.
FULL_FLOAT32 = jax.lax.Precision.HIGHEST


def contrastive(
    clips: Float[Array, "B E"],
    texts: Float[Array, "B E"],
    logit_scale: Float[Array, ""],
    identity: Int[Array, " B"],
    chunk: int = 0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Symmetric InfoNCE over the whole batch (CLIP, section 2.3), with similarities in full float32 on every platform.

    Args:
      clips, texts: embeddings of unit length; row i of one belongs to row i of the other.
      logit_scale: the logarithm of the inverse temperature.
      identity: equal for rows of the same clip; these are not negatives of each other.
      chunk: how many columns of the `[B, B]` similarities exist at once, in the backward pass too; it divides `B`.
        0: all of them.

    Returns:
      The loss, and the share of clips whose own caption scores higher than all others.
    """
    scale = jnp.exp(clamp_temperature(logit_scale))
    own = scale * (clips * texts).sum(axis=1)  # [B]
    by_clip, highest = _normalisers(scale * clips, texts, own, identity, chunk or len(clips))
    by_text, _ = _normalisers(scale * texts, clips, own, identity, chunk or len(clips))
    return (0.5 * (by_clip + by_text) - own).mean(), (own > highest).mean()


def _normalisers(
    rows: Float[Array, "B E"],
    columns: Float[Array, "B E"],
    own: Float[Array, " B"],
    identity: Int[Array, " B"],
    chunk: int,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Of each row: the logarithm of the sum of exponentials of its similarities, and the highest of the others'.

    The sum is kept relative to the highest so far, chunk by chunk. `own` are the similarities on the diagonal, which
    are left out where rows of the same clip are, and then counted.
    """

    @jax.checkpoint  # else every chunk's similarities would be kept for the backward pass
    def add(carry, part):
        top, total, highest = carry
        columns, ids = part
        similarities = jnp.matmul(rows, columns.T, precision=FULL_FLOAT32)  # [B, chunk]
        others = jnp.where(identity[:, None] == ids[None], -jnp.inf, similarities)
        highest = jnp.maximum(highest, others.max(axis=1))
        raised = jax.lax.stop_gradient(jnp.maximum(top, highest))
        total = total * jnp.exp(top - raised) + jnp.exp(others - raised[:, None]).sum(axis=1)
        return (raised, total, jax.lax.stop_gradient(highest)), None

    start = jax.lax.stop_gradient(own)
    parts = tuple(each.reshape(-1, chunk, *each.shape[1:]) for each in (columns, identity))
    nothing = jnp.full_like(start, -jnp.inf)
    (top, total, highest), _ = jax.lax.scan(add, (start, jnp.exp(own - start), nothing), parts)
    return top + jnp.log(total), highest


def clamp_temperature(logit_scale: Float[Array, ""]) -> Float[Array, ""]:
    """The logarithm of the inverse temperature, at most that of `MAX_LOGIT_SCALE`.

    CLIP clamps the parameter itself after each step, and so does the train step here: clamped in the loss alone, a
    temperature past the limit would have no gradient to come back by. Published weights stand at the limit exactly,
    where the gradient is whole (that of `jnp.minimum` would be half of it).
    """
    limit = jnp.asarray(math.log(MAX_LOGIT_SCALE), logit_scale.dtype)
    return jnp.where(logit_scale > limit, limit, logit_scale)


def next_tokens(
    states: Float[Array, "B L W"],
    table: Float[Array, "V W"],
    tokens: Int[Array, "B L"],
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    smoothing: float = 0.0,
    count: Int[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Cross-entropy of each next token from `starts` to `lengths`; what is outside weighs nothing.

    It serves captioning (from the first token, the end of text included) and question answering (from the answer's
    first token; a text of which nothing is to be learned has `starts` equal to `lengths`).

    Args:
      states: the decoder's, at position i, for the token at i + 1.
      table: the token embeddings, with which they make logits.
      starts: the place of the first token that counts, at least 1.
      smoothing: the share of probability that label smoothing spreads over the vocabulary.
      count: of tokens that count, over all batches whose losses are added up. None: the mean over these.
    """
    present = learned_from(tokens, starts, lengths)[:, 1:]
    return _mean_cross_entropy(states[:, :-1], table, tokens[:, 1:], present, smoothing, count)


def learned_from(
    tokens: Int[Array, "... L"], starts: Int[Array, " ..."], lengths: Int[Array, " ..."]
) -> Bool[Array, "... L"]:
    """The places from `starts` to `lengths`; the first place of a text is none, since nothing comes before it."""
    place = jnp.arange(tokens.shape[-1])
    return (place >= jnp.maximum(starts, 1)[..., None]) & (place < lengths[..., None])


def masked_lm(
    states: Float[Array, "B L W"],
    table: Float[Array, "V W"],
    tokens: Int[Array, "B L"],
    masked: Bool[Array, "B L"],
    count: Int[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Cross-entropy of the masked tokens; the arguments are those of `next_tokens`."""
    return _mean_cross_entropy(states, table, tokens, masked, 0.0, count)


def choose_masked(
    rng: jax.Array, tokens: Int[Array, "B L"], lengths: Int[Array, " B"], share: float = 0.15
) -> Bool[Array, "B L"]:
    """Which tokens are hidden: each with probability `share`, and at least one a text; never start or end of text.

    A text without a token between start and end has none.
    """
    position = jnp.arange(tokens.shape[1])
    inner = (position > 0) & (position < lengths[:, None] - 1)
    draw = jnp.where(inner, jax.random.uniform(rng, tokens.shape), jnp.inf)
    lowest = position == draw.argmin(axis=1, keepdims=True)
    return inner & ((draw < share) | lowest)


def _mean_cross_entropy(states, table, targets, present, smoothing, count):
    losses = token_losses(states, table, targets, present, smoothing, batch_devices())
    count = present.sum() if count is None else count
    return losses.sum() / jnp.maximum(count, 1)


# FOLDED vlab_jax/training/objectives.py: What a stage minimises: its objectives, weighted, over its streams.
# Losses of the decoder are means over the tokens that count in the whole batch. So a batch's loss is the sum of its
# parts' (`gradient_cache.py`), but for the contrastive one, which compares all clips with all texts.

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
            counts[name] = learned_from(texts, starts, ends).sum()
        if self.weights.get("masked_lm"):
            masked = choose_masked(rng, batch["tokens"], batch["lengths"], self.masked_share)
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
            losses[f"{name}_loss"] = next_tokens(*given)
        if self.weights.get("masked_lm"):
            tokens, masked = clips["tokens"], clips["masked"]
            states = decode(tokens, causal=False, lengths=clips["lengths"], masked=masked)
            losses["masked_lm_loss"] = masked_lm(states, table, tokens, masked, counts["masked_lm"])
        return self._embed(model, parameters, clips, visual) if self.contrasts else None, losses

    def contrast(self, embeddings: Embeddings, logit_scale: jax.Array, identity: jax.Array) -> Metrics:
        """The contrastive loss of a whole batch, and its share of clips that find their caption."""
        loss, accuracy = contrastive(*embeddings, logit_scale, identity, self.contrastive_chunk)
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
