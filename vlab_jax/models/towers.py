"""CLIP's vision and text towers (Radford et al., arXiv 2103.00020), and EVA-CLIP's vision tower (arXiv 2303.15389).

Dimensions: `F` images or frames, `N` patches (`N+1` tokens with the class token), `B` texts, `L` text tokens, `D`
width, `E` joint embedding width. Images are float32, `[F, S, S, 3]`, normalised by CLIP's mean and deviation.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlab_jax.models.attention import Kernels
from vlab_jax.models.layers import Insertion, LayerNorm, Transformer, TransformerConfig, normal
from vlab_jax.models.partition import whole_product
from vlab_jax.models.rotary import Rotation, patch_rotation

# Per-channel mean and standard deviation of RGB in [0, 1] (CLIP's preprocessing).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def normalise_pixels(images: Any) -> Float[Array, "*F S S 3"]:
    """uint8 RGB to the float32 that CLIP's vision tower takes."""
    mean, deviation = jnp.array(PIXEL_MEAN), jnp.array(PIXEL_DEVIATION)
    return (images.astype(jnp.float32) / 255.0 - mean) / deviation


def patches(images: Float[Array, "F S S 3"], size: int) -> Float[Array, "F N P"]:
    """Cuts images into rows of `size × size` patches, each flattened as (row, column, channel)."""
    frames, height, width, channels = images.shape
    grid = images.reshape(frames, height // size, size, width // size, size, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(frames, -1, size * size * channels)


class VisionTower(nn.Module):
    """CLIP's vision transformer.

    EVA01-CLIP is the same with `pre_norm=False`, `patch_bias=True`, `key_bias=False`, `epsilon=1e-6` and
    `projection_bias=True`. EVA02-CLIP is this with `gated_mlp=True` and `activation="silu"` (SwiGLU),
    `inner_norms=True`, and rotary positions besides the learned ones: `rotary_grid` is the number of patches
    along a side that they are scaled to (0: none).
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    embed_width: int
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    pre_norm: bool = True
    patch_bias: bool = False
    key_bias: bool = True
    projection_bias: bool = False
    gated_mlp: bool = False
    inner_norms: bool = False
    rotary_grid: int = 0
    remat: str = "none"
    unroll: int = 1
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    def setup(self):
        scale, pixels = self.width**-0.5, 3 * self.patch_size**2
        dense = {"dtype": self.dtype, "dot_general": whole_product()}
        self.patch_embedding = nn.Dense(
            self.width, use_bias=self.patch_bias, kernel_init=normal(pixels**-0.5), **dense, name="patch_embedding"
        )
        self.class_embedding = self.param("class_embedding", normal(scale), (self.width,))
        tokens = (self.image_size // self.patch_size) ** 2 + 1
        self.position_embedding = self.param("position_embedding", normal(scale), (tokens, self.width))
        if self.pre_norm:
            self.ln_pre = LayerNorm(self.epsilon, self.dtype, name="ln_pre")
        self.transformer = Transformer(TransformerConfig.of(self), name="transformer")
        self.ln_post = LayerNorm(self.epsilon, self.dtype, name="ln_post")
        self.projection = nn.Dense(
            self.embed_width, use_bias=self.projection_bias, kernel_init=normal(scale), **dense, name="projection"
        )

    def __call__(
        self, images: Float[Array, "F S S 3"], insertions: tuple[Insertion, ...] = ()
    ) -> tuple[Float[Array, "F M D"], Float[Array, "F E"]]:
        """Returns the last block's tokens, class token first (`M = N + 1`), and the projected pooled token."""
        return self.end(self.begin(images), insertions)

    def begin(self, images: Float[Array, "F S S 3"], blocks: int = 0) -> Float[Array, "F M D"]:
        """The tokens that go into the block of this number: embedded, and through the blocks before it."""
        x = self.patch_embedding(patches(images, self.patch_size))  # [F, N, D]
        class_token = jnp.broadcast_to(self.class_embedding.astype(self.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([class_token, x], axis=1) + self.position_embedding.astype(self.dtype)  # [F, N+1, D]
        if self.pre_norm:
            x = self.ln_pre(x)
        return self._run(x, slice(blocks)) if blocks else x

    def end(
        self, x: Float[Array, "F M D"], insertions: tuple[Insertion, ...] = (), blocks: int = 0
    ) -> tuple[Float[Array, "F M D"], Float[Array, "F E"]]:
        """What the tower returns, from what `begin` returned for the same number of blocks."""
        tokens = self._run(x, slice(blocks, None), insertions)
        return tokens, self.projection(self.ln_post(tokens[:, 0])).astype(jnp.float32)

    def _run(self, x: jax.Array, blocks: slice, insertions: tuple[Insertion, ...] = ()) -> jax.Array:
        return self.transformer(x, rotation=self._rotation(), insertions=insertions, blocks=blocks)[0]

    def _rotation(self) -> Rotation | None:
        if not self.rotary_grid:
            return None
        return patch_rotation(self.image_size // self.patch_size, self.width // self.heads, self.rotary_grid)


class TextTower(nn.Module):
    """CLIP's text transformer: causal mask alone, pooled at the end-of-text token.

    `token_deviation` is the standard deviation of the token embeddings at initialisation. CLIP's 0.02 suits its
    width; a narrow tower starts with embeddings of all captions nearly alike, and a larger one tells them apart sooner.
    """

    vocab_size: int
    context_length: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    embed_width: int
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    token_deviation: float = 0.02
    remat: str = "none"
    unroll: int = 1
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B E"]]:
        """Returns `ln_final`'s tokens and the projected end-of-text token.

        `lengths` counts each text's tokens, start and end of text included: the end of text stands at `lengths - 1`.
        """
        table = self.param("token_embedding", normal(self.token_deviation), (self.vocab_size, self.width))
        positions = self.param("position_embedding", normal(0.01), (self.context_length, self.width))
        x = (table[tokens].astype(self.dtype) + positions[: tokens.shape[1]]).astype(self.dtype)  # [B, L, D]
        x, _ = Transformer(TransformerConfig.of(self), name="transformer")(x, causal=True)
        x = LayerNorm(self.epsilon, self.dtype, name="ln_final")(x)
        pooled = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [B, D]
        project = nn.Dense(
            self.embed_width,
            use_bias=False,
            kernel_init=normal(self.width**-0.5),
            dot_general=whole_product(),
            dtype=self.dtype,
            name="projection",
        )
        return x, project(pooled).astype(jnp.float32)
