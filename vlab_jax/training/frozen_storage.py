"""Frozen parameters: on the devices in the type that products are computed in, their float32 values on the host.

What a stage freezes is only multiplied with, in the compute type; held in it, it takes half of the room, and the
products are the same to the bit. Norms, positions and the temperature are computed with in float32, and stay as they
are (they are small). Nothing is rounded for good: the float32 values lie in the host's memory, split as on the devices,
go into every checkpoint, and are what the next stage starts from.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

from vlab_jax.runtime.sharding import path_name
from vlab_jax.training.step import TrainState, combine

# Parameters that the model casts to the compute type before it does anything else with them.
CAST_BEFORE_USE = re.compile(r"(kernel|token_embedding|(?<!norm/)bias)$")
HOST = "pinned_host"


def rounded(shapes: Any, trainable: Any, dtype: Any) -> Any:
    """A tree of bools like the parameters': whether a parameter is held in `dtype`, which is not its own."""

    def held(path: Any, leaf: Any, trains: bool) -> bool:
        narrower = jnp.dtype(dtype).itemsize < jnp.dtype(leaf.dtype).itemsize
        return narrower and not trains and CAST_BEFORE_USE.search(path_name(path)) is not None

    return jax.tree_util.tree_map_with_path(held, shapes, trainable)


def held_shapes(shapes: Any, rounded: Any, dtype: Any) -> Any:
    """The shapes of the parameters as they lie on the devices."""
    return jax.tree.map(lambda leaf, held: jax.ShapeDtypeStruct(leaf.shape, dtype) if held else leaf, shapes, rounded)


def on_host(shardings: Any, rounded: Any) -> Any:
    """The shardings, with those of what is rounded in the host's memory."""
    return jax.tree.map(lambda place, held: place.with_memory_kind(HOST) if held else place, shardings, rounded)


def originals(parameters: Any, rounded: Any, shardings: Any) -> Any:
    """The float32 values of what is rounded, in the host's memory; None for the rest."""
    return jax.tree.map(
        lambda leaf, held, place: jax.device_put(leaf, place.with_memory_kind(HOST)) if held else None,
        parameters,
        rounded,
        shardings,
    )


def held(parameters: Any, rounded: Any, shardings: Any, dtype: Any) -> Any:
    """Parameters as they lie on the devices. What is given is used up: what is not rounded is the very array, where it
    lies already as `shardings` say, and of what is, no float32 array stays on the devices."""

    def on_device(leaf: Any, is_held: bool, place: Any) -> jax.Array:
        placed = jax.device_put(leaf, place)
        if not is_held:
            return placed
        cast = jax.jit(lambda x: x.astype(dtype), out_shardings=place)(placed)
        cast.block_until_ready()  # one after the other, so that a single float32 array lies beside the rounded ones
        placed.delete()
        return cast

    return jax.tree.map(on_device, parameters, rounded, shardings)


def exact(state: TrainState, originals: Any) -> TrainState:
    """The state with the float32 values in place of the rounded ones: what is saved."""
    return state.replace(parameters=combine(originals, state.parameters))
