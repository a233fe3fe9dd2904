"""What training minimises: pure functions of arrays, computed in float32.

Dimensions: `B` clips with a caption each, `E` embedding width, `L` text tokens, `V` vocabulary.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

MAX_LOGIT_SCALE = 100.0  # CLIP's clamp of the inverse temperature


def contrastive(
    clips: Float[Array, "B E"],
    texts: Float[Array, "B E"],
    logit_scale: Float[Array, ""],
    identity: Int[Array, " B"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Symmetric InfoNCE over the whole batch (CLIP, section 2.3).

    Args:
      clips, texts: embeddings of unit length; row i of one belongs to row i of the other.
      logit_scale: the logarithm of the inverse temperature.
      identity: equal for rows of the same clip; these are not negatives of each other.

    Returns:
      The loss, and the share of clips whose own caption scores highest.
    """
    scale = jnp.exp(clamp_temperature(logit_scale))
    logits = scale * clips @ texts.T  # [B, B]
    own = jnp.arange(clips.shape[0])
    same = (identity[:, None] == identity[None]) & (own[:, None] != own[None])
    logits = jnp.where(same, -jnp.inf, logits)
    by_clip = optax.softmax_cross_entropy_with_integer_labels(logits, own)
    by_text = optax.softmax_cross_entropy_with_integer_labels(logits.T, own)
    return 0.5 * (by_clip + by_text).mean(), (logits.argmax(axis=1) == own).mean()


def clamp_temperature(logit_scale: Float[Array, ""]) -> Float[Array, ""]:
    """The logarithm of the inverse temperature, at most that of `MAX_LOGIT_SCALE`.

    CLIP clamps the parameter itself after each step, and so does the train step here: clamped in the loss alone, a
    temperature past the limit would have no gradient to come back by. Published weights stand at the limit exactly.
    """
    return jnp.minimum(logit_scale, math.log(MAX_LOGIT_SCALE))


def next_tokens(
    logits: Float[Array, "B L V"],
    tokens: Int[Array, "B L"],
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Cross-entropy of each next token from `starts` to `lengths`; what is outside weighs nothing.

    It serves captioning (from the first token, the end of text included) and question answering (from the answer's
    first token; a text of which nothing is to be learned has `starts` equal to `lengths`).

    Args:
      logits: at position i, for the token at i + 1.
      starts: the place of the first token that counts, at least 1.
      smoothing: the share of probability that label smoothing spreads over the vocabulary.
    """
    place = jnp.arange(1, tokens.shape[1])
    present = (place >= starts[:, None]) & (place < lengths[:, None])  # [B, L-1]
    return _mean_cross_entropy(logits[:, :-1], tokens[:, 1:], present, smoothing)


def masked_lm(logits: Float[Array, "B L V"], tokens: Int[Array, "B L"], masked: Bool[Array, "B L"]) -> Float[Array, ""]:
    """Cross-entropy of the masked tokens."""
    return _mean_cross_entropy(logits, tokens, masked, 0.0)


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


def _mean_cross_entropy(logits, targets, present, smoothing):
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    if smoothing:
        uniform = -jax.nn.log_softmax(logits).mean(axis=-1)
        loss = (1 - smoothing) * loss + smoothing * uniform
    return jnp.where(present, loss, 0.0).sum() / jnp.maximum(present.sum(), 1)
