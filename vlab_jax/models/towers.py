"""CLIP's vision and text towers (Radford et al., arXiv 2103.00020), and EVA-CLIP's vision tower (arXiv 2303.15389).

Dimensions: `F` images or frames of `S × S` pixels, `N` patches, `M = N + 1` tokens (class token first), `B` texts,
`L` text tokens, `D` width, `E` joint embedding width. Images are float32, normalised by CLIP's mean and deviation.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import normal
from jaxtyping import Array, Float, Int

from vlab_jax.models.attention import patch_rotation
from vlab_jax.models.layers import Insertion, Transformer, TransformerModule

# Per-channel mean and standard deviation of RGB in [0, 1] (CLIP's preprocessing).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def normalise_pixels(images: Any) -> Float[Array, "*F S S 3"]:
    """Converts uint8 RGB to the float32 input of CLIP's vision tower."""
    mean, deviation = jnp.array(PIXEL_MEAN), jnp.array(PIXEL_DEVIATION)
    return (images.astype(jnp.float32) / 255.0 - mean) / deviation


def patches(images: Float[Array, "F S S 3"], size: int) -> Float[Array, "F N P"]:
    """Cuts images into rows of `size × size` patches, each flattened as (row, column, channel)."""
    frames, height, width, channels = images.shape
    grid = images.reshape(frames, height // size, size, width // size, size, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(frames, -1, size * size * channels)


class VisionTower(TransformerModule):
    """CLIP's vision transformer.

    EVA01-CLIP differs by `pre_norm=False`, `patch_bias=True`, `key_bias=False`, `epsilon=1e-6` and
    `projection_bias=True`. EVA02-CLIP adds `gated_mlp=True` and `activation="silu"` (SwiGLU), `inner_norms=True`, and
    rotary positions beside the learned ones: `rotary_grid` is the number of patches along a side that they are scaled
    to (0: no rotary positions).
    """

    image_size: int
    patch_size: int
    embed_width: int
    pre_norm: bool = True
    patch_bias: bool = False
    key_bias: bool = True
    projection_bias: bool = False
    gated_mlp: bool = False
    inner_norms: bool = False
    rotary_grid: int = 0

    def setup(self):
        initial, pixels = normal(self.width**-0.5), 3 * self.patch_size**2
        self.patch_embedding = self.config.dense(self.width, "patch_embedding", normal(pixels**-0.5), self.patch_bias)
        self.class_embedding = self.param("class_embedding", initial, (self.width,))
        tokens = (self.image_size // self.patch_size) ** 2 + 1
        self.position_embedding = self.param("position_embedding", initial, (tokens, self.width))
        if self.pre_norm:
            self.ln_pre = self.config.norm("ln_pre")
        self.transformer = Transformer(self.config, name="transformer")
        self.ln_post = self.config.norm("ln_post")
        self.projection = self.config.dense(self.embed_width, "projection", initial, self.projection_bias)

    def __call__(
        self, images: Float[Array, "F S S 3"], insertions: tuple[Insertion, ...] = ()
    ) -> tuple[Float[Array, "F M D"], Float[Array, "F E"]]:
        """The last block's tokens, and the projected class token."""
        return self.run_from(self.run_until(images), insertions)

    def run_until(self, images: Float[Array, "F S S 3"], block: int = 0) -> Float[Array, "F M D"]:
        """Embeds images and runs the blocks before `block`: its input tokens."""
        x = self.patch_embedding(patches(images, self.patch_size))  # [F, N, D]
        class_token = jnp.broadcast_to(self.class_embedding.astype(self.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([class_token, x], axis=1) + self.position_embedding.astype(self.dtype)  # [F, N+1, D]
        if self.pre_norm:
            x = self.ln_pre(x)
        return self._run(x, slice(block)) if block else x

    def run_from(
        self, x: Float[Array, "F M D"], insertions: tuple[Insertion, ...] = (), block: int = 0
    ) -> tuple[Float[Array, "F M D"], Float[Array, "F E"]]:
        """Runs the blocks from `block` on, from its input tokens: the outputs of `__call__`."""
        tokens = self._run(x, slice(block, None), insertions)
        return tokens, self.projection(self.ln_post(tokens[:, 0])).astype(jnp.float32)

    def _run(self, x: jax.Array, blocks: slice, insertions: tuple[Insertion, ...] = ()) -> jax.Array:
        rotation = None
        if self.rotary_grid:
            side, head_width = self.image_size // self.patch_size, self.width // self.heads
            rotation = patch_rotation(side, head_width, self.rotary_grid)
        return self.transformer(x, rotation=rotation, insertions=insertions, blocks=blocks)[0]


class TextTower(TransformerModule):
    """CLIP's text transformer: a causal mask and no other, pooled at the end-of-text token.

    `token_deviation` is the standard deviation of the token embeddings at initialisation. CLIP's 0.02 suits its width;
    in a narrow tower the embeddings of all captions are then nearly equal, and a larger one separates them sooner.
    """

    vocab_size: int
    context_length: int
    embed_width: int
    token_deviation: float = 0.02

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B E"]]:
        """The tokens after `ln_final`, and the projected end-of-text token.

        Args:
          lengths: the tokens of each text, start and end of text included: the end of text is at `lengths - 1`.
        """
        table = self.param("token_embedding", normal(self.token_deviation), (self.vocab_size, self.width))
        positions = self.param("position_embedding", normal(0.01), (self.context_length, self.width))
        x = (table[tokens].astype(self.dtype) + positions[: tokens.shape[1]]).astype(self.dtype)  # [B, L, D]
        x, _ = Transformer(self.config, name="transformer")(x, causal=True)
        x = self.config.norm("ln_final")(x)
        pooled = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [B, D]
        projection = self.config.dense(self.embed_width, "projection", normal(self.width**-0.5), use_bias=False)
        return x, projection(pooled).astype(jnp.float32)
