"""The train state, and one pure step of training."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from vlab_jax.models.vlab import VLAB
from vlab_jax.training import objectives
from vlab_jax.training.gradient_cache import gradient_in_parts
from vlab_jax.training.stage_objective import Metrics, Objective


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
