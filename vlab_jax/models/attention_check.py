"""Checks the fused attention kernels of a run against plain attention, once, on the devices of the run.

A fused kernel is third-party code for a machine that our tests may never have run on. Before the first step, its
outputs and gradients for random inputs, at the run's lengths and head widths, are compared with those of plain
attention in float32. A kernel that differs by more than the rounding of its type is not used.
"""

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlab_jax.models.attention import Kernels, attend, uses_cudnn
from vlab_jax.models.decoder import BLENDINGS
from vlab_jax.models.video_adapter import MIXERS
from vlab_jax.models.vlab import VLAB

ROWS = 2
# The largest errors of half precision that pass, in roundings of the type: of the root mean square, and of the largest
# value. XLA's own attention in bfloat16 has an error of 0.6 in the root mean square.
ROUNDINGS, LARGEST_ROUNDINGS = 2.0, 16.0


class AttentionShape(NamedTuple):
    """The shape of an attention from `queries` to `keys` tokens; `lengths`: rows have different numbers of keys."""

    queries: int
    keys: int
    heads: int
    head_width: int
    causal: bool = False
    lengths: bool = False

    def __str__(self) -> str:
        order = "causal, " if self.causal else ""
        return f"{order}{self.queries} queries, {self.keys} keys, {self.heads} heads of {self.head_width}"


def attention_shapes(
    model: VLAB, frames: int, image_frames: int, streams: Iterable[str], texts: int, masked: bool
) -> list[AttentionShape]:
    """The shapes of all attentions in a model's training step, each once.

    Args:
      frames, image_frames: of a clip in the video and in the image stream.
      streams: which of `video` and `image` are computed.
      texts: causal texts per clip that the decoder reads at once; 0: none.
      masked: whether it also reads a text in both directions.
    """
    vision, text, adapter, tokens = model.vision, model.text, model.adapter, model.tokens_per_frame
    length, heads = text["context_length"], (text["heads"], text["width"] // text["heads"])
    shapes = [
        AttentionShape(tokens, tokens, vision["heads"], vision["width"] // vision["heads"]),
        AttentionShape(length, length, *heads, causal=True),
    ]
    if adapter["blocks"] and MIXERS[adapter["mixer"]].attends:
        shapes.append(AttentionShape(frames, frames, adapter["heads"], adapter["width"] // adapter["heads"]))
    if masked:
        shapes.append(AttentionShape(length, length, *heads, lengths=True))
    counts = {"video": frames * tokens, "image": image_frames * tokens}
    visual = BLENDINGS[model.decoder["blending"]].lengths({stream: counts[stream] for stream in streams})
    for read in {texts, int(masked)} - {0}:
        shapes += [AttentionShape(read * length, keys, *heads) for keys in visual.values() if keys]
    return list(dict.fromkeys(shapes))


def find_wrong_kernel(
    shapes: Iterable[AttentionShape], dtype: Any, kernels: Kernels, attention: Callable[..., jax.Array] = attend
) -> str | None:
    """The first fault of a fused kernel among these shapes, in one line; None: there is no fault, or no fused kernel.

    Args:
      attention: the function to compare with plain attention, with the arguments of `attend`.
    """
    for shape in shapes:
        if shape.queries == 1 or not uses_cudnn(kernels, dtype, shape.head_width):
            continue
        try:
            difference = _difference(shape, jnp.dtype(dtype), kernels, attention)
        except Exception as error:  # kernels that are refused or missing raise errors of any type
            difference = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if difference is not None:
            return f"{shape}: {difference}"
    return None


def with_checked_kernels(model: VLAB, shapes: Iterable[AttentionShape]) -> VLAB:
    """The model, or, if a fused kernel that it would use is wrong, the model with XLA's attention and a warning."""
    wrong = find_wrong_kernel(shapes, model.dtype, model.kernels)
    if wrong is None:
        return model
    logging.warning("the fused attention is not used, XLA's is (attention='xla' says so from the start): %s", wrong)
    return model.clone(attention="xla")


def _difference(shape: AttentionShape, dtype: Any, kernels: Kernels, attention: Callable[..., jax.Array]) -> str | None:
    """The first of output and gradients that differs by more than rounding, and how much; None: all are right."""
    rngs = jax.random.split(jax.random.key(0), 4)
    lengths = (shape.queries, shape.keys, shape.keys, shape.queries)
    *inputs, cotangent = (
        jax.random.normal(rng, (ROWS, length, shape.heads, shape.head_width)).astype(dtype)
        for rng, length in zip(rngs, lengths, strict=True)
    )
    options: dict[str, Any] = {"causal": shape.causal}
    if shape.lengths:
        options["kv_lengths"] = jnp.array([shape.keys, max(1, shape.keys // 3)], jnp.int32)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def with_gradients(function, kernels, inputs, cotangent):
        output, vjp = jax.vjp(functools.partial(function, **options, kernels=kernels), *inputs)
        return output, *vjp(cotangent)

    found = with_gradients(attention, kernels, inputs, cotangent)
    with jax.default_matmul_precision("highest"):
        *inputs, cotangent = (array.astype(jnp.float32) for array in (*inputs, cotangent))
        exact = with_gradients(attend, kernels._replace(attention="xla"), inputs, cotangent)
    parts = ("output", "gradient of the query", "gradient of the key", "gradient of the value")
    for part, one, other in zip(parts, found, exact, strict=True):
        mean, largest = rounding_errors(one, other)
        if not (mean <= ROUNDINGS and largest <= LARGEST_ROUNDINGS):  # so that NaN fails, too
            return f"its {part} is off by {mean:.1f} roundings of {dtype.name} (largest {largest:.1f})"
    return None


def rounding_errors(found: Float[Array, "..."], exact: Float[Array, "..."]) -> tuple[float, float]:
    """The error of `found` in roundings of its type: the root mean square relative to that of `exact`, and the largest
    relative to the largest value of `exact`."""
    exact = exact.astype(jnp.float32)
    error = jnp.abs(found.astype(jnp.float32) - exact)
    unit = float(jnp.finfo(found.dtype).eps)
    mean = float(jnp.sqrt((error**2).mean() / (exact**2).mean()))
    return mean / unit, float(error.max() / jnp.abs(exact).max()) / unit
