"""The multimodal decoder: text attends to the adapted video features and to plain CLIP image features.

VLAB's paper says that the decoder blends both streams and is trained end to end; where the cross-attentions stand and
how the streams are combined is a reconstruction, after VALOR (Chen et al., arXiv 2304.08345). The same weights
decode causally (captioning, answering) and in both directions (masked language modelling).

Dimensions: `B` clips, `R` texts a clip, `N = B · R`, `T` frames, `M` tokens a frame, `D` the towers' width, `W` decoder
width, `K` visual tokens of a stream (`T·M`), `L` text tokens, `V` vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vlab_jax.models.attention import Kernels, attend, from_cache_layout, to_cache_layout
from vlab_jax.models.layers import (
    HeadProjection,
    Insertion,
    KeyValueCache,
    LayerNorm,
    apply_function,
    interpolate_positions,
    normal,
    output_projection,
    stacked_init,
    transformer_of,
)
from vlab_jax.models.partition import whole_product
from vlab_jax.models.towers import text_embedding
from vlab_jax.models.vocabulary import logits_of

# The streams that each blending looks at, in the order of attention.
BLENDINGS: dict[str, tuple[str, ...]] = {
    "concat": ("image", "video"),
    "parallel": ("image", "video"),
    "stacked": ("image", "video"),
    "none": ("video",),
    "image_only": ("image",),
}


class KeysAndValues(NamedTuple):
    """What a cross-attention sees, projected already: `[B, K, H, d]` each, in `attention.to_cache_layout`."""

    key: jax.Array
    value: jax.Array


class Attend(nn.Module):
    """Multi-head attention of text queries to one sequence of visual tokens, or to their keys and values."""

    heads: int
    depth: int
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L W"], visual: Float[Array, "B K W"] | KeysAndValues
    ) -> Float[Array, "B L W"]:
        width = x.shape[-1]
        sizes = {"heads": self.heads, "head_width": width // self.heads, "stddev": width**-0.5}
        (query,) = HeadProjection(1, biased=(0,), dtype=self.dtype, name="query", **sizes)(x)
        if isinstance(visual, KeysAndValues):
            key, value = (from_cache_layout(each, self.kernels, width // self.heads) for each in visual)
        else:
            project = HeadProjection(2, biased=(0, 1), dtype=self.dtype, name="key_value", **sizes)
            key, value = project(visual)
        y = attend(query, key, value, **self.kernels._asdict())
        return output_projection(width, self.depth, self.dtype)(y)


class CrossAttention(nn.Module):
    """The cross-attention of one block, over what `attended` laid out for its blending."""

    blending: str
    heads: int
    depth: int
    epsilon: float
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x: Float[Array, "B L W"], seen: Mapping[str, Any]) -> Float[Array, "B L W"]:
        if self.blending == "stacked":
            for name in sorted(seen):
                x = x + self._attend(name)(self._norm(name.replace("attend", "ln"))(x), seen[name])
            return x
        query = self._norm("ln")(x)
        return x + sum(self._attend(name)(query, seen[name]) for name in sorted(seen))

    def _norm(self, name):
        return LayerNorm(self.epsilon, self.dtype, name=name)

    def _attend(self, name):
        return Attend(self.heads, self.depth, self.dtype, self.kernels, name=name)


def attended(blending: str, visual: Mapping[str, Float[Array, "B _ W"]]) -> dict[str, Float[Array, "B _ W"]]:
    """The sequences that a block's attentions see, by the attentions' names.

    `concat`: one attention over both streams' tokens. `parallel`: one attention a stream, of the same query,
    summed. `stacked`: the image stream first, then the video stream. A stream that is absent is passed over.
    """
    present = [stream for stream in BLENDINGS[blending] if stream in visual]
    if blending in ("parallel", "stacked"):
        return {f"attend_{stream}": visual[stream] for stream in present}
    return {"attend": jnp.concatenate([visual[stream] for stream in present], axis=1)}


class MultimodalDecoder(nn.Module):
    """A text transformer shaped like CLIP's text tower, with a cross-attention in every n-th block.

    Attributes:
      frames: the number of frames that positions are learned for; any other number interpolates them.
      cross_attention_every: 1 gives each block a cross-attention, n each n-th one.
      frame_positions: whether tokens say which frame they are of; without, a stream is a set of frames, and only what
        an adapter wrote into them tells their order.
    """

    vocab_size: int
    context_length: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    frames: int
    blending: str = "concat"
    cross_attention_every: int = 1
    frame_positions: bool = True
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    token_deviation: float = 0.02
    remat: str = "none"
    unroll: int = 1
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "N L"],
        streams: Mapping[str, Float[Array, "B _ _ _"]],
        causal: bool,
        lengths: Int[Array, " N"] | None = None,
        masked: Bool[Array, "N L"] | None = None,
        states: bool = False,
    ) -> Float[Array, "N L _"]:
        """Next-token logits (`causal`) or logits of the token itself (not `causal`), `[N, L, V]` in float32.

        Args:
          tokens: of `N = B · R` texts, those of one clip beside each other.
          streams: `video` and `image` tokens of the towers, `[B, T, M, D]`; what a block needs of them is computed
            once a clip, whatever the number of its texts.
          causal: whether a position sees only those before it.
          lengths: how many tokens each text has; those past it are not looked at. None: all of them.
          masked: the positions whose token is hidden behind the mask embedding.
          states: return what logits are made of instead, `[N, L, W]`: see `vocabulary.py`.
        """
        if masked is None:
            masked = jnp.zeros(tokens.shape, bool)
        x = text_embedding(self, tokens, masked)  # [N, L, W]
        insertions = (self.cross_attention(self.seen(streams)),)
        x, _ = transformer_of(self)(x, causal, lengths, insertions)
        x = LayerNorm(self.epsilon, self.dtype, name="ln_final")(x)
        return x if states else logits_of(x, self.get_variable("params", "token_embedding"))

    def project_stream(self, stream: str, tokens: Float[Array, "B T M D"]) -> Float[Array, "B K W"]:
        """A stream's tokens as the cross-attention takes them: norm, projection, frame position, stream type."""
        clips, frames, count, width = tokens.shape
        y = LayerNorm(self.epsilon, self.dtype, name=f"{stream}_norm")(tokens)
        dense = {"kernel_init": normal(width**-0.5), "dot_general": whole_product(), "dtype": self.dtype}
        y = nn.Dense(self.width, **dense, name=f"{stream}_projection")(y)
        kind = self.param(f"{stream}_type", normal(0.02), (self.width,))
        if self.frame_positions:
            # Of the size of what they are added to: much smaller, and the decoder is slow to see which frame is which.
            positions = self.param(f"{stream}_frame_position", normal(0.5), (self.frames, self.width))
            kind = interpolate_positions(positions, frames)[:, None] + kind
        y = y + kind.astype(self.dtype)
        return y.reshape(clips, frames * count, self.width)

    def seen(self, streams: Mapping[str, Float[Array, "B _ _ _"]]) -> dict[str, Float[Array, "B _ W"]]:
        """What the cross-attentions see of the towers' tokens `[B, T, M, D]`."""
        used = [stream for stream in BLENDINGS[self.blending] if stream in streams]
        return attended(self.blending, {stream: self.project_stream(stream, streams[stream]) for stream in used})

    def cross_attention(self, seen: dict[str, Any]) -> Insertion:
        """The cross-attentions of all blocks that have one."""
        every = self.cross_attention_every
        blocks = tuple(range(every - 1, self.depth, every))
        module = self.cross_attention_module()
        one = jnp.zeros((1, 1, self.width), self.dtype)
        example = attended(self.blending, dict.fromkeys(BLENDINGS[self.blending], one))  # every stream, present or not
        parameters = self.param("cross_attention", stacked_init(module, len(blocks), one, example))
        return Insertion("mlp", texts_beside(apply_function(module)), parameters, blocks, seen)

    def cross_attention_module(self) -> CrossAttention:
        """One block's, without parameters."""
        fields = (self.blending, self.heads, self.depth, self.epsilon, self.dtype, self.kernels)
        return CrossAttention(*fields, parent=None)


