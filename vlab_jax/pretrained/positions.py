"""Learned positions of patches, made to fit another resolution."""

import math

import jax
import numpy as np
from jaxtyping import Float


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
