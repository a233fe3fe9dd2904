"""What training minimises: pure functions of arrays, computed in float32.

Dimensions: `B` clips with a caption each, `E` embedding width, `L` text tokens, `V` vocabulary, `W` the
decoder's width.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlab_jax.models.partition import batch_devices
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
