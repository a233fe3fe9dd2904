"""The multimodal decoder token by token: what does not change is computed once and kept.

Kept for each clip: the keys and values of its visual tokens in every cross-attention (`Memory`). Kept for each text:
the keys and values of its tokens so far (`KeyValueCache`). Several texts of one clip (beams, candidate answers) share
the clip's memory: they are queries of one attention, and nothing is copied.

Dimensions: `B` clips, `R` texts a clip, `N = B · R`, `S` places of a text, `L` new tokens, `V` vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from vlab_jax.models.attention import to_cache_layout
from vlab_jax.models.layers import (
    HeadProjection,
    Insertion,
    KeyValueCache,
    LayerNorm,
    apply_function,
    transformer_of,
)
from vlab_jax.models.multimodal_decoder import KeysAndValues, MultimodalDecoder, texts_beside
from vlab_jax.models.vocabulary import logits_of


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
