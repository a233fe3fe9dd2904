"""The train state, and one pure step of training."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Shaped

from vlab_jax.models.vlab import VLAB
from vlab_jax.training import objectives
from vlab_jax.training.objectives import Clips, Embeddings, Metrics, Objective, Prepared

# FOLDED vlab_jax/training/step.py: What one step of training goes through, by which its speed and utilisation
# are reckoned.


# FOLDED vlab_jax/training/step.py: Gradients of a batch that is too large to go through the model at once
# (GradCache: Gao et al., arXiv 2101.06983).  The contrastive loss needs the embeddings of the whole batch, but the
# gradient of each embedding can be found before the model's. First the embeddings alone are computed, part by part;
# then the loss and its gradient with respect to them; then each part goes through the model again, and passes its
# embeddings' gradient on to the parameters. Losses that are sums over clips are computed in that second pass. The
# price is the first pass: about a third of the time more.


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


class TrainState(struct.PyTreeNode):
    """What a step changes.

    Attributes:
      parameters: all of them; frozen ones may be held in the compute type (`frozen_storage.py`).
      optimizer: of the trainable parameters alone.
      average: the exponential moving average of the trainable parameters, with None for frozen ones; or None.
    """

    step: Any
    parameters: Any
    optimizer: Any
    average: Any = None

    @property
    def evaluated(self) -> Any:
        """The parameters that are evaluated: the average, if it is kept, of those that train."""
        return self.parameters if self.average is None else combine(self.average, self.parameters)


def trainable_part(tree: Any, trainable: Any) -> Any:
    """The tree with None in place of what is frozen; `trainable` is a tree of bools like it."""
    return jax.tree.map(lambda leaf, trains: leaf if trains else None, tree, trainable)


def combine(part: Any, whole: Any) -> Any:
    """`whole`, with the leaves of `part` where that has any."""
    return jax.tree.map(lambda new, old: old if new is None else new, part, whole, is_leaf=lambda leaf: leaf is None)


def init_state(
    parameters: Any, optimizer: optax.GradientTransformation, averaged: bool, trainable: Any = None
) -> TrainState:
    """A state at step 0 of a stage, with the very arrays of `parameters` in it.

    Args:
      averaged: whether a moving average is kept.
      trainable: a tree of bools like the parameters; None: all of them are.
    """
    learned = parameters if trainable is None else trainable_part(parameters, trainable)
    average = jax.tree.map(jnp.copy, learned) if averaged else None
    return TrainState(jnp.zeros((), jnp.int32), parameters, optimizer.init(learned), average)


def make_train_step(
    model: VLAB,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    trainable: Any,
    *,
    seed: int,
    average_decay: float = 0.0,
    parts: int = 1,
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]:
    """The function (state, batch) → (state, metrics).

    Where the loss or its gradient is not finite, nothing but the number of steps changes, and `skipped` is 1.

    Args:
      optimizer: of the trainable parameters, a tree with None in place of frozen ones.
      trainable: a tree of bools like the parameters; the gradient of what is frozen is not computed.
      seed: of what the step draws (masked tokens); the draw depends on it and on the step alone.
      average_decay: of the moving average of the parameters; 0 keeps none.
      parts: how many parts of the batch go through the model one after the other, see `gradient_cache.py`.
    """

    def step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)

        def merge(learned):
            return combine(learned, jax.lax.stop_gradient(state.parameters))

        def loss(learned):
            return objective(model, merge(learned), batch, rng)

        learned = trainable_part(state.parameters, trainable)
        if parts == 1:
            gradients, metrics = jax.grad(loss, has_aux=True)(learned)
        else:
            gradients, metrics = gradient_in_parts(objective, model, merge, learned, batch, rng, parts)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, learned)
        learned = optax.apply_updates(learned, updates)
        if trainable["logit_scale"]:
            learned = {**learned, "logit_scale": objectives.clamp_temperature(learned["logit_scale"])}
        average = state.average
        if average is not None:
            average = optax.incremental_update(learned, average, 1 - average_decay)
        parameters = combine(learned, state.parameters)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        new = TrainState(state.step + 1, parameters, optimizer_state, average)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state).replace(step=new.step)
        return kept, {**metrics, "gradient_norm": norm, "skipped": 1.0 - finite}

    return step
