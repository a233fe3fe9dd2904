"""The train state, and one step of training as a pure function.

A batch that is too large for the model goes through it in micro-batches, by GradCache (Gao et al., arXiv 2101.06983):
the contrastive loss needs the embeddings of the whole batch, but their gradient does not need the model. First the
embeddings alone are computed, micro-batch by micro-batch, then the loss and its gradient with respect to them. In a
second pass each micro-batch goes through the model again, passes the gradient of its embeddings on to the parameters,
and adds the gradient of its decoder losses. The first pass costs about a third more time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Shaped

from vlab_jax.models.vlab import VLAB
from vlab_jax.training.objectives import Arrays, Metrics, Objective, PreparedBatch, clamp_temperature


class TrainState(struct.PyTreeNode):
    """What a step changes."""

    step: Any
    parameters: Any  # all of them; frozen ones may be held in the compute type (`frozen.py`)
    optimizer: Any  # its state, for the trainable parameters only
    # The exponential moving average of the trainable parameters, with None for frozen ones; or None.
    average: Any = None

    @property
    def evaluated(self) -> Any:
        """The parameters to evaluate: the moving average of the trainable ones, if there is one."""
        return self.parameters if self.average is None else combine(self.average, self.parameters)


def trainable_params(tree: Any, trainable_mask: Any) -> Any:
    """The tree with None in place of frozen leaves; the mask is a tree of bools of the same structure."""
    return jax.tree.map(lambda leaf, trains: leaf if trains else None, tree, trainable_mask)


def combine(part: Any, whole: Any) -> Any:
    """`whole`, with the leaves of `part` wherever it has one."""
    return jax.tree.map(lambda new, old: old if new is None else new, part, whole, is_leaf=lambda leaf: leaf is None)


def init_state(
    parameters: Any, optimizer: optax.GradientTransformation, averaged: bool, trainable_mask: Any
) -> TrainState:
    """A state at step 0 of a stage, with the very arrays of `parameters` in it; `averaged`: with a moving average."""
    trainable = trainable_params(parameters, trainable_mask)
    average = jax.tree.map(jnp.copy, trainable) if averaged else None
    return TrainState(jnp.zeros((), jnp.int32), parameters, optimizer.init(trainable), average)


def make_train_step(
    model: VLAB,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    trainable_mask: Any,
    *,
    seed: int,
    average_decay: float = 0.0,
    micro_batches: int = 1,
) -> Callable[[TrainState, Arrays], tuple[TrainState, Metrics]]:
    """The function (state, batch) → (state, metrics). Where the loss or its gradient is not finite, nothing but the
    step number changes, and the metric `skipped` is 1.

    Args:
      optimizer: of the trainable parameters, a tree with None in place of frozen ones.
      trainable_mask: a tree of bools like the parameters; gradients of frozen parameters are not computed.
      seed: of the masked tokens; the draw depends on it and on the step alone.
      micro_batches: how many parts of the batch go through the model one after the other.
    """

    def step(state: TrainState, batch: Arrays) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)

        def all_params(trainable):
            return combine(trainable, jax.lax.stop_gradient(state.parameters))

        def loss(trainable):
            return objective(model, all_params(trainable), batch, rng)

        trainable = trainable_params(state.parameters, trainable_mask)
        if micro_batches == 1:
            gradients, metrics = jax.grad(loss, has_aux=True)(trainable)
        else:
            gradients, metrics = micro_batched_gradient(
                objective, model, all_params, trainable, batch, rng, micro_batches
            )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, trainable)
        trainable = optax.apply_updates(trainable, updates)
        if trainable_mask["logit_scale"]:
            trainable = {**trainable, "logit_scale": clamp_temperature(trainable["logit_scale"])}
        average = state.average
        if average is not None:
            average = optax.incremental_update(trainable, average, 1 - average_decay)
        parameters = combine(trainable, state.parameters)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        new = TrainState(state.step + 1, parameters, optimizer_state, average)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state).replace(step=new.step)
        return kept, {**metrics, "gradient_norm": norm, "skipped": 1.0 - finite}

    return step


def micro_batched_gradient(
    objective: Objective,
    model: VLAB,
    all_params: Callable[[Any], Any],
    trainable: Any,
    batch: Arrays,
    rng: jax.Array,
    micro_batches: int,
) -> tuple[Any, Metrics]:
    """The gradient of the whole batch's loss with respect to the trainable parameters, and its metrics; `all_params`
    turns trainable parameters into all parameters, and `micro_batches` divides the batch."""

    def contrastive_loss(embeddings, logit_scale):  # of split embeddings
        metrics = objective.contrast(jax.tree.map(join_rows, embeddings), logit_scale, batch["clip"])
        return objective.weighted_sum(metrics), metrics

    def product(embeddings, embedding_grad):  # its gradient with respect to the embeddings is `embedding_grad`
        return (embeddings * embedding_grad).sum()  # elementwise: accelerators would round a dot product

    prepared = objective.prepare(batch, rng)
    split = jax.tree.map(lambda rows: split_rows(rows, micro_batches), prepared.clips)
    gradient, metrics, embedding_grads = jax.tree.map(jnp.zeros_like, trainable), {}, None
    if objective.is_contrastive:
        embeddings = jax.lax.map(lambda clips: objective.embed(model, all_params(trainable), clips), split)
        contrastive_grad = jax.grad(contrastive_loss, argnums=(0, 1), has_aux=True)
        (embedding_grads, scale_grad), metrics = contrastive_grad(embeddings, all_params(trainable)["logit_scale"])
        if trainable["logit_scale"] is not None:
            gradient = {**gradient, "logit_scale": scale_grad}

    def add(gradient, part):
        clips, embedding_grad = part

        def loss(trainable):
            embeddings, losses = objective.forward(model, all_params(trainable), PreparedBatch(clips, prepared.counts))
            surrogate = sum(map(product, embeddings, embedding_grad)) if objective.is_contrastive else 0.0
            return objective.weighted_sum(losses) + surrogate, losses

        own, losses = jax.grad(loss, has_aux=True)(trainable)
        return jax.tree.map(jnp.add, gradient, own), losses

    gradient, losses = jax.lax.scan(add, gradient, (split, embedding_grads))
    metrics |= {name: values.sum() for name, values in losses.items()}
    return gradient, {"loss": objective.weighted_sum(metrics), **metrics}


def split_rows(rows: Shaped[Array, "B ..."], parts: int) -> Shaped[Array, "P _ ..."]:
    """The rows in so many parts. A part takes every `parts`-th row, so that each device has its share of every part."""
    return rows.reshape(-1, parts, *rows.shape[1:]).swapaxes(0, 1)


def join_rows(parts: Shaped[Array, "P R ..."]) -> Shaped[Array, "_ ..."]:
    """The inverse of `split_rows`."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])
