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
    implementation = attention_implementation(jax.default_backend(), query.dtype, query.shape[-1])
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)


def stored(x: Float[Array, "B K H d"]) -> Float[Array, "B _ _ _"]:
    """Keys or values that many attentions will see, as `recalled` takes them: in the layout that products read, where
    XLA makes the attention (`[B, H, d, K]`); it would else transpose them before each."""
    return x.transpose(0, 2, 3, 1) if _read_by_products(x.dtype, x.shape[3]) else x


def recalled(x: Float[Array, "B _ _ _"], head_width: int) -> Float[Array, "B K H d"]:
    """What `stored` was given."""
    return x.transpose(0, 3, 1, 2) if _read_by_products(x.dtype, head_width) else x


def _read_by_products(dtype: Any, head_width: int) -> bool:
    return attention_implementation(jax.default_backend(), dtype, head_width) == "xla"
