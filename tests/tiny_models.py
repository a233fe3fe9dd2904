"""VLAB models that compile within seconds, random parameters for them, and random batches."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from compile_options import QUICK
from flax import linen as nn

from vlab_jax.models.layers import Block
from vlab_jax.models.vlab import VLAB, parameter_shapes

WIDTH, FRAMES, SIZE, PATCHES, LENGTH, VOCABULARY, EMBED = 16, 4, 16, 4, 8, 40, 8

TOWER = {"width": WIDTH, "depth": 2, "heads": 2, "mlp_width": 32, "embed_width": EMBED}
VISION = {"image_size": SIZE, "patch_size": 8, **TOWER}
TEXT = {"vocab_size": VOCABULARY, "context_length": LENGTH, **TOWER}
ADAPTER = {
    "blocks": (0, 1),
    "before_mlp": False,
    "width": 8,
    "mixer": "conv",
    "kernel": (3, 1, 1),
    "heads": 2,
}
DECODER = {"blending": "concat", "cross_attention_every": 1}


def tiny_vlab(**changes: Any) -> VLAB:
    """A VLAB of two blocks. A mapping among `changes` updates a part's fields, anything else replaces a field."""
    fields = {"vision": VISION, "text": TEXT, "adapter": ADAPTER, "decoder": DECODER, "frames": FRAMES}
    for key, value in changes.items():
        fields[key] = {**fields[key], **value} if isinstance(value, Mapping) else value
    return VLAB.from_fields(fields)


def random_like(shapes: Any, seed: int = 0, scale: float = 0.3) -> Any:
    """Normal random arrays of a tree's shapes: no parameter is zero, so that each has an influence."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype), shapes)


def random_parameters(model: VLAB, seed: int = 0) -> Any:
    """Random parameters of a model; the temperature is a usual one."""
    parameters = random_like(parameter_shapes(model, model.frames), seed)
    return {**parameters, "logit_scale": jnp.asarray(2.0)}


def random_vision_parameters(model: VLAB, seed: int = 0) -> Any:
    """Random parameters of the vision tower and the adapters, which are all that `encode_frames` uses."""
    video = jax.ShapeDtypeStruct((1, model.frames, SIZE, SIZE, 3), jnp.uint8)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda video: model.init(key, video, method=encode_frames), video)
    return random_like(shapes["params"], seed)


def encode_frames(model: VLAB, video: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The video stream before pooling over frames, as a `method` of `VLAB`: tokens `[B, T, M, D]`, embeddings
    `[B, T, E]`."""
    return model._video_stream(model._run_until(video, model.vision_tower, model.common_blocks))


def quick_jit(function: Callable, **options: Any) -> Callable:
    """`jax.jit` with `QUICK`."""
    return jax.jit(function, compiler_options=QUICK, **options)


def random_video(clips: int, frames: int = FRAMES, seed: int = 0) -> jax.Array:
    """uint8 noise `[clips, frames, SIZE, SIZE, 3]`."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, 256, (clips, frames, SIZE, SIZE, 3), np.uint8))


def random_batch(clips: int, frames: int = FRAMES, seed: int = 0) -> dict[str, jax.Array]:
    """A training batch: noise, texts of different lengths, each clip by itself."""
    rng = np.random.default_rng(seed)
    return {
        "video": random_video(clips, frames, seed),
        "tokens": jnp.asarray(rng.integers(1, VOCABULARY, (clips, LENGTH)), jnp.int32),
        "lengths": jnp.asarray(rng.integers(4, LENGTH + 1, clips), jnp.int32),
        "clip": jnp.arange(clips, dtype=jnp.int32),
    }


def largest_difference(one: Any, other: Any) -> float:
    """The largest absolute difference between two arrays."""
    return float(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).max())


def with_block_states(module: nn.Module, parameters: Any, *inputs: Any, **options: Any) -> tuple[Any, jax.Array]:
    """A module's output, and the outputs of the blocks of its one transformer: `[depth, B, L, D]`."""

    def run(parameters, *inputs):
        output, state = module.apply(
            {"params": parameters},
            *inputs,
            **options,
            capture_intermediates=lambda inner, method: isinstance(inner, Block) and method == "__call__",
            mutable=["intermediates"],
        )
        (((states, _),),) = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, tuple))
        return output, states

    return quick_jit(run)(parameters, *inputs)
