"""Compares the attention kernels that a run will use with plain attention, once, on the devices that it will use.

A kernel is somebody else's program, for a machine that the tests have perhaps never seen. Before the first step it
computes, at the run's own lengths and head widths, two rows of random numbers and their gradients; plain softmax
attention does the same in float32. What differs by more than its type's rounding is not used.
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
from vlab_jax.models.vlab import VLAB

ROWS = 2
# Of the root mean square, and of the largest value: how far half precision may be off, in units of its rounding. XLA's
# own attention in bfloat16 is off by 0.6 of it in the root mean square.
ROUNDINGS, LARGEST_ROUNDINGS = 2.0, 16.0

Attention = Callable[..., jax.Array]


class AttentionShape(NamedTuple):
    """The shape of an attention: `queries` to `keys` tokens, `heads` of `head_width`; `lengths`: a row has its own."""

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
    """The attentions of a model's training step, each once.

    Args:
      frames, image_frames: of a clip, in the video and in the image stream.
      streams: which of `video` and `image` are computed.
      texts: texts of a clip that the decoder reads from left to right at once; 0: none.
      masked: whether it reads one in both directions, too.
    """
    vision, text, adapter = model.vision, model.text, model.adapter
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    length, width = text["context_length"], text["width"] // text["heads"]
    shapes = [
        AttentionShape(tokens, tokens, vision["heads"], vision["width"] // vision["heads"]),
        AttentionShape(length, length, text["heads"], width, causal=True),
    ]
    if adapter["blocks"] and adapter["mixer"] == "attention":
        shapes.append(AttentionShape(frames, frames, adapter["heads"], adapter["width"] // adapter["heads"]))
    if masked:
        shapes.append(AttentionShape(length, length, text["heads"], width, lengths=True))
    blending = model.decoder["blending"]
    counts = {"video": frames, "image": image_frames}
    seen = [counts[stream] * tokens for stream in BLENDINGS[blending].streams if stream in streams]
    if BLENDINGS[blending].joined:
        seen = [sum(seen)]
    for read in {texts, int(masked)} - {0}:
        shapes += [AttentionShape(read * length, keys, text["heads"], width) for keys in seen if keys]
    return list(dict.fromkeys(shapes))


def wrong_kernel(
    shapes: Iterable[AttentionShape], dtype: Any, kernels: Kernels, attention: Attention = attend
) -> str | None:
    """What is wrong with the kernels that serve these shapes, in a line; None where nothing is, or none is used.

    Args:
      attention: what is compared with plain attention, called as `attend`.
    """
    for shape in shapes:
        if shape.queries == 1 or not uses_cudnn(kernels, dtype, shape.head_width):
            continue
        try:
            found = _difference(shape, jnp.dtype(dtype), kernels, attention)
        except Exception as error:  # a kernel that is refused, or missing, raises what it likes
            reason = str(error).strip().splitlines() or [type(error).__name__]
            return f"{shape}: {reason[0][:200]}"
        if found is not None:
            return f"{shape}: {found}"
    return None


def with_sound_kernels(model: VLAB, shapes: Iterable[AttentionShape]) -> VLAB:
    """The model, or, where a kernel that it would use is wrong, the same with XLA's attention; a warning says so."""
    wrong = wrong_kernel(shapes, model.dtype, model.kernels)
    if wrong is None:
        return model
    logging.warning("the fused attention is not used, XLA's is (attention='xla' says so from the start): %s", wrong)
    return model.clone(attention="xla")


def _difference(shape: AttentionShape, dtype: Any, kernels: Kernels, attention: Attention) -> str | None:
    """How the output or a gradient differs by more than rounding; None if none does."""
    keys = jax.random.split(jax.random.key(0), 4)
    lengths = {"query": shape.queries, "key": shape.keys, "value": shape.keys, "output": shape.queries}
    *given, cotangent = (
        jax.random.normal(key, (ROWS, length, shape.heads, shape.head_width)).astype(dtype)
        for key, length in zip(keys, lengths.values(), strict=True)
    )
    options: dict[str, Any] = {"causal": shape.causal}
    if shape.lengths:
        options["kv_lengths"] = jnp.array([shape.keys, max(1, shape.keys // 3)], jnp.int32)

    def with_gradients(function: Attention, arrays: list[jax.Array], cotangent: jax.Array) -> tuple[jax.Array, ...]:
        output, pull = jax.vjp(function, *arrays)
        return (output, *pull(cotangent))

    kernel = functools.partial(attention, **options, **kernels._asdict())
    plain = functools.partial(attend, **options, **kernels._replace(attention="xla")._asdict())
    ours = jax.jit(functools.partial(with_gradients, kernel))(given, cotangent)
    with jax.default_matmul_precision("highest"):
        wide = [array.astype(jnp.float32) for array in given]
        theirs = jax.jit(functools.partial(with_gradients, plain))(wide, cotangent.astype(jnp.float32))
    for name, one, other in zip(("output", *lengths), ours, theirs, strict=False):
        off = rounding_errors(one, other)
        if not (off[0] <= ROUNDINGS and off[1] <= LARGEST_ROUNDINGS):
            part = name if name == "output" else f"gradient of the {name}"
            return f"its {part} is off by {off[0]:.1f} roundings of {dtype.name} (largest {off[1]:.1f})"
    return None


def rounding_errors(found: Float[Array, "..."], exact: Float[Array, "..."]) -> tuple[float, float]:
    """How far `found` is from `exact` in roundings of `found`'s type: root mean square relative to that of `exact`, and
    the largest relative to the largest of `exact`."""
    exact = exact.astype(jnp.float32)
    off = jnp.abs(found.astype(jnp.float32) - exact)
    unit = float(jnp.finfo(found.dtype).eps)
    mean = float(jnp.sqrt((off**2).mean() / (exact**2).mean()))
    return mean / unit, float(off.max() / jnp.abs(exact).max()) / unit
