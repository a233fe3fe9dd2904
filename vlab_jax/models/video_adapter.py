"""The video adapter: temporal modelling inside CLIP's vision transformer (reconstruction).

The abstract of VLAB names an adapter; its internals are not known to us. This one follows ST-Adapter (Pan et al., arXiv
2206.13559): down-projection, mixing over the frames at the same patch, activation, up-projection, residual. The
up-projection starts at zero, so that at initialisation the adapted encoder is CLIP, to the bit.

To add a mixer, write its function and add it to `MIXERS`.

Dimensions: `B` clips, `T` frames, `N` patches, `M = N + 1` tokens (class token first), `D` width, `A` adapter width.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import normal
from jaxtyping import Array, Float

from vlab_jax.models.attention import Kernels, attend
from vlab_jax.models.layers import ACTIVATIONS, interpolate_positions
from vlab_jax.runtime.sharding import gathered_dot_general


class VideoAdapter(nn.Module):
    """One adapter.

    Attributes:
      width: `A`.
      frames: the number of frames that the `attention` mixer has positions for; for another `T` it interpolates them.
      mixer: a name in `MIXERS`.
      kernel: the convolution's size in frames, patch rows and patch columns; odd numbers.
      heads: of the attention.
      activation: between mixing and up-projection: a name in `layers.ACTIVATIONS`, or `none`.
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
        mixer, outer = MIXERS[self.mixer], x.shape[-1]
        dense = {"dtype": self.dtype, "dot_general": gathered_dot_general()}
        down = nn.Dense(self.width, kernel_init=normal(outer**-0.5), **dense, name="down")
        up = nn.Dense(outer, kernel_init=nn.initializers.zeros, **dense, name="up")
        skipped = int(not mixer.mixes_class_token)
        mixed = mixer.mix(self, down(x[:, :, skipped:]))  # [B, T, _, A]
        if self.activation != "none":
            mixed = ACTIVATIONS[self.activation](mixed)
        mixed = x[:, :, skipped:] + up(mixed)
        return jnp.concatenate([x[:, :, :skipped], mixed], axis=2) if skipped else mixed


def convolve(adapter: VideoAdapter, x: Float[Array, "B T N A"]) -> Float[Array, "B T N A"]:
    """A depthwise convolution over frames, patch rows and patch columns, as a sum of shifted copies: a small one is as
    fast as a fused kernel."""
    clips, frames, count, width = x.shape
    side = round(count**0.5)
    # Weights of one deviation for all places make each channel a different temporal filter from the start.
    weights = normal(math.prod(adapter.kernel) ** -0.5)
    kernel = adapter.param("conv_kernel", weights, (*adapter.kernel, width)).astype(x.dtype)
    total = adapter.param("conv_bias", nn.initializers.zeros, (width,)).astype(x.dtype)
    reach = [size // 2 for size in adapter.kernel]
    padded = jnp.pad(x.reshape(clips, frames, side, side, width), [(0, 0), *((r, r) for r in reach), (0, 0)])
    for t, h, w in itertools.product(*(range(size) for size in adapter.kernel)):
        total = total + padded[:, t : t + frames, h : h + side, w : w + side] * kernel[t, h, w]
    return total.reshape(clips, frames, count, width)


def attend_over_frames(adapter: VideoAdapter, x: Float[Array, "B T M A"]) -> Float[Array, "B T M A"]:
    """Self-attention over the frames at each token position."""
    clips, frames, count, width = x.shape
    # As large as the tokens that they are added to, so that heads attend to different times from the start.
    positions = adapter.param("frame_position", normal(0.5), (adapter.frames, width))
    y = x + interpolate_positions(positions, frames)[:, None].astype(x.dtype)
    y = y.transpose(0, 2, 1, 3).reshape(clips * count, frames, width)
    heads = (3, adapter.heads, width // adapter.heads)
    project = nn.DenseGeneral(heads, kernel_init=normal(width**-0.5), dtype=adapter.dtype, name="qkv")
    query, key, value = jnp.moveaxis(project(y), 2, 0)
    y = attend(query, key, value, kernels=adapter.kernels).reshape(clips, count, frames, width)
    return y.transpose(0, 2, 1, 3)


class Mixer(NamedTuple):
    """A way of mixing over time.

    Attributes:
      mix: from the adapter (whose fields it reads and whose parameters it declares) and `[B, T, M, A]` to the mixed
        `[B, T, M, A]`.
      flops: from the adapter's fields, the number of tokens in all frames, and `T`, to the FLOPs of products with
        parameters and of products of activations.
      mixes_class_token: whether the class token is mixed too; otherwise it bypasses the adapter.
      attends: whether `attention.attend` is called over the frames, with the adapter's heads.
    """

    mix: Callable[[VideoAdapter, jax.Array], jax.Array]
    flops: Callable[[Mapping[str, Any], int, int], tuple[float, float]]
    mixes_class_token: bool = False
    attends: bool = False


def _convolution_flops(adapter: Mapping[str, Any], tokens: int, frames: int) -> tuple[float, float]:
    return 2.0 * tokens * adapter["width"] * math.prod(adapter["kernel"]), 0.0


def _attention_flops(adapter: Mapping[str, Any], tokens: int, frames: int) -> tuple[float, float]:
    return 6.0 * tokens * adapter["width"] ** 2, 4.0 * tokens * frames * adapter["width"]


MIXERS: dict[str, Mixer] = {
    "conv": Mixer(convolve, _convolution_flops),
    "attention": Mixer(attend_over_frames, _attention_flops, mixes_class_token=True, attends=True),
}
