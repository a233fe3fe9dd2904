"""Which parameters a stage leaves as they are: those that its objectives do not reach, and those that it keeps frozen.

What no objective reaches has a gradient of zero, and yet AdamW changes it, where it is not frozen: its weight decay
shrinks the kernels of everything that learns.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlab_jax.models.decoder import BLENDINGS
from vlab_jax.models.vlab import STREAMS, VLAB
from vlab_jax.runtime.sharding import path_name
from vlab_jax.training.optim import Group, assign_groups
from vlab_jax.training.step import TrainState, combine

# FOLDED vlab_jax/training/frozen.py: Frozen parameters: on the devices in the type that products are
# computed in, their float32 values on the host.  What a stage freezes is only multiplied with, in the compute type;
# held in it, it takes half of the room, and the products are the same to the bit. Norms, positions and the
# temperature are computed with in float32, and stay as they are (they are small). Nothing is rounded for good: the
# float32 values lie in the host's memory, split as on the devices, go into every checkpoint, and are what the next
# stage starts from.

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


# The parts of a VLAB that start as a CLIP, or as a copy of one.
CLIP_PARTS = ("vision", "text", "image_encoder", "logit_scale")


def unused(model: VLAB, weights: Mapping[str, float], streams: Sequence[str]) -> tuple[str, ...]:
    """Patterns of the parameters that no objective of a stage reaches, each for the beginning of a path.

    There may be patterns of parts that the model lacks.

    Args:
      weights: of the objectives; one that is absent or 0 is left out of the stage.
      streams: those that the stage computes.
    """
    contrasts = bool(weights.get("contrastive"))
    decodes = any(weight for name, weight in weights.items() if name != "contrastive")
    embedded = _embedded(model, streams) if contrasts else ()
    read = tuple(each for each in BLENDINGS[model.decoder["blending"]].streams if each in streams) if decodes else ()
    image_tower = "image_encoder" if model.image_encoder == "separate" else "vision"
    tower_of = {"video": "vision", "image": image_tower}
    patterns = [] if contrasts else ["text/", "logit_scale$"]
    for tower in ("vision", "image_encoder"):
        if tower not in {tower_of[stream] for stream in embedded + read}:
            patterns.append(f"{tower}/")
        elif tower not in {tower_of[stream] for stream in embedded}:
            patterns.append(f"{tower}/(ln_post|projection)/")  # make the embedding; the decoder reads tokens
    if "video" not in embedded + read:
        patterns.append("video_adapter/")
    if not decodes:
        return (*patterns, "decoder/")
    patterns += [f"decoder/({each}_|cross_attention/[a-z]+_{each}/)" for each in STREAMS if each not in read]
    return tuple(patterns) if weights.get("masked_lm") else (*patterns, "decoder/mask_embedding$")


def _embedded(model: VLAB, streams: Sequence[str]) -> tuple[str, ...]:
    """The streams that weigh in the clips' embeddings."""
    if len(streams) == 1:
        return tuple(streams)
    weights = {"image": model.embedding_blend, "video": 1 - model.embedding_blend}
    return tuple(stream for stream in STREAMS if weights[stream])


def freeze_unused(
    parameters: Any, groups: Sequence[Group], model: VLAB, weights: Mapping[str, float], streams: Sequence[str]
) -> tuple[Group, ...]:
    """The groups behind a frozen one for the parameters that no objective reaches, if there are any.

    Args:
      parameters: the model's, or their shapes.
      weights, streams: see `unused`.
    """
    paths = _paths(parameters)
    found = [each for each in unused(model, weights, streams) if any(re.match(each, path) for path in paths)]
    return (Group(f"^({'|'.join(found)})", None), *groups) if found else tuple(groups)


def kept_parts(
    parameters: Any, groups: Sequence[Group], model: VLAB, weights: Mapping[str, float], streams: Sequence[str]
) -> tuple[str, ...]:
    """The parts of CLIP that a stage uses and keeps frozen as a whole, as pre-training keeps an image encoder.

    Args:
      groups: those of the stage's config.
      parameters, weights, streams: see `freeze_unused`.
    """
    idle = re.compile("|".join(unused(model, weights, streams)) or "$")
    numbers = jax.tree.leaves(assign_groups(parameters, groups))
    used = [(path, groups[n]) for path, n in zip(_paths(parameters), numbers, strict=True) if not idle.match(path)]
    rates = {part: [group.learning_rate for path, group in used if path.split("/")[0] == part] for part in CLIP_PARTS}
    return tuple(part for part in CLIP_PARTS if rates[part] and set(rates[part]) == {None})


def _paths(parameters: Any) -> list[str]:
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(parameters)]
