"""The multimodal decoder: text attends to the adapted video features and to plain CLIP image features.

VLAB's abstract says that training exploits how image and video features complement each other. A decoder that attends
to both streams, and how it combines them, is a reconstruction after VALOR (Chen et al., arXiv 2304.08345), whose
streams are video and audio. The same weights decode causally (captions, answers) and in both directions (masked
language modelling), and at once (`__call__`) or token by token with caches (`decode_step`). All texts of a clip are
queries of one cross-attention, so that its keys and values are computed once and never copied.

To add a blending, write its function and add it to `BLENDINGS`.

Dimensions: `B` clips, `R` texts per clip, `N = B · R`, `T` frames, `M` tokens per frame, `D` the vision tower's width,
`W` decoder width, `K` visual tokens that an attention attends to, `L` text tokens, `V` vocabulary.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import normal
from jaxtyping import Array, Bool, Float, Int

from vlab_jax.models.attention import attend, from_cache_layout, to_cache_layout
from vlab_jax.models.layers import (
    HeadProjection,
    Insertion,
    KeyValueCache,
    Transformer,
    TransformerConfig,
    TransformerModule,
    interpolate_positions,
    output_projection,
    stacked_init,
)
from vlab_jax.runtime.sharding import gather_kernel

CHUNK_BYTES = 2**28  # of float32 logits at once on a device; see `token_losses`


# Projected keys and values of a cross-attention, `[B, K, H, d]` each, in `attention.to_cache_layout`.
KeysAndValues = tuple[jax.Array, jax.Array]


class VisualCache(NamedTuple):
    """The cross-attentions of all blocks, with the keys and values of `B` clips.

    Attributes:
      parameters: of the cross-attentions, stacked over blocks.
      cached: `KeysAndValues`, `[depth, B, …]`, by the name of the attention.
      active: bool `[depth]`, the blocks that have a cross-attention; None: all.
    """

    parameters: Any
    cached: dict[str, KeysAndValues]
    active: jax.Array | None

    def take(self, clips: Int[Array, " Q"]) -> "VisualCache":
        """The cache of the given clips, in their order; a clip can be taken several times."""
        return self._replace(cached=jax.tree.map(lambda leaf: leaf[:, clips], self.cached))


class Attend(nn.Module):
    """Multi-head attention of text queries to visual tokens, or to their keys and values."""

    config: TransformerConfig
    width: int

    def setup(self):
        self.query = HeadProjection(self.config, 1, biased=(0,))
        self.key_value = HeadProjection(self.config, 2, biased=(0, 1))
        self.output = output_projection(self.config, self.width)

    def __call__(
        self, x: Float[Array, "B L W"], visual: Float[Array, "B K W"] | KeysAndValues
    ) -> Float[Array, "B L W"]:
        (query,), kernels = self.query(x), self.config.kernels
        if isinstance(visual, tuple):
            key, value = (from_cache_layout(each, kernels, query.shape[-1]) for each in visual)
        else:
            key, value = self.key_value(visual)
        return self.output(attend(query, key, value, kernels=kernels))

    def keys_and_values(self, visual: Float[Array, "B K W"]) -> KeysAndValues:
        """The keys and values of visual tokens, for many later calls."""
        key, value = self.key_value(visual)
        return to_cache_layout(key, self.config.kernels), to_cache_layout(value, self.config.kernels)


class CrossAttention(nn.Module):
    """The cross-attention of one block; its blending calls the norms and attentions, by their names."""

    blending: "Blending"
    config: TransformerConfig
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B L W"], sequences: Mapping[str, Any]) -> Float[Array, "B L W"]:
        return self.blending.blend(self, x, sequences)

    def norm(self, name: str, x: jax.Array) -> jax.Array:
        return self.config.norm(name)(x)

    def attend(self, name: str, x: jax.Array, visual: jax.Array | KeysAndValues) -> jax.Array:
        return Attend(self.config, self.width, name=name)(x, visual)

    def keys_and_values(self, parameters: Any, sequences: Mapping[str, jax.Array]) -> dict[str, KeysAndValues]:
        """The keys and values of each attention, by its name; `parameters` are those of this module."""
        project = functools.partial(Attend(self.config, self.width, parent=None).apply, method="keys_and_values")
        return {name: project({"params": parameters[name]}, visual) for name, visual in sequences.items()}

    def attend_texts(self, parameters: Any, x: Float[Array, "N L W"], sequences: Any) -> Float[Array, "N L W"]:
        """The output for texts: those of a clip are one row of queries; `parameters` are those of this module."""
        clips = jax.tree.leaves(sequences)[0].shape[0]
        queries = x.reshape(clips, -1, self.width)
        return self.apply({"params": parameters}, queries, sequences).reshape(x.shape)


def attend_and_add(module: CrossAttention, x: jax.Array, sequences: Mapping[str, Any]) -> jax.Array:
    """All attentions start from the block's state, and their results are added."""
    query = module.norm("ln", x)
    return x + sum(module.attend(name, query, sequences[name]) for name in sorted(sequences))


