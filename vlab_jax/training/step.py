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
    """What a step changes. `average` is the exponential moving average of the parameters, or None."""

    step: Any
    parameters: Any
    optimizer: Any
    average: Any = None

    @property
    def evaluated(self) -> Any:
        """The parameters that are evaluated: their average, if it is kept."""
        return self.parameters if self.average is None else self.average


def init_state(parameters: Any, optimizer: optax.GradientTransformation, averaged: bool) -> TrainState:
    """A state at step 0 of a stage."""
    average = jax.tree.map(jnp.copy, parameters) if averaged else None
    return TrainState(jnp.zeros((), jnp.int32), parameters, optimizer.init(parameters), average)


def make_train_step(
    model: VLAB,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    learns: Any,
    *,
    seed: int,
    average_decay: float = 0.0,
    parts: int = 1,
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]:
    """The function (state, batch) → (state, metrics).

    Where the loss or its gradient is not finite, nothing but the number of steps changes, and `skipped` is 1.

    Args:
      learns: a tree of bools like the parameters; the gradient of what does not learn is not computed.
      seed: of what the step draws (masked tokens); the draw depends on it and on the step alone.
      average_decay: of the moving average of the parameters; 0 keeps none.
      parts: how many parts of the batch go through the model one after the other, see `gradient_cache.py`.
    """

    def step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)

        def merge(learned):
            return jax.tree.map(
                lambda new, old, learn: new if learn else jax.lax.stop_gradient(old),
                learned,
                state.parameters,
                learns,
                is_leaf=lambda leaf: leaf is None,
            )

        def loss(learned):
            return objective(model, merge(learned), batch, rng)

        learned = jax.tree.map(lambda leaf, learn: leaf if learn else None, state.parameters, learns)
        if parts == 1:
            gradients, metrics = jax.grad(loss, has_aux=True)(learned)
        else:
            gradients, metrics = gradient_in_parts(objective, model, merge, learned, batch, rng, parts)
        gradients = jax.tree.map(
            lambda gradient, leaf: jnp.zeros_like(leaf) if gradient is None else gradient,
            gradients,
            state.parameters,
            is_leaf=lambda leaf: leaf is None,
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        if learns["logit_scale"]:
            clamped = objectives.clamp_temperature(parameters["logit_scale"])
            parameters = {**parameters, "logit_scale": clamped}
        average = state.average
        if average is not None:
            average = optax.incremental_update(parameters, average, 1 - average_decay)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        new = TrainState(state.step + 1, parameters, optimizer_state, average)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state).replace(step=new.step)
        return kept, {**metrics, "gradient_norm": norm, "skipped": 1.0 - finite}

    return step
