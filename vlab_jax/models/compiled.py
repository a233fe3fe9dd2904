"""A trained model in use: what is asked of it, compiled once for each shape of what is given.

Dimensions: `B` clips or texts, `T` frames, `S` pixels, `E` embedding width, `L` text tokens, `Q` texts to write, `P`
tokens of what they go on from.
"""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float, Int, UInt8

from vlab_jax.models.cached_decoder import Memory, NextTokens, Remember
from vlab_jax.models.generation import Search, Texts, generate
from vlab_jax.models.vlab import VLAB, decoder_of


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def embed_clips(
    model: VLAB,
    streams: tuple[str, ...],
    image_frames: tuple[int, ...],
    parameters: Any,
    video: UInt8[Array, "B T S S 3"],
) -> Float[Array, "B E"]:
    """Embeddings of clips, of unit length; see `VLAB.encode_visual`."""
    return model.apply({"params": parameters}, video, streams, image_frames, method="encode_visual").embedding


@functools.partial(jax.jit, static_argnums=0)
def embed_texts(
    model: VLAB, parameters: Any, tokens: Int[Array, "B L"], lengths: Int[Array, " B"]
) -> Float[Array, "B E"]:
    """Embeddings of texts, of unit length; see `VLAB.encode_text`."""
    return model.apply({"params": parameters}, tokens, lengths, method="encode_text")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def remember(
    model: VLAB,
    streams: tuple[str, ...],
    image_frames: tuple[int, ...],
    parameters: Any,
    video: UInt8[Array, "B T S S 3"],
) -> Memory:
    """What the decoder needs of clips to write about them."""
    visual = model.apply({"params": parameters}, video, streams, image_frames, method="encode_visual")
    return decoder_of(model, Remember).apply({"params": parameters["decoder"]}, visual.streams)


@functools.partial(jax.jit, static_argnums=(0, 1))
def write(
    model: VLAB,
    search: Search,
    decoder_parameters: Any,
    memory: Memory,
    rows: Int[Array, " Q"] | None,
    prefix: Int[Array, "Q P"],
    lengths: Int[Array, " Q"],
) -> Texts:
    """A text for each prefix.

    Args:
      memory: of the clips, by `remember`.
      rows: each prefix's clip; None: there are as many prefixes as clips, in their order.
      prefix, lengths: the tokens that each text goes on from, and how many of them there are.
    """
    seen = memory if rows is None else memory.of(rows)
    return generate(decoder_of(model, NextTokens), decoder_parameters, seen, prefix, lengths, search)
