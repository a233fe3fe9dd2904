"""The video adapter: what models time inside CLIP's vision transformer.

VLAB's paper names an adapter and does not print its internals. This is a reconstruction from ST-Adapter (Pan et
al., arXiv 2206.13559): down-projection, temporal mixing over the frames at the same patch, activation,
up-projection, residual. The up-projection starts at zero, so at initialisation the adapted encoder is CLIP, to the
bit.

Dimensions: `B` clips, `T` frames, `N` patches (`M = N + 1` tokens), `D` width, `A` adapter width.
"""

import itertools
import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlab_jax.models.attention import Kernels, attend
from vlab_jax.models.layers import ACTIVATIONS, interpolate_positions, normal
from vlab_jax.models.partition import whole_product

MIXERS = ("conv", "attention")


class VideoAdapter(nn.Module):
    """One adapter, a pure function of its parameters and the tokens of `B·T` frames.

    Attributes:
      width: `A`, the width of the bottleneck.
      frames: `T` that the `attention` mixer's positions are learned for; any other `T` interpolates them.
      mixer: `conv`, a depthwise convolution over time and space, of patch tokens only (the class token passes by),
        or `attention`, self-attention over the frames of the same token.
      kernel: the convolution's extent in frames, patch rows and patch columns; odd numbers.
      heads: the attention's heads.
      activation: between mixing and up-projection (`gelu`, `quick_gelu` or `none`).
    """

    width: int
    frames: int
    mixer: str = "conv"
    kernel: tuple[int, int, int] = (3, 1, 1)
    heads: int = 4
    activation: str = "gelu"
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x: Float[Array, "B T M D"]) -> Float[Array, "B T M D"]:
        outer = x.shape[-1]
        dense = {"dtype": self.dtype, "dot_general": whole_product()}
        down = nn.Dense(self.width, kernel_init=normal(outer**-0.5), **dense, name="down")
        up = nn.Dense(outer, kernel_init=nn.initializers.zeros, **dense, name="up")
        if self.mixer == "conv":
            mixed = self._convolve(down(x[:, :, 1:]))  # [B, T, N, A]
            change = up(self._activate(mixed))
            return jnp.concatenate([x[:, :, :1], x[:, :, 1:] + change], axis=2)
        return x + up(self._activate(self._attend(down(x))))

    def _activate(self, x):
        return x if self.activation == "none" else ACTIVATIONS[self.activation](x)

    def _convolve(self, x):
        """Depthwise convolution as a sum of shifted copies: as fast as a fused kernel where the kernel is small."""
        clips, frames, count, width = x.shape
        side = round(count**0.5)
        # Taps of equal size make each channel another filter over time from the start.
        taps = normal(math.prod(self.kernel) ** -0.5)
        kernel = self.param("conv_kernel", taps, (*self.kernel, width)).astype(x.dtype)
        bias = self.param("conv_bias", nn.initializers.zeros, (width,)).astype(x.dtype)
        grid = x.reshape(clips, frames, side, side, width)
        reach = [size // 2 for size in self.kernel]
        padded = jnp.pad(grid, [(0, 0), *((r, r) for r in reach), (0, 0)])
        total = bias
        for t, h, w in itertools.product(*(range(size) for size in self.kernel)):
            shifted = padded[:, t : t + frames, h : h + side, w : w + side]
            total = total + shifted * kernel[t, h, w]
        return total.reshape(clips, frames, count, width)

    def _attend(self, x):
        """Self-attention over time, each token position by itself."""
        clips, frames, count, width = x.shape
        # Of the size of what they are added to, so that heads look at different times from the start.
        positions = self.param("frame_position", normal(0.5), (self.frames, width))
        y = x + interpolate_positions(positions, frames)[:, None].astype(x.dtype)
        y = y.transpose(0, 2, 1, 3).reshape(clips * count, frames, width)
        project = nn.DenseGeneral(
            (3, self.heads, width // self.heads),
            kernel_init=normal(width**-0.5),
            dtype=self.dtype,
            name="qkv",
        )
        query, key, value = jnp.moveaxis(project(y), 2, 0)
        y = attend(query, key, value, **self.kernels._asdict()).reshape(clips, count, frames, width)
        return y.transpose(0, 2, 1, 3)
