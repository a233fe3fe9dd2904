"""Softmax attention: the one function that every module calls, rotary positions, and the layout of cached keys.

`attend` computes the same on every platform. The platform that the program is compiled for, a plain value that the
model carries (`Kernels`), selects the kernel. So a program can be traced for a platform that this machine lacks.

Dimensions: `B` rows of a batch, `L` query tokens, `K` key tokens, `H` heads, `d` head width, `G` patches along a side,
`M = G² + 1` tokens of an image, class token first.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# cuDNN refuses odd lengths where gradients are taken; multiples of 8 also suit the tensor cores.
CUDNN_LENGTH_MULTIPLE = 8
ROTARY_TEMPERATURE = 10_000.0


class Kernels(NamedTuple):
    """Which kernels compute attention.

    Attributes:
      platform: the platform that the program is compiled for: `cpu`, `cuda`, `rocm` or `tpu`.
      attention: `auto` uses the platform's fused kernel where it supports the shapes and types; `xla` never does.
    """

    platform: str = "cpu"
    attention: str = "auto"


def uses_cudnn(kernels: Kernels, dtype: Any, head_width: int) -> bool:
    """Whether cuDNN's fused attention is used: in half precision, for head widths that are multiples of 8 up to 128."""
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    return kernels == Kernels("cuda", "auto") and half and head_width % 8 == 0 and head_width <= 128


def attend(
    query: Float[Array, "B L H d"],
    key: Float[Array, "B K H d"],
    value: Float[Array, "B K H d"],
    *,
    causal: bool = False,
    kv_lengths: Int[Array, " B"] | None = None,
    query_starts: Int[Array, " B"] | None = None,
    soft_cap: float | None = None,
    kernels: Kernels = Kernels(),  # noqa: B008 (a constant)
) -> Float[Array, "B L H d"]:
    """Softmax attention with scores scaled by `d ** -0.5`; softmax in float32, the result in `value`'s type.

    Args:
      causal: a query attends to the keys up to its own position only.
      kv_lengths: the number of valid keys of each row; later keys are masked out. The output and the gradients of a row
        without valid keys are zero. None: all keys are valid.
      query_starts: with `causal`, the position of each row's first query among the keys, as with a cache. None: 0.
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)`; XLA computes it. None: scores stay as they are.
    """
    fused = uses_cudnn(kernels, query.dtype, query.shape[-1])
    # With a single query, as in token-by-token decoding, the scores are small: a fused kernel saves nothing.
    if fused and query.shape[1] > 1 and query_starts is None and soft_cap is None:
        attended = _cudnn_attention(query, key, value, causal, kv_lengths)
    else:
        mask = _attention_mask(query.shape[1], key.shape[1], causal, kv_lengths, query_starts)
        if soft_cap is not None or (kernels.platform == "cpu" and query.shape[1] > 1):
            attended = _head_major_attention(query, key, value, mask, soft_cap)
        else:
            attended = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")
    if kv_lengths is None:
        return attended
    return jnp.where((kv_lengths > 0)[:, None, None, None], attended, jnp.zeros_like(attended))


def _attention_mask(
    queries: int, keys: int, causal: bool, kv_lengths: jax.Array | None, query_starts: jax.Array | None
) -> Bool[Array, "_ 1 _ K"] | None:
    """True where a query attends to a key. None: no key is masked."""
    key_positions, mask = jnp.arange(keys), None
    if causal:
        starts = jnp.zeros((1,), jnp.int32) if query_starts is None else query_starts
        query_positions = starts[:, None] + jnp.arange(queries)  # [B, L]
        mask = (key_positions <= query_positions[..., None])[:, None]  # [B, 1, L, K]
    if kv_lengths is not None:
        valid = (key_positions < kv_lengths[:, None])[:, None, None]  # [B, 1, 1, K]
        mask = valid if mask is None else mask & valid
    return mask


def _cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, causal: bool, kv_lengths: jax.Array | None
) -> Float[Array, "B L H d"]:
    """cuDNN's fused kernel, on sequences padded to lengths that it accepts; causal order and lengths need no mask."""
    rows, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % CUDNN_LENGTH_MULTIPLE), (0, 0), (0, 0))) for x in (query, key, value)
    )
    lengths = {}
    if query.shape[1] != queries or key.shape[1] != keys or kv_lengths is not None:
        # The softmax over no keys is undefined: such a row attends to its first key, and `attend` zeroes the result.
        valid = jnp.full((rows,), keys, jnp.int32) if kv_lengths is None else jnp.maximum(kv_lengths, 1)
        lengths = {
            "query_seq_lengths": jnp.full((rows,), queries, jnp.int32),
            "key_value_seq_lengths": valid.astype(jnp.int32),
        }
    attended = jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation="cudnn", **lengths)
    return attended[:, :queries]


def _head_major_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, soft_cap: float | None
) -> Float[Array, "B L H d"]:
    """Attention that transposes heads to the front once, and divides by the softmax's sum after the second product.

    XLA for CPUs would otherwise choose another layout for the operands of each product (`experiments/speed`).
    """
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    scores = jnp.einsum("bhld,bhkd->bhlk", query * query.shape[-1] ** -0.5, key, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    output = jnp.einsum("bhlk,bhkd->bhld", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (output / weights.sum(axis=-1, keepdims=True)).astype(value.dtype).swapaxes(1, 2)


def to_cache_layout(x: Float[Array, "B K H d"], kernels: Kernels) -> Float[Array, "B _ _ _"]:
    """Keys or values in the layout that attention reads: XLA would otherwise transpose them (to `[B, H, d, K]`) before
    every one of many products."""
    return x if uses_cudnn(kernels, x.dtype, x.shape[3]) else x.transpose(0, 2, 3, 1)


def from_cache_layout(x: Float[Array, "B _ _ _"], kernels: Kernels, head_width: int) -> Float[Array, "B K H d"]:
    """The inverse of `to_cache_layout`."""
    return x if uses_cudnn(kernels, x.dtype, head_width) else x.transpose(0, 3, 1, 2)


# Cosines and sines of every token's rotary angles, `[M, d]` each; the class token's angles are zero.
Rotation = tuple[Any, Any]


def patch_rotation(side: int, head_width: int, reference_side: int) -> Rotation:
    """Rotary positions of `side × side` patches in two dimensions (EVA-02, Fang et al., arXiv 2303.11331).

    Half of a head's channels rotate with the row and half with the column, two neighbouring channels by one angle.
    Rows and columns are scaled to a grid of `reference_side` patches, that of the model's first training.
    """
    frequencies = ROTARY_TEMPERATURE ** -(np.arange(head_width // 4) / (head_width // 4))
    positions = np.arange(side) / side * reference_side
    rows, columns = np.meshgrid(positions, positions, indexing="ij")
    angles = np.stack([rows, columns], axis=-1).reshape(-1, 2, 1) * frequencies  # [G², 2, d/4]
    angles = np.repeat(angles.reshape(len(angles), -1), 2, axis=-1)  # [G², d]
    angles = np.concatenate([np.zeros((1, head_width)), angles])  # [M, d]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: Float[Array, "B M H d"], rotation: Rotation) -> Float[Array, "B M H d"]:
    """Rotates each pair of neighbouring channels by its token's angle, in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    orthogonal = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    cosine, sine = (jnp.asarray(part)[None, :, None, :] for part in rotation)
    return (x * cosine + orthogonal * sine).astype(x.dtype)
