"""Softmax attention: one function that every module calls, and the layout in which cached keys and values are kept.

`attend` computes the same whatever the platform; which kernel computes it is decided by the platform that the program
is compiled for, a plain value that the model carries (`Kernels`). So a program can be traced for a platform that is
not here, and each platform is traced by itself.

Dimensions: `B` rows of a batch, `L` query tokens, `K` key tokens, `H` heads, `d` head width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# cuDNN refuses odd lengths where gradients are taken; multiples of 8 also suit the tensor cores.
CUDNN_LENGTH_MULTIPLE = 8


class Kernels(NamedTuple):
    """What attention is computed by.

    Attributes:
      platform: that the program is compiled for: `cpu`, `cuda`, `rocm` or `tpu`.
      attention: `auto` (the platform's own kernel where it takes the shapes and types) or `xla` (never).
    """

    platform: str = "cpu"
    attention: str = "auto"


def uses_cudnn(kernels: Kernels, dtype: Any, head_width: int) -> bool:
    """Whether cuDNN's fused attention serves this type and these heads: half precision, multiples of 8 up to 128."""
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
    platform: str = "cpu",
    attention: str = "auto",
) -> Float[Array, "B L H d"]:
    """Softmax attention with scores scaled by `d ** -0.5`; softmax in float32, the result in `value`'s type.

    Args:
      causal: a query sees the keys up to its own place alone.
      kv_lengths: how many keys each row has; those behind are not seen. A row without any gives zeros, and so are its
        gradients. None: all of them.
      query_starts: where causal, the place of each row's first query among the keys, as behind a cache. None: 0.
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)`; XLA's path serves it. None: they stay.
      platform, attention: the fields of `Kernels`.
    """
    if query_starts is not None and query.shape[1] == 1 and causal:
        ahead = query_starts + 1
        kv_lengths = ahead if kv_lengths is None else jnp.minimum(kv_lengths, ahead)
        causal, query_starts = False, None
    fused = uses_cudnn(Kernels(platform, attention), query.dtype, query.shape[-1])
    # A single query, as in decoding token by token, has no scores of a size that a fused kernel would spare.
    if fused and query.shape[1] > 1 and query_starts is None and soft_cap is None:
        attended = _by_cudnn(query, key, value, causal, kv_lengths)
    else:
        mask = visible_keys(query.shape[1], key.shape[1], causal, kv_lengths, query_starts)
        if soft_cap is not None or (platform == "cpu" and query.shape[1] > 1):
            attended = _heads_in_front(query, key, value, mask, soft_cap)
        else:
            attended = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")
    if kv_lengths is None:
        return attended
    return jnp.where((kv_lengths > 0)[:, None, None, None], attended, jnp.zeros_like(attended))


def visible_keys(
    queries: int,
    keys: int,
    causal: bool,
    kv_lengths: Int[Array, " B"] | None = None,
    query_starts: Int[Array, " B"] | None = None,
) -> Bool[Array, "_ 1 _ K"] | None:
    """The mask that `attend`'s arguments say: true where a query sees a key. None where all see all."""
    places = jnp.arange(keys)
    mask = None
    if causal:
        first = jnp.zeros((1,), jnp.int32) if query_starts is None else query_starts
        own = first[:, None] + jnp.arange(queries)  # [B, L]
        mask = (places <= own[..., None])[:, None]  # [B, 1, L, K]
    if kv_lengths is not None:
        present = (places < kv_lengths[:, None])[:, None, None]  # [B, 1, 1, K]
        mask = present if mask is None else mask & present
    return mask


def _by_cudnn(
    query: Float[Array, "B L H d"],
    key: Float[Array, "B K H d"],
    value: Float[Array, "B K H d"],
    causal: bool,
    kv_lengths: Int[Array, " B"] | None,
) -> Float[Array, "B L H d"]:
    """cuDNN's fused kernel, with sequences padded to lengths that it takes; causal order and lengths are told to it."""
    rows, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    query, key, value = _padded(query), _padded(key), _padded(value)
    lengths = {}
    if query.shape[1] != queries or key.shape[1] != keys or kv_lengths is not None:
        # A row without keys has no softmax; it sees the first one, and `attend` makes zeros of what comes of it.
        seen = jnp.full((rows,), keys, jnp.int32) if kv_lengths is None else jnp.maximum(kv_lengths, 1)
        lengths = {
            "query_seq_lengths": jnp.full((rows,), queries, jnp.int32),
            "key_value_seq_lengths": seen.astype(jnp.int32),
        }
    attended = jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation="cudnn", **lengths)
    return attended[:, :queries]


def _padded(x: Float[Array, "B L H d"]) -> Float[Array, "B _ H d"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % CUDNN_LENGTH_MULTIPLE), (0, 0), (0, 0)))


def _heads_in_front(
    query: Float[Array, "B L H d"],
    key: Float[Array, "B K H d"],
    value: Float[Array, "B K H d"],
    mask: Bool[Array, "#B 1 #L K"] | None,
    soft_cap: float | None,
) -> Float[Array, "B L H d"]:
    """The same with heads moved in front once, and divided by the sum of the softmax at the end, where it is less work.
    XLA for CPUs would give the operands of both products layouts of their own (`experiments/speed`)."""
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    scores = jnp.einsum("bhld,bhkd->bhlk", query * query.shape[-1] ** -0.5, key, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    seen = jnp.einsum("bhlk,bhkd->bhld", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (seen / weights.sum(axis=-1, keepdims=True)).astype(value.dtype).swapaxes(1, 2)


def to_cache_layout(x: Float[Array, "B K H d"], kernels: Kernels) -> Float[Array, "B _ _ _"]:
    """Keys or values that many attentions will read, in the layout that they read: XLA's products would else transpose
    them (to `[B, H, d, K]`) before each."""
    return x if uses_cudnn(kernels, x.dtype, x.shape[3]) else x.transpose(0, 2, 3, 1)


def from_cache_layout(x: Float[Array, "B _ _ _"], kernels: Kernels, head_width: int) -> Float[Array, "B K H d"]:
    """What `to_cache_layout` was given."""
    return x if uses_cudnn(kernels, x.dtype, head_width) else x.transpose(0, 3, 1, 2)
