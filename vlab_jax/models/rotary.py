"""Rotary positions of patches in two dimensions (EVA-02, Fang et al., arXiv 2303.11331).

Dimensions: `G` patches along a side, `M = G² + 1` tokens with the class token first, `H` heads, `d` head width.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

TEMPERATURE = 10_000.0


class Rotation(NamedTuple):
    """Cosine and sine of every token's angles, `[M, d]`; the class token's are those of no rotation."""

    cosine: Float[np.ndarray, "M d"]
    sine: Float[np.ndarray, "M d"]


def patch_rotation(side: int, head_width: int, reference_side: int) -> Rotation:
    """The rotation of `side × side` patches.

    Half of a head's channels turn with the row and half with the column, two neighbouring channels by one angle.
    Rows and columns are scaled to the grid of `reference_side` patches that the model was trained with first.
    """
    bands = TEMPERATURE ** -(np.arange(head_width // 4) / (head_width // 4))
    places = np.arange(side) / side * reference_side
    rows, columns = np.meshgrid(places, places, indexing="ij")
    angles = np.stack([rows, columns], axis=-1).reshape(-1, 2, 1) * bands  # [G², 2, d/4]
    angles = np.repeat(angles.reshape(len(angles), -1), 2, axis=-1)  # [G², d]
    angles = np.concatenate([np.zeros((1, head_width)), angles])  # [M, d]
    return Rotation(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))


def rotate(x: Float[Array, "B M H d"], rotation: Rotation) -> Float[Array, "B M H d"]:
    """Turns each pair of neighbouring channels by its token's angle; computed in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    cosine, sine = (jnp.asarray(part)[None, :, None, :] for part in rotation)
    return (x * cosine + turned * sine).astype(x.dtype)