def attend_in_turn(module: CrossAttention, x: jax.Array, sequences: Mapping[str, Any]) -> jax.Array:
    """Each attention starts from the result of the one before it, in the order of their names."""
    for name in sorted(sequences):
        x = x + module.attend(name, module.norm(name.replace("attend", "ln"), x), sequences[name])
    return x


def attention_flops(width: int, queries: int, lengths: Mapping[str, int]) -> tuple[float, float]:
    """FLOPs of one attention for each sequence: its query and output projections, and its two products."""
    return 4.0 * queries * width**2 * len(lengths), 4.0 * queries * width * sum(lengths.values())


class Blending(NamedTuple):
    """A way in which the cross-attention of a block combines the streams.

    Attributes:
      streams: the streams that it attends to.
      blend: from the block's `CrossAttention`, `[B, L, W]`, and the sequences (or their `KeysAndValues`) to the new
        `[B, L, W]`.
      joined: whether the tokens of all streams are one sequence, `attend`; otherwise each stream is a sequence of its
        own, `attend_<stream>`.
      flops: from the decoder's width, the number of queries, and the length of each sequence, to the FLOPs of products
        with parameters (those of keys and values aside) and of products of activations.
    """

    streams: tuple[str, ...]
    blend: Callable[[CrossAttention, jax.Array, Mapping[str, Any]], jax.Array]
    joined: bool = False
    flops: Callable[[int, int, Mapping[str, int]], tuple[float, float]] = attention_flops

    def sequences(self, visual: Mapping[str, Float[Array, "B _ W"]]) -> dict[str, Float[Array, "B _ W"]]:
        """The visual tokens that each attention attends to, by its name. Absent streams are left out."""
        attended = self._attended(visual).items()
        return {name: jnp.concatenate([visual[stream] for stream in streams], axis=1) for name, streams in attended}

    def lengths(self, tokens: Mapping[str, int]) -> dict[str, int]:
        """The lengths of `sequences`, from the number of tokens of each stream of a clip."""
        return {name: sum(tokens[stream] for stream in streams) for name, streams in self._attended(tokens).items()}

    def _attended(self, present: Collection[str]) -> dict[str, list[str]]:
        streams = [stream for stream in self.streams if stream in present]
        return {"attend": streams} if self.joined else {f"attend_{stream}": [stream] for stream in streams}


BLENDINGS: dict[str, Blending] = {
    "concat": Blending(("image", "video"), attend_and_add, joined=True),
    "parallel": Blending(("image", "video"), attend_and_add),
    "stacked": Blending(("image", "video"), attend_in_turn),
    "none": Blending(("video",), attend_and_add, joined=True),
    "image_only": Blending(("image",), attend_and_add, joined=True),
}


