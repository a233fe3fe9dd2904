"""How a parameter lies in a PyTorch checkpoint and how it lies here: one pure function for each way.

Dimensions: `D` width, `H` heads, `d` head width (`H·d = D`), `p` patch side. PyTorch's linear layers are
`[out, in]`, Flax's are `[in, out]`; attention's projections carry their heads as axes here.

The functions use nothing but methods that NumPy's arrays and JAX's tracers share, so that shapes can be had from
`jax.eval_shape`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Layout(NamedTuple):
    """`to_theirs(ours)` gives the source tensors of one parameter; `to_ours(theirs, shape)` puts them together."""

    to_theirs: Callable[[Any], list[Any]]
    to_ours: Callable[[Sequence[np.ndarray], tuple[int, ...]], np.ndarray]

    def source_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes of the source tensors of a parameter of the given shape."""
        parts = jax.eval_shape(self.to_theirs, jax.ShapeDtypeStruct(shape, jnp.float32))
        return [tuple(part.shape) for part in parts]


def _flat_rows(kernel: Any) -> Any:
    """`[in, …]` to PyTorch's `[out, in]`."""
    return kernel.reshape(kernel.shape[0], -1).transpose()


def _patch_to_theirs(kernel: Any) -> list[Any]:
    side = math.isqrt(kernel.shape[0] // 3)
    return [kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)]


# The same array.
SAME = Layout(lambda ours: [ours], lambda theirs, shape: theirs[0])
# A linear layer: `[in, out]` here.
LINEAR = Layout(lambda ours: [_flat_rows(ours)], lambda theirs, shape: theirs[0].T)
# A query, key and value projection in one tensor `[3·D, D]`; here `[D, 3, H, d]`. Its bias: `[3·D]`; here `[3, H, d]`.
FUSED_HEADS = Layout(lambda ours: [_flat_rows(ours)], lambda theirs, shape: theirs[0].T.reshape(shape))
FUSED_BIAS = Layout(lambda ours: [ours.reshape(-1)], lambda theirs, shape: theirs[0].reshape(shape))
# The same in one tensor for each of its parts.
SEPARATE_HEADS = Layout(
    lambda ours: [_flat_rows(ours[:, part]) for part in range(ours.shape[1])],
    lambda theirs, shape: np.stack([part.T.reshape(shape[0], *shape[2:]) for part in theirs], axis=1),
)
SEPARATE_BIASES = Layout(
    lambda ours: [ours[part].reshape(-1) for part in range(ours.shape[0])],
    lambda theirs, shape: np.stack([part.reshape(shape[1:]) for part in theirs]),
)
# Attention's output projection `[D, D]`; here `[H, d, D]`.
OUTPUT = Layout(
    lambda ours: [ours.reshape(-1, ours.shape[-1]).transpose()],
    lambda theirs, shape: theirs[0].T.reshape(shape),
)
# The patch convolution `[D, 3, p, p]`; here `[p·p·3, D]`, its rows ordered (row, column, channel).
PATCHES = Layout(
    _patch_to_theirs,
    lambda theirs, shape: theirs[0].transpose(2, 3, 1, 0).reshape(shape),
)
# An array with leading axes of length one: `[1, P, D]` and `[1, 1, D]`.
ONE_AXIS_MORE = Layout(lambda ours: [ours[None]], lambda theirs, shape: theirs[0].reshape(shape))
TWO_AXES_MORE = Layout(lambda ours: [ours[None, None]], lambda theirs, shape: theirs[0].reshape(shape))
