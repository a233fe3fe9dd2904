"""The multimodal decoder: text attends to the adapted video features and to plain CLIP image features.

That the decoder blends both streams is VLAB's; where its cross-attentions stand and how they combine the streams is a
reconstruction, after VALOR (Chen et al., arXiv 2304.08345). The same weights decode causally (captions, answers) and in
both directions (masked language modelling).

Texts are decoded at once (`__call__`), or token by token with caches: `Memory` holds the keys and values of a clip's
visual tokens in every cross-attention, `KeyValueCache` those of a text's tokens so far. All texts of a clip (captions,
beams, candidate answers) are queries of one cross-attention, so that nothing of the clip is copied or computed twice.

Dimensions: `B` clips, `R` texts a clip, `N = B · R`, `T` frames, `M` tokens a frame, `D` the towers' width, `W` decoder
width, `K` visual tokens of a stream (`T·M`), `L` text tokens, `S` places of a cache, `V` vocabulary.
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
    Transformer,
    TransformerConfig,
    apply_function,
    interpolate_positions,
    normal,
    output_projection,
    stacked_init,
)
from vlab_jax.models.partition import whole_product
from vlab_jax.models.vocabulary import logits_of


class Blending(NamedTuple):
    """How cross-attentions look at the streams.

    Attributes:
      streams: those that they look at, in the order of attention.
      joined: one attention over the tokens of all streams; else each stream has its own.
      in_turn: each attention starts from the result of the one before it; else all start from the block's, and their
        results are summed.
    """

    streams: tuple[str, ...]
    joined: bool = False
    in_turn: bool = False

    def sequences(self, visual: Mapping[str, Float[Array, "B _ W"]]) -> dict[str, Float[Array, "B _ W"]]:
        """The tokens that each attention of a block looks at, by the attention's name. Absent streams are left out."""
        present = [stream for stream in self.streams if stream in visual]
        if self.joined:
            return {"attend": jnp.concatenate([visual[stream] for stream in present], axis=1)}
        return {f"attend_{stream}": visual[stream] for stream in present}


BLENDINGS: dict[str, Blending] = {
    "concat": Blending(("image", "video"), joined=True),
    "parallel": Blending(("image", "video")),
    "stacked": Blending(("image", "video"), in_turn=True),
    "none": Blending(("video",), joined=True),
    "image_only": Blending(("image",), joined=True),
}


class KeysAndValues(NamedTuple):
    """Projected keys and values of a cross-attention, `[B, K, H, d]` each, in `attention.to_cache_layout`."""

    key: jax.Array
    value: jax.Array


class Memory(struct.PyTreeNode):
    """What the cross-attentions of all blocks need of `B` clips, stacked over blocks.

    Attributes:
      parameters: of the cross-attentions.
      cached: by the name of the attention, `KeysAndValues` of all blocks, `[depth, B, …]`.
      active: bool `[depth]`, the blocks that have a cross-attention; None: all.
    """

    parameters: Any
    cached: dict[str, KeysAndValues]
    active: jax.Array | None

    def of(self, rows: Int[Array, " Q"]) -> "Memory":
        """The memory of some of the clips, which may come in any order and more than once."""
        return self.replace(cached=jax.tree.map(lambda leaf: leaf[:, rows], self.cached))


