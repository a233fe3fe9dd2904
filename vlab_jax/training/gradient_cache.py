"""Gradients of a batch that is too large to go through the model at once (GradCache: Gao et al., arXiv 2101.06983).

The contrastive loss needs the embeddings of the whole batch, but the gradient of each embedding can be found before the
model's. First the embeddings alone are computed, part by part; then the loss and its gradient with respect to them;
then each part goes through the model again, and passes its embeddings' gradient on to the parameters. Losses that are
sums over clips are computed in that second pass. The price is the first pass: about a third of the time more.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from vlab_jax.models.vlab import VLAB
from vlab_jax.training.stage_objective import Clips, Embeddings, Metrics, Objective, Prepared


def gradient_in_parts(
    objective: Objective,
    model: VLAB,
    merge: Callable[[Any], Any],
    learned: Any,
    batch: Clips,
    rng: jax.Array,
    parts: int,
) -> tuple[Any, Metrics]:
    """The gradient of the whole batch's loss with respect to `learned`, and its metrics.

    Args:
      merge: (learned) → all parameters.
      parts: how many parts of the batch go through the model one after the other; it divides the number of clips.
    """
    prepared = objective.prepare(batch, rng)
    split = jax.tree.map(lambda rows: in_parts(rows, parts), prepared.clips)
    gradient, metrics, pulls = jax.tree.map(jnp.zeros_like, learned), {}, None
    if objective.contrasts:
        embeddings = jax.lax.map(lambda clips: objective.embed(model, merge(learned), clips), split)
        (pulls, scale), metrics = _contrast(objective, embeddings, merge(learned)["logit_scale"], batch["clip"])
        if learned["logit_scale"] is not None:
            gradient = {**gradient, "logit_scale": scale}

    def add(gradient, part):
        clips, pull = part

        def loss(learned):
            embeddings, losses = objective.read(model, merge(learned), Prepared(clips, prepared.counts))
            passed_on = sum(map(_product, embeddings, pull)) if objective.contrasts else 0.0
            return objective.weighted(losses) + passed_on, losses

        own, losses = jax.grad(loss, has_aux=True)(learned)
        return jax.tree.map(jnp.add, gradient, own), losses

    gradient, losses = jax.lax.scan(add, gradient, (split, pulls))
    metrics |= {name: each.sum() for name, each in losses.items()}
    return gradient, {"loss": objective.weighted(metrics), **metrics}


def _product(embeddings: Float[Array, "R E"], pull: Float[Array, "R E"]) -> Float[Array, ""]:
    """A sum whose gradient in the embeddings is `pull`."""
    return (embeddings * pull).sum()  # elementwise: a dot product would be rounded on accelerators


def _contrast(
    objective: Objective, embeddings: Embeddings, logit_scale: jax.Array, identity: jax.Array
) -> tuple[tuple[Embeddings, jax.Array], Metrics]:
    """The gradient of the contrastive loss with respect to the embeddings, in parts, and to the temperature."""

    def loss(embeddings, logit_scale):
        metrics = objective.contrast(jax.tree.map(joined, embeddings), logit_scale, identity)
        return objective.weighted(metrics), metrics

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(embeddings, logit_scale)


def in_parts(rows: Shaped[Array, "B ..."], parts: int) -> Shaped[Array, "P _ ..."]:
    """The rows in so many parts. A part takes every `parts`-th row, so that each device has its share of every part."""
    return rows.reshape(-1, parts, *rows.shape[1:]).swapaxes(0, 1)


def joined(parts: Shaped[Array, "P R ..."]) -> Shaped[Array, "_ ..."]:
    """The rows that `in_parts` was given."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])