def texts_beside(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A cross-attention of `[B, R·L, W]` for `[N, L, W]`: the texts of a clip are queries of one attention."""

    def inserted(parameters: Any, x: jax.Array, seen: Any) -> jax.Array:
        clips = jax.tree.leaves(seen)[0].shape[0]
        return function(parameters, x.reshape(clips, -1, x.shape[-1]), seen).reshape(x.shape)

    return inserted


# FOLDED vlab_jax/models/decoder.py: The multimodal decoder token by token: what does not change is computed
# once and kept.  Kept for each clip: the keys and values of its visual tokens in every cross-attention (`Memory`).
# Kept for each text: the keys and values of its tokens so far (`KeyValueCache`). Several texts of one clip (beams,
# candidate answers) share the clip's memory: they are queries of one attention, and nothing is copied.  Dimensions:
# `B` clips, `R` texts a clip, `N = B · R`, `S` places of a text, `L` new tokens, `V` vocabulary.


class Memory(struct.PyTreeNode):
    """What the cross-attentions of all blocks need of `B` clips, stacked over blocks.

    Attributes:
      parameters: of the cross-attentions.
      stored: by the name of the attention, `KeysAndValues` of all blocks, `[depth, B, …]`.
      active: bool `[depth]`, the blocks that have one; None: all.
    """

    parameters: Any
    stored: dict[str, KeysAndValues]
    active: jax.Array | None

    def of(self, rows: Int[Array, " Q"]) -> "Memory":
        """The memory of some of the clips, which may come in any order and more than once."""
        return self.replace(stored=jax.tree.map(lambda leaf: leaf[:, rows], self.stored))


class Remember(MultimodalDecoder):
    """The decoder's parameters, used to compute the `Memory` of clips."""

    @nn.compact
    def __call__(self, streams: Mapping[str, Float[Array, "B _ _ _"]]) -> Memory:
        """The memory of clips, from the towers' `video` and `image` tokens `[B, T, M, D]`."""
        insertion = self.cross_attention(self.seen(streams))
        sizes = {"heads": self.heads, "head_width": self.width // self.heads, "stddev": 1.0}
        project = HeadProjection(2, biased=(0, 1), dtype=self.dtype, parent=None, **sizes)

        def keys_and_values(parameters: Any) -> dict[str, KeysAndValues]:
            projected = {
                name: project.apply({"params": parameters[name]["key_value"]}, tokens)
                for name, tokens in insertion.context.items()
            }
            return {
                name: KeysAndValues(*(to_cache_layout(each, self.kernels) for each in pair))
                for name, pair in projected.items()
            }

        kept = jax.vmap(keys_and_values)(insertion.parameters)
        laid_out = insertion._replace(parameters=(insertion.parameters, kept)).laid_out(self.depth)
        return Memory(*laid_out.parameters, laid_out.active)


class NextTokens(MultimodalDecoder):
    """The decoder's parameters, used on the tokens that follow those in a cache."""

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "N L"], memory: Memory, cache: KeyValueCache, states: bool = False
    ) -> tuple[Float[Array, "N L _"], KeyValueCache]:
        """Logits of the token after each, in float32, and the cache with `tokens` in it, its lengths as they were.

        Args:
          tokens: of `N = B · R` texts, those of one clip beside each other; written behind each row's own.
          memory: of the `B` clips.
          cache: of the `N` texts.
          states: return what logits are made of instead, `[N, L, W]`: see `vocabulary.py`.
        """
        places = cache.lengths[:, None] + jnp.arange(tokens.shape[1])  # [N, L]
        table = self.param("token_embedding", nn.initializers.zeros, (self.vocab_size, self.width))
        positions = self.param("position_embedding", nn.initializers.zeros, (self.context_length, self.width))
        x = table[tokens].astype(self.dtype)  # as in `text_embedding`
        x = (x + positions[jnp.minimum(places, self.context_length - 1)]).astype(self.dtype)
        every = tuple(range(self.depth))
        attend = Insertion("mlp", self._attend, (memory.parameters, memory.stored), every, active=memory.active)
        x, cache = transformer_of(self)(x, insertions=(attend,), cache=cache)
        x = LayerNorm(self.epsilon, self.dtype, name="ln_final")(x)
        return x if states else logits_of(x, table), cache

    def _attend(self, block: tuple[Any, dict[str, KeysAndValues]], x: jax.Array, _: Any) -> jax.Array:
        """One block's cross-attention, to the keys and values that are stored."""
        return texts_beside(apply_function(self.cross_attention_module()))(block[0], x, block[1])


def empty_cache(decoder: MultimodalDecoder, texts: int, room: int) -> KeyValueCache:
    """A cache of `texts` rows without tokens, with `room` places each."""
    shape = (decoder.depth, texts, room, decoder.heads, decoder.width // decoder.heads)
    return KeyValueCache(
        jnp.zeros(shape, decoder.dtype), jnp.zeros(shape, decoder.dtype), jnp.zeros((texts,), jnp.int32)
    )


def take_rows(cache: KeyValueCache, rows: Int[Array, " N"]) -> KeyValueCache:
    """The cache of the given rows, in their order; a row can be taken several times."""
    return KeyValueCache(cache.key[:, rows], cache.value[:, rows], cache.lengths[rows])
