"""Softmax attention by the kernel that fits the device, and the layout in which it likes to find keys and values.

Dimensions: `B` batch, `L` query tokens, `K` key tokens, `H` heads, `d` head width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attention_implementation(platform: str, dtype: Any, head_width: int) -> str:
    """Which kernel of `jax.nn.dot_product_attention` fits: cuDNN's fused one on GPU in half precision, else XLA."""
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    fits = half and head_width % 8 == 0 and head_width <= 128
    return "cudnn" if platform == "gpu" and fits else "xla"


def attend(
    query: Float[Array, "B L H d"],
    key: Float[Array, "B K H d"],
    value: Float[Array, "B K H d"],
    mask: Bool[Array, "#B 1 #L K"] | None = None,
) -> Float[Array, "B L H d"]:
    """Softmax attention; `mask` is true where a query may look."""
    if jax.default_backend() == "cpu" and query.shape[1] > 1:
        return _heads_in_front(query, key, value, mask)
    implementation = attention_implementation(jax.default_backend(), query.dtype, query.shape[-1])
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)


def _heads_in_front(
    query: Float[Array, "B L H d"],
    key: Float[Array, "B K H d"],
    value: Float[Array, "B K H d"],
    mask: Bool[Array, "#B 1 #L K"] | None,
) -> Float[Array, "B L H d"]:
    """The same with heads moved in front once, and divided by the sum of the softmax at the end, where it is less work.
    XLA for CPUs would give the operands of both products layouts of their own (`experiments/speed`)."""
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    scores = jnp.einsum("bhld,bhkd->bhlk", query * query.shape[-1] ** -0.5, key, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    seen = jnp.einsum("bhlk,bhkd->bhld", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (seen / weights.sum(axis=-1, keepdims=True)).astype(value.dtype).swapaxes(1, 2)


def stored(x: Float[Array, "B K H d"]) -> Float[Array, "B _ _ _"]:
    """Keys or values that many attentions will see, as `recalled` takes them: in the layout that products read, where
    XLA makes the attention (`[B, H, d, K]`); it would else transpose them before each."""
    return x.transpose(0, 2, 3, 1) if _read_by_products(x.dtype, x.shape[3]) else x


def recalled(x: Float[Array, "B _ _ _"], head_width: int) -> Float[Array, "B K H d"]:
    """What `stored` was given."""
    return x.transpose(0, 3, 1, 2) if _read_by_products(x.dtype, head_width) else x


def _read_by_products(dtype: Any, head_width: int) -> bool:
    return attention_implementation(jax.default_backend(), dtype, head_width) == "xla"
