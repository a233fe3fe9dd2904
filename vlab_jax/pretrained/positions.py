"""Learned positions of patches and of frames, made to fit another resolution and another number of frames."""

import math

import jax
import numpy as np
from jaxtyping import Float

from vlab_jax.models.layers import interpolate_positions


def fit_positions(positions: Float[np.ndarray, "P D"], count: int) -> Float[np.ndarray, "Q D"]:
    """Positions for `count` tokens, the class token's first and unchanged.

    Those of the patches are resized as an image, bicubic and antialiased (OpenCLIP, `model.py:resize_pos_embed`).
    """
    if len(positions) == count:
        return positions
    old, new = math.isqrt(len(positions) - 1), math.isqrt(count - 1)
    grid = positions[1:].reshape(old, old, -1)
    resized = jax.image.resize(
        grid, (new, new, grid.shape[-1]), "cubic", antialias=True, precision=jax.lax.Precision.HIGHEST
    )
    return np.concatenate([positions[:1], np.asarray(resized).reshape(new * new, -1)])


def fit_frames(positions: Float[np.ndarray, "*blocks P D"], count: int) -> Float[np.ndarray, "*blocks Q D"]:
    """Positions for `count` frames: for as many, the model makes the same of them itself."""
    blocks = positions.reshape(-1, *positions.shape[-2:])
    fitted = jax.vmap(lambda block: interpolate_positions(block, count))(blocks)
    return np.asarray(fitted).reshape(*positions.shape[:-2], count, -1)