class MultimodalDecoder(TransformerModule):
    """A text transformer shaped like CLIP's text tower, with a cross-attention in every n-th block.

    Attributes:
      frames: the number of frames that positions are learned for; they are interpolated to any other number.
      blending: a name in `BLENDINGS`.
      cross_attention_every: 1: every block has a cross-attention; n: every n-th one.
      frame_positions: whether visual tokens have frame positions. Without them a stream is a set of frames, whose order
        shows only in the adapters' output.
    """

    vocab_size: int
    context_length: int
    frames: int
    blending: str = "concat"
    cross_attention_every: int = 1
    frame_positions: bool = True
    token_deviation: float = 0.02

    def setup(self):
        width, blending = self.width, BLENDINGS[self.blending]
        self.token_embedding = self.param("token_embedding", normal(self.token_deviation), (self.vocab_size, width))
        self.position_embedding = self.param("position_embedding", normal(0.01), (self.context_length, width))
        self.mask_embedding = self.param("mask_embedding", normal(0.02), (width,))
        norms, projections, types, positions = {}, {}, {}, {}
        for stream in blending.streams:
            norms[stream] = self.config.norm(f"{stream}_norm")
            projections[stream] = self.config.dense(width, f"{stream}_projection", scaled_by_input)
            types[stream] = self.param(f"{stream}_type", normal(0.02), (width,))
            if self.frame_positions:
                # As large as the tokens that they are added to: the decoder learns slowly from much smaller ones.
                positions[stream] = self.param(f"{stream}_frame_position", normal(0.5), (self.frames, width))
        self.norms, self.projections, self.types, self.positions = norms, projections, types, positions
        one = jnp.zeros((1, 1, width), self.dtype)
        example = blending.sequences(dict.fromkeys(blending.streams, one))
        initialise = stacked_init(self._cross_attention(), len(self._crossed_blocks), one, example)
        self.cross_attention = self.param("cross_attention", initialise)
        self.transformer = Transformer(self.config, name="transformer")
        self.ln_final = self.config.norm("ln_final")

    def __call__(
        self,
        tokens: Int[Array, "N L"],
        streams: Mapping[str, Float[Array, "B _ _ _"]],
        causal: bool,
        lengths: Int[Array, " N"] | None = None,
        masked: Bool[Array, "N L"] | None = None,
        states: bool = False,
    ) -> Float[Array, "N L _"]:
        """Logits of the next token (`causal`) or of the token itself (not `causal`), `[N, L, V]` in float32.

        Args:
          tokens: the tokens of `N = B · R` texts; those of one clip are adjacent.
          streams: `video` and `image` tokens of the towers, `[B, T, M, D]`.
          causal: whether a position attends only to positions up to itself.
          lengths: the number of valid tokens of each text; later ones are masked out. None: all are valid.
          masked: the positions whose token is replaced by the mask embedding.
          states: return the states before the logits, `[N, L, W]`, as for `token_losses`.
        """
        # Cast before adding, so that a table that is stored in `dtype` gives the same.
        x = self.token_embedding[tokens].astype(self.dtype)  # [N, L, W]
        if masked is not None:
            x = jnp.where(masked[..., None], self.mask_embedding, x)
        x = (x + self.position_embedding[: tokens.shape[1]]).astype(self.dtype)
        module, sequences = self._cross_attention(), self._sequences(streams)

        def cross_attend(parameters: Any, x: jax.Array) -> jax.Array:
            return module.attend_texts(parameters, x, sequences)

        insertion = Insertion("mlp", cross_attend, self.cross_attention, self._crossed_blocks)
        x, _ = self.transformer(x, causal, lengths, (insertion,))
        return self._output(x, states)

    def cache_visual(self, streams: Mapping[str, Float[Array, "B _ _ _"]]) -> VisualCache:
        """The cache for clips, from the towers' `video` and `image` tokens `[B, T, M, D]`."""
        module, sequences = self._cross_attention(), self._sequences(streams)
        cached = jax.vmap(lambda parameters: module.keys_and_values(parameters, sequences))(self.cross_attention)
        insertion = Insertion("mlp", None, (self.cross_attention, cached), self._crossed_blocks)
        # Expanded here, so that the loop over tokens does not do it in every iteration.
        insertion = insertion.expanded(range(self.depth))
        return VisualCache(*insertion.parameters, insertion.active)

    def empty_cache(self, texts: int, room: int) -> KeyValueCache:
        """A cache without tokens, for `texts` rows of up to `room` tokens."""
        zeros = jnp.zeros((self.depth, texts, room, self.heads, self.width // self.heads), self.dtype)
        return KeyValueCache(zeros, zeros, jnp.zeros((texts,), jnp.int32))

    def decode_step(
        self, tokens: Int[Array, "N L"], visual: VisualCache, cache: KeyValueCache, states: bool = False
    ) -> tuple[Float[Array, "N L _"], KeyValueCache]:
        """Logits of the next token after each, in float32, and the cache with `tokens` appended, its lengths unchanged.

        Args:
          tokens: the tokens of `N = B · R` texts, after each row's cached tokens; those of one clip are adjacent.
          states: as in `__call__`.
        """
        places = cache.lengths[:, None] + jnp.arange(tokens.shape[1])  # [N, L]
        positions = self.position_embedding[jnp.minimum(places, self.context_length - 1)]
        x = (self.token_embedding[tokens].astype(self.dtype) + positions).astype(self.dtype)
        module, blocks = self._cross_attention(), tuple(range(self.depth))

        def cross_attend(block: tuple[Any, dict[str, KeysAndValues]], x: jax.Array) -> jax.Array:
            return module.attend_texts(block[0], x, block[1])

        insertion = Insertion("mlp", cross_attend, (visual.parameters, visual.cached), blocks, visual.active)
        x, cache = self.transformer(x, insertions=(insertion,), cache=cache)
        return self._output(x, states), cache

    def _sequences(self, streams: Mapping[str, Float[Array, "B _ _ _"]]) -> dict[str, Float[Array, "B _ W"]]:
        """The visual tokens that each attention attends to, from the towers' tokens."""
        blending = BLENDINGS[self.blending]
        used = {stream: self._project(stream, streams[stream]) for stream in blending.streams if stream in streams}
        return blending.sequences(used)

    def _project(self, stream: str, tokens: Float[Array, "B T M D"]) -> Float[Array, "B K W"]:
        """The tokens of a stream after norm and projection, plus their frame position and stream type."""
        y, kind = self.projections[stream](self.norms[stream](tokens)), self.types[stream]
        if self.frame_positions:
            kind = interpolate_positions(self.positions[stream], tokens.shape[1])[:, None] + kind
        return (y + kind.astype(self.dtype)).reshape(len(tokens), -1, self.width)

    @property
    def _crossed_blocks(self) -> tuple[int, ...]:
        return tuple(range(self.cross_attention_every - 1, self.depth, self.cross_attention_every))

    def _cross_attention(self) -> CrossAttention:
        return CrossAttention(BLENDINGS[self.blending], self.config, self.width, parent=None)

    def _output(self, x: jax.Array, states: bool) -> jax.Array:
        x = self.ln_final(x)
        return x if states else logits_of(x, self.token_embedding)


def scaled_by_input(rng: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal initialisation of a Dense kernel `[inputs, outputs]` with standard deviation `inputs ** -0.5`."""
    return normal(shape[0] ** -0.5)(rng, shape, dtype)


def logits_of(states: Float[Array, "*N W"], table: Float[Array, "V W"]) -> Float[Array, "*N V"]:
    """Logits in float32, from states in the type of matrix products."""
    table = gather_kernel(table.astype(states.dtype), tensor_axis=0)
    return jnp.einsum("...w,vw->...v", states, table, preferred_element_type=jnp.float32)


def token_losses(
    states: Float[Array, "N L W"],
    table: Float[Array, "V W"],
    targets: Int[Array, "N L"],
    counted: Bool[Array, "N L"],
    smoothing: float = 0.0,
    devices: int = 1,
) -> Float[Array, "N L"]:
    """Cross-entropy of the target at each position, in float32; 0 where it is not `counted`.

    The logits of all positions, `[N, L, V]` in float32, are the largest array that a decoder could make: 7.3 GiB for
    512 texts of CLIP's length and vocabulary. Here they are computed for as many positions at a time as fit in
    `CHUNK_BYTES`, and recomputed in the backward pass. Chunks without any counted target are skipped.

    Args:
      smoothing: the probability that label smoothing spreads over the vocabulary.
      devices: the number of devices that share the texts.
    """
    texts, length = targets.shape
    chunk = max(1, CHUNK_BYTES // (4 * -(-texts // devices) * table.shape[0]))
    if chunk >= length:
        return _losses(smoothing, table, states, targets, counted)
    chunk = -(-length // -(-length // chunk))  # as many chunks, of about equal size
    missing = -length % chunk

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(texts, -1, chunk, *x.shape[2:]), 1, 0)

    # Gathered once for all chunks, and in float32, so that the gradients of the chunks are summed in float32.
    whole = gather_kernel(table.astype(states.dtype), tensor_axis=0).astype(jnp.float32)
    compute = jax.checkpoint(functools.partial(_losses, smoothing))

    def chunk_losses(_: None, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        zeros = jnp.zeros(inputs[1].shape, jnp.float32)
        return None, jax.lax.cond(inputs[2].any(), compute, lambda *_: zeros, whole, *inputs)

    _, losses = jax.lax.scan(chunk_losses, None, (split(states), split(targets), split(counted)))
    return jnp.moveaxis(losses, 0, 1).reshape(texts, -1)[:, :length]


def _losses(smoothing, table, states, targets, counted):
    logits = logits_of(states, table)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    loss = normaliser - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * (normaliser - logits.mean(axis=-1))
    return jnp.where(counted, loss, 0.0)
