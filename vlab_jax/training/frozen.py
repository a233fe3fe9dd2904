"""Frozen parameters: which ones a stage freezes, and how they are held on the devices.

A stage freezes what its config says, and may freeze what its objectives do not reach: that has a gradient of zero, and
yet AdamW's weight decay would shrink it.

Frozen parameters are only multiplied with, in the compute type. Held in that type, they take half of the memory, and
products are the same to the bit. Norms, positions and the temperature are used in float32 and stay in it (they are
small). Nothing is rounded for good: the float32 originals lie in the host's memory, split as on the devices, go into
every checkpoint, and are what the next stage starts from.
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

# Parameters that the model casts to the compute type before it does anything else with them.
CAST_BEFORE_USE = re.compile(r"(kernel|token_embedding|(?<!norm/)bias)$")
# The parts of a VLAB that start as a CLIP, or as a copy of one.
CLIP_PARTS = ("vision", "text", "image_encoder", "logit_scale")
HOST = "pinned_host"


def rounded_mask(shapes: Any, trainable_mask: Any, dtype: Any) -> Any:
    """A tree of bools like the parameters: whether a frozen parameter is rounded to the compute type."""

    def is_rounded(path: Any, leaf: Any, trains: bool) -> bool:
        narrower = jnp.dtype(dtype).itemsize < jnp.dtype(leaf.dtype).itemsize
        return narrower and not trains and CAST_BEFORE_USE.search(path_name(path)) is not None

    return jax.tree_util.tree_map_with_path(is_rounded, shapes, trainable_mask)


def rounded_shapes(shapes: Any, mask: Any, dtype: Any) -> Any:
    """The shapes of the parameters as they lie on the devices."""
    return jax.tree.map(lambda leaf, rounds: jax.ShapeDtypeStruct(leaf.shape, dtype) if rounds else leaf, shapes, mask)


def host_shardings(shardings: Any, mask: Any) -> Any:
    """The shardings, with those of rounded parameters moved to the host's memory."""
    return jax.tree.map(lambda place, rounds: place.with_memory_kind(HOST) if rounds else place, shardings, mask)


def keep_originals(parameters: Any, mask: Any, shardings: Any) -> Any:
    """The float32 values of the rounded parameters, in the host's memory; None for the others."""

    def to_host(leaf: Any, rounds: bool, place: Any) -> jax.Array | None:
        return jax.device_put(leaf, place.with_memory_kind(HOST)) if rounds else None

    return jax.tree.map(to_host, parameters, mask, shardings)


def round_frozen(parameters: Any, mask: Any, shardings: Any, dtype: Any) -> Any:
    """The parameters as they lie on the devices. The arrays of `parameters` are used up: one that is not rounded and
    lies in its place is returned itself, and no float32 array of a rounded one stays on the devices."""

    def on_device(leaf: Any, rounds: bool, place: Any) -> jax.Array:
        placed = jax.device_put(leaf, place)
        if not rounds:
            return placed
        cast = jax.jit(lambda x: x.astype(dtype), out_shardings=place)(placed)
        cast.block_until_ready()  # one after the other, so that only one float32 array lies beside the rounded ones
        placed.delete()
        return cast

    return jax.tree.map(on_device, parameters, mask, shardings)


def with_originals(state: TrainState, originals: Any) -> TrainState:
    """The state with the float32 originals in place of the rounded parameters, as it is saved."""
    return state.replace(parameters=combine(originals, state.parameters))


def unused_patterns(model: VLAB, weights: Mapping[str, float], streams: Sequence[str]) -> tuple[str, ...]:
    """Patterns for the beginning of the paths of parameters that no objective of a stage with these weights (0: absent)
    and streams reaches; some may be of parts that the model lacks."""
    contrasts = bool(weights.get("contrastive"))
    decodes = any(weight for name, weight in weights.items() if name != "contrastive")
    blend = {"image": model.embedding_blend, "video": 1 - model.embedding_blend}  # weights in the clips' embeddings
    embedded = [stream for stream in streams if contrasts and (len(streams) == 1 or blend[stream])]
    decoded = [name for name in BLENDINGS[model.decoder["blending"]].streams if name in streams] if decodes else []
    image_tower = "image_encoder" if model.image_encoder == "separate" else "vision"
    tower_of = {"video": "vision", "image": image_tower}
    patterns = [] if contrasts else ["text/", "logit_scale$"]
    for tower in ("vision", "image_encoder"):
        if tower not in {tower_of[stream] for stream in (*embedded, *decoded)}:
            patterns.append(f"{tower}/")
        elif tower not in {tower_of[stream] for stream in embedded}:
            patterns.append(f"{tower}/(ln_post|projection)/")  # make the embedding; the decoder reads tokens
    if "video" not in (*embedded, *decoded):
        patterns.append("video_adapter/")
    if not decodes:
        return (*patterns, "decoder/")
    patterns += [f"decoder/({name}_|cross_attention/[a-z]+_{name}/)" for name in STREAMS if name not in decoded]
    return tuple(patterns) if weights.get("masked_lm") else (*patterns, "decoder/mask_embedding$")


def freeze_unused(
    parameters: Any, groups: Sequence[Group], model: VLAB, weights: Mapping[str, float], streams: Sequence[str]
) -> tuple[Group, ...]:
    """The groups, with a frozen one in front for the parameters that no objective reaches, if there are any; `weights`
    and `streams` are those of `unused_patterns`."""
    paths = _paths(parameters)
    patterns = [p for p in unused_patterns(model, weights, streams) if any(re.match(p, path) for path in paths)]
    return (Group(f"^({'|'.join(patterns)})", None), *groups) if patterns else tuple(groups)


def frozen_clip_parts(
    parameters: Any, groups: Sequence[Group], model: VLAB, weights: Mapping[str, float], streams: Sequence[str]
) -> tuple[str, ...]:
    """The parts of CLIP that a stage uses and keeps frozen as a whole, as pre-training keeps an image encoder."""
    unused = re.compile("|".join(unused_patterns(model, weights, streams)) or "$")
    numbers = jax.tree.leaves(assign_groups(parameters, groups))
    used = [(path, groups[n]) for path, n in zip(_paths(parameters), numbers, strict=True) if not unused.match(path)]
    rates = {part: [group.learning_rate for path, group in used if path.split("/")[0] == part] for part in CLIP_PARTS}
    return tuple(part for part in CLIP_PARTS if rates[part] and set(rates[part]) == {None})


def _paths(parameters: Any) -> list[str]:
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(parameters)]