class Attend(nn.Module):
    """Multi-head attention of text queries to one sequence of visual tokens, or to their keys and values."""

    heads: int
    width: int
    depth: int
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    def setup(self):
        sizes = {"heads": self.heads, "head_width": self.width // self.heads, "stddev": self.width**-0.5}
        self.query = HeadProjection(1, biased=(0,), dtype=self.dtype, **sizes)
        self.key_value = HeadProjection(2, biased=(0, 1), dtype=self.dtype, **sizes)
        self.output = output_projection(self.width, self.depth, self.dtype)

    def __call__(
        self, x: Float[Array, "B L W"], visual: Float[Array, "B K W"] | KeysAndValues
    ) -> Float[Array, "B L W"]:
        (query,) = self.query(x)
        if isinstance(visual, KeysAndValues):
            head_width = self.width // self.heads
            key, value = (from_cache_layout(each, self.kernels, head_width) for each in visual)
        else:
            key, value = self.key_value(visual)
        return self.output(attend(query, key, value, **self.kernels._asdict()))

    def keys_and_values(self, visual: Float[Array, "B K W"]) -> KeysAndValues:
        """The keys and values of visual tokens, for many later calls."""
        return KeysAndValues(*(to_cache_layout(each, self.kernels) for each in self.key_value(visual)))


class CrossAttention(nn.Module):
    """The cross-attention of one block, over the sequences that its blending makes of the streams."""

    blending: Blending
    heads: int
    width: int
    depth: int
    epsilon: float
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    def setup(self):
        streams = [f"_{stream}" for stream in self.blending.streams] if not self.blending.joined else [""]
        fields = (self.heads, self.width, self.depth, self.dtype, self.kernels)
        self.attends = {f"attend{stream}": Attend(*fields, name=f"attend{stream}") for stream in streams}
        norms = streams if self.blending.in_turn else [""]
        self.norms = {f"ln{stream}": LayerNorm(self.epsilon, self.dtype, name=f"ln{stream}") for stream in norms}

    def __call__(self, x: Float[Array, "B L W"], sequences: Mapping[str, Any]) -> Float[Array, "B L W"]:
        if self.blending.in_turn:
            for name in sorted(sequences):
                x = x + self.attends[name](self.norms[name.replace("attend", "ln")](x), sequences[name])
            return x
        query = self.norms["ln"](x)
        return x + sum(self.attends[name](query, sequences[name]) for name in sorted(sequences))

    def keys_and_values(self, sequences: Mapping[str, Float[Array, "B _ W"]]) -> dict[str, KeysAndValues]:
        """Those of each attention, by its name."""
        return {name: self.attends[name].keys_and_values(tokens) for name, tokens in sequences.items()}


class MultimodalDecoder(nn.Module):
    """A text transformer shaped like CLIP's text tower, with a cross-attention in every n-th block.

    Attributes:
      frames: the number of frames that positions are learned for; any other number interpolates them.
      blending: a name in `BLENDINGS`.
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

    def setup(self):
        width, blending = self.width, BLENDINGS[self.blending]
        self.token_embedding = self.param("token_embedding", normal(self.token_deviation), (self.vocab_size, width))
        self.position_embedding = self.param("position_embedding", normal(0.01), (self.context_length, width))
        self.mask_embedding = self.param("mask_embedding", normal(0.02), (width,))
        norm = {"epsilon": self.epsilon, "dtype": self.dtype}
        dense = {"kernel_init": scaled_by_input, "dtype": self.dtype, "dot_general": whole_product()}
        norms, projections, types, positions = {}, {}, {}, {}
        for stream in blending.streams:
            norms[stream] = LayerNorm(**norm, name=f"{stream}_norm")
            projections[stream] = nn.Dense(width, **dense, name=f"{stream}_projection")
            types[stream] = self.param(f"{stream}_type", normal(0.02), (width,))
            if self.frame_positions:
                # As large as what they are added to: with much smaller ones, the decoder is slow to tell frames apart.
                table = (self.frames, width)
                positions[stream] = self.param(f"{stream}_frame_position", normal(0.5), table)
        self.norms, self.projections, self.types, self.positions = norms, projections, types, positions
        one = jnp.zeros((1, 1, width), self.dtype)
        example = blending.sequences(dict.fromkeys(blending.streams, one))
        initialise = stacked_init(self._cross_attention(), len(self._crossed_blocks()), one, example)
        self.cross_attention = self.param("cross_attention", initialise)
        self.transformer = Transformer(TransformerConfig.of(self), name="transformer")
        self.ln_final = LayerNorm(**norm, name="ln_final")

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
          tokens: of `N = B · R` texts, those of one clip next to each other.
          streams: `video` and `image` tokens of the towers, `[B, T, M, D]`.
          causal: whether a position sees only those before it.
          lengths: how many tokens each text has; positions past it are masked out. None: all are seen.
          masked: the positions whose token is replaced by the mask embedding.
          states: return the states that logits are made of, `[N, L, W]`: see `vocabulary.py`.
        """
        x = self.token_embedding[tokens].astype(self.dtype)  # [N, L, W]; cast first, as where a table is held so
        if masked is not None:
            x = jnp.where(masked[..., None], self.mask_embedding, x)
        x = (x + self.position_embedding[: tokens.shape[1]]).astype(self.dtype)
        function = texts_as_queries(apply_function(self._cross_attention()))
        insertion = Insertion("mlp", function, self.cross_attention, self._crossed_blocks(), self._sequences(streams))
        x, _ = self.transformer(x, causal, lengths, (insertion,))
        return self._output(x, states)

    def encode_visual(self, streams: Mapping[str, Float[Array, "B _ _ _"]]) -> Memory:
        """The memory of clips, from the towers' `video` and `image` tokens `[B, T, M, D]`."""
        sequences = self._sequences(streams)

        def keys_and_values(parameters: Any) -> dict[str, KeysAndValues]:
            return self._cross_attention().apply({"params": parameters}, sequences, method="keys_and_values")

        cached = jax.vmap(keys_and_values)(self.cross_attention)
        insertion = Insertion("mlp", None, (self.cross_attention, cached), self._crossed_blocks())
        expanded = insertion.expanded(self.depth)
        return Memory(*expanded.parameters, expanded.active)

    def decode_step(
        self, tokens: Int[Array, "N L"], memory: Memory, cache: KeyValueCache, states: bool = False
    ) -> tuple[Float[Array, "N L _"], KeyValueCache]:
        """Logits of the token after each, in float32, and the cache with `tokens` in it, its lengths unchanged.

        Args:
          tokens: of `N = B · R` texts, those of one clip next to each other; each row follows its cached tokens.
          memory: of the `B` clips.
          cache: of the `N` texts.
          states: return the states that logits are made of, `[N, L, W]`: see `vocabulary.py`.
        """
        places = cache.lengths[:, None] + jnp.arange(tokens.shape[1])  # [N, L]
        positions = self.position_embedding[jnp.minimum(places, self.context_length - 1)]
        x = (self.token_embedding[tokens].astype(self.dtype) + positions).astype(self.dtype)
        attend_to_cached = texts_as_queries(apply_function(self._cross_attention()))

        def function(block: tuple[Any, dict[str, KeysAndValues]], x: jax.Array, _: Any) -> jax.Array:
            return attend_to_cached(block[0], x, block[1])

        blocks = tuple(range(self.depth))
        insertion = Insertion("mlp", function, (memory.parameters, memory.cached), blocks, active=memory.active)
        x, cache = self.transformer(x, insertions=(insertion,), cache=cache)
        return self._output(x, states), cache

    def _sequences(self, streams: Mapping[str, Float[Array, "B _ _ _"]]) -> dict[str, Float[Array, "B _ W"]]:
        """What the cross-attentions look at, from the towers' tokens."""
        used = [stream for stream in BLENDINGS[self.blending].streams if stream in streams]
        return BLENDINGS[self.blending].sequences({stream: self._project(stream, streams[stream]) for stream in used})

    def _project(self, stream: str, tokens: Float[Array, "B T M D"]) -> Float[Array, "B K W"]:
        """A stream's tokens as cross-attention takes them: norm, projection, frame position, stream type."""
        clips, frames, count, _ = tokens.shape
        y = self.projections[stream](self.norms[stream](tokens))
        kind = self.types[stream]
        if self.frame_positions:
            kind = interpolate_positions(self.positions[stream], frames)[:, None] + kind
        return (y + kind.astype(self.dtype)).reshape(clips, frames * count, self.width)

    def _crossed_blocks(self) -> tuple[int, ...]:
        """The blocks that have a cross-attention."""
        return tuple(range(self.cross_attention_every - 1, self.depth, self.cross_attention_every))

    def _cross_attention(self) -> CrossAttention:
        """The cross-attention of a block, without its parameters."""
        sizes = (self.heads, self.width, self.depth, self.epsilon)
        return CrossAttention(BLENDINGS[self.blending], *sizes, self.dtype, self.kernels, parent=None)

    def _output(self, x: jax.Array, states: bool) -> jax.Array:
        x = self.ln_final(x)
        return x if states else logits_of(x, self.token_embedding)


def scaled_by_input(rng: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal initialisation of a Dense kernel `[inputs, outputs]`, of standard deviation `inputs ** -0.5`."""
    return normal(shape[0] ** -0.5)(rng, shape, dtype)


def texts_as_queries(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A cross-attention of `[B, R·L, W]` as one of `[N, L, W]`: all texts of a clip are queries of one attention."""

    def inserted(parameters: Any, x: jax.Array, sequences: Any) -> jax.Array:
        clips = jax.tree.leaves(sequences)[0].shape[0]
        return function(parameters, x.reshape(clips, -1, x.shape[-1]), sequences).reshape(x.shape)

    return inserted


def empty_cache(decoder: MultimodalDecoder, texts: int, room: int) -> KeyValueCache:
    """A cache for `texts` rows, without tokens yet, with `room` places each."""
    shape = (decoder.depth, texts, room, decoder.heads, decoder.width // decoder.heads)
    return KeyValueCache(
        jnp.zeros(shape, decoder.dtype), jnp.zeros(shape, decoder.dtype), jnp.zeros((texts,), jnp.int32)
    )


def take_rows(cache: KeyValueCache, rows: Int[Array, " N"]) -> KeyValueCache:
    """The cache of the given rows, in their order; a row can be taken several times."""
    return KeyValueCache(cache.key[:, rows], cache.value[:, rows], cache.lengths[rows])
