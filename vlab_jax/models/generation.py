"""Text from clips: greedy decoding, beam search and sampling, and the likelihood of given texts.

All of it is one compiled loop a shape, over the cached decoder (`cached_decoder.py`), and stops when every text is
done. Texts start from a prefix: the start of text alone (captioning), or a question (answering).

Dimensions: `B` clips, `R` beams or candidate texts a clip, `N = B · R`, `P` prefix tokens, `G` generated tokens at
most, `V` vocabulary.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from vlab_jax.errors import InputError
from vlab_jax.models.decoder import Memory, MultimodalDecoder, empty_cache, take_rows
from vlab_jax.models.layers import KeyValueCache
from vlab_jax.models.vlab import VLAB, decoder_of
from vlab_jax.models.vocabulary import logits_of, token_losses

NEVER = -1e9  # a log-probability that no token has; finite, so that sums of it stay comparable


@dataclasses.dataclass(frozen=True)
class Search:
    """How texts are generated.

    Attributes:
      max_tokens: of a generated text, its end of text included; a text that has not ended by then is cut.
      end: the id of end of text.
      beams: 1 is greedy decoding or, with a temperature, sampling.
      length_penalty: a finished beam's score is its log-likelihood over its length to this power.
      temperature: 0 takes the likeliest token; above, tokens are drawn, the flatter the higher.
      top_p: tokens are drawn from the likeliest ones that together have this probability.
    """

    max_tokens: int
    end: int
    beams: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_p: float = 1.0

    @classmethod
    def of(cls, generation: Mapping[str, Any], end: int, context_length: int) -> "Search":
        """The search that the fields of `config.generation_config` say.

        Raises:
          InputError: a text would be longer than the text tower has positions for.
        """
        room = context_length - 1  # the start of text takes one
        if generation["max_tokens"] > room:
            raise InputError(
                f"config.generation.max_tokens is {generation['max_tokens']}; behind the start of text there are "
                f"{room} places (model.text.context_length)"
            )
        return cls(
            generation["max_tokens"] or room,
            end,
            beams=generation["beams"],
            length_penalty=float(generation["length_penalty"]),
        )


class Texts(NamedTuple):
    """Generated texts: `tokens` `[B, G]` with zeros behind the end, `lengths` `[B]` (the end of text included), and
    `scores` `[B]`: the log-likelihood, of beam search divided by the length to the penalty's power."""

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array


def generate(
    decoder: MultimodalDecoder,
    parameters: Any,
    memory: Memory,
    prefix: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    search: Search,
    rng: jax.Array | None = None,
) -> Texts:
    """One text for each clip.

    Args:
      decoder: made with `parent=None`; `parameters` are those of VLAB's `decoder`.
      memory: of the clips, by `MultimodalDecoder.encode_visual`.
      prefix: the tokens that a text starts with, as `lengths` counts them; at least one.
      rng: what sampling draws from.
    """
    room = prefix.shape[1] + search.max_tokens
    logits, cache = prefill(decoder, parameters, memory, prefix, lengths, room)

    def advance(tokens: jax.Array, cache: KeyValueCache) -> tuple[jax.Array, KeyValueCache]:
        logits, cache = decoder.apply({"params": parameters}, tokens[:, None], memory, cache, method="decode_step")
        return logits[:, 0], cache._replace(lengths=cache.lengths + 1)

    if search.beams > 1:
        return _beam_search(advance, logits, cache, search)
    return _one_by_one(advance, logits, cache, search, rng)


def prefill(
    decoder: MultimodalDecoder,
    parameters: Any,
    memory: Memory,
    prefix: Int[Array, "N P"],
    lengths: Int[Array, " N"],
    room: int,
) -> tuple[Float[Array, "N V"], KeyValueCache]:
    """Reads prefixes at once: the logits of the token after each, and a cache with `room` places that holds them."""
    cache = empty_cache(decoder, prefix.shape[0], room)
    states, cache = decoder.apply({"params": parameters}, prefix, memory, cache, states=True, method="decode_step")
    last = jnp.take_along_axis(states, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [N, W]
    logits = logits_of(last, parameters["token_embedding"])
    return logits, cache._replace(lengths=lengths)  # what was written past them is overwritten


def log_likelihood(
    decoder: MultimodalDecoder,
    parameters: Any,
    memory: Memory,
    prefix: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    texts: Int[Array, "B R G"],
    text_lengths: Int[Array, "B R"],
) -> Float[Array, "B R"]:
    """The log-likelihood of `R` texts for each clip, their end of text included, given the prefix.

    The prefix is read once a clip, and all texts of it in one pass; a text of length 0 has `-inf`.
    """
    read = prefill(decoder, parameters, memory, prefix, lengths, prefix.shape[1] + texts.shape[2])
    return likelihood_behind(decoder, parameters, memory, read, texts, text_lengths)


def likelihood_behind(
    decoder: MultimodalDecoder,
    parameters: Any,
    memory: Memory,
    read: tuple[Float[Array, "B V"], KeyValueCache],
    texts: Int[Array, "B R G"],
    text_lengths: Int[Array, "B R"],
) -> Float[Array, "B R"]:
    """`log_likelihood` behind prefixes that `prefill` has read, with room for `G` more: for texts in several parts."""
    clips, count, longest = texts.shape
    first, cache = read
    cache = take_rows(cache, jnp.repeat(jnp.arange(clips), count))
    rows = texts.reshape(clips * count, longest)
    counted = jnp.arange(longest) < text_lengths.reshape(-1, 1)
    head = jnp.take_along_axis(jax.nn.log_softmax(first), texts[:, :, 0], axis=1)  # [B, R]
    total = jnp.where(text_lengths > 0, head, 0.0)
    if longest > 1:
        given = {"params": parameters}, rows[:, :-1], memory, cache
        states, _ = decoder.apply(*given, states=True, method="decode_step")  # [N, G - 1, W]
        losses = token_losses(states, parameters["token_embedding"], rows[:, 1:], counted[:, 1:])
        total = total - losses.sum(axis=1).reshape(clips, count)
    return jnp.where(text_lengths > 0, total, -jnp.inf)


class _Single(NamedTuple):
    step: jax.Array
    texts: Texts
    done: jax.Array  # bool [B]
    logits: jax.Array  # [B, V]
    cache: KeyValueCache
    rng: Any


def _one_by_one(advance: Any, logits: jax.Array, cache: KeyValueCache, search: Search, rng: Any) -> Texts:
    """Greedy decoding and sampling."""
    rows = logits.shape[0]
    texts = Texts(jnp.zeros((rows, search.max_tokens), jnp.int32), jnp.zeros(rows, jnp.int32), jnp.zeros(rows))

    def unfinished(state: _Single) -> jax.Array:
        return (state.step < search.max_tokens) & ~state.done.all()

    def step(state: _Single) -> _Single:
        rng, drawn = (None, None) if state.rng is None else jax.random.split(state.rng)
        token = _choose(state.logits, search, drawn)
        score = jnp.take_along_axis(jax.nn.log_softmax(state.logits), token[:, None], axis=1)[:, 0]
        texts = Texts(
            state.texts.tokens.at[:, state.step].set(jnp.where(state.done, 0, token)),
            state.texts.lengths + ~state.done,
            state.texts.scores + jnp.where(state.done, 0.0, score),
        )
        logits, cache = advance(token, state.cache)
        return _Single(state.step + 1, texts, state.done | (token == search.end), logits, cache, rng)

    start = _Single(jnp.zeros((), jnp.int32), texts, jnp.zeros(rows, bool), logits, cache, rng)
    return jax.lax.while_loop(unfinished, step, start).texts


def _choose(logits: Float[Array, "N V"], search: Search, rng: Any) -> Int[Array, " N"]:
    if not search.temperature:
        return logits.argmax(axis=-1).astype(jnp.int32)
    logits = logits / search.temperature
    drawn_from = jnp.where(nucleus(logits, search.top_p), logits, NEVER)
    return jax.random.categorical(rng, drawn_from).astype(jnp.int32)


def nucleus(logits: Float[Array, "N V"], top_p: float) -> Bool[Array, "N V"]:
    """The likeliest tokens that together have at least probability `top_p` (Holtzman et al., arXiv 1904.09751)."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits), order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    rank = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(before < top_p, rank, axis=-1)


class _Beams(NamedTuple):
    step: jax.Array
    alive: Texts  # [B, R, …], scores are log-likelihoods
    done: Texts  # [B, R, …], scores are divided by the length penalty; NEVER where there is none yet
    logits: jax.Array  # [B, R, V]
    cache: KeyValueCache  # of N texts


def _beam_search(advance: Any, logits: Float[Array, "B V"], cache: KeyValueCache, search: Search) -> Texts:
    """Beam search with `R` unfinished and `R` finished texts a clip.

    It stops when no unfinished text can still beat the worst finished one, or all places are taken; texts that are
    cut there compete with the finished ones.
    """
    clips, beams, vocabulary = logits.shape[0], search.beams, logits.shape[1]
    empty = Texts(
        jnp.zeros((clips, beams, search.max_tokens), jnp.int32),
        jnp.zeros((clips, beams), jnp.int32),
        jnp.full((clips, beams), NEVER),
    )
    alive = empty._replace(scores=empty.scores.at[:, 0].set(0.0))  # all beams are alike yet; only one counts

    def unfinished(state: _Beams) -> jax.Array:
        best = state.alive.scores.max(axis=1) / _penalty(search.max_tokens, search)
        return (state.step < search.max_tokens) & (best > state.done.scores.min(axis=1)).any()

    def step(state: _Beams) -> _Beams:
        every = state.alive.scores[..., None] + jax.nn.log_softmax(state.logits)  # [B, R, V]
        scores, place = jax.lax.top_k(every.reshape(clips, -1), 2 * beams)
        parent, token = place // vocabulary, (place % vocabulary).astype(jnp.int32)
        tokens = jnp.take_along_axis(state.alive.tokens, parent[..., None], axis=1).at[..., state.step].set(token)
        grown = Texts(tokens, jnp.full(token.shape, state.step + 1), scores)
        ended = token == search.end
        finished = jnp.where(ended & (scores > NEVER / 2), scores / _penalty(state.step + 1, search), NEVER)
        done = _best(_joined(state.done, grown._replace(scores=finished)), beams)
        alive, kept = _best_with_places(grown._replace(scores=jnp.where(ended, NEVER, scores)), beams)
        rows = jnp.take_along_axis(parent, kept, axis=1) + beams * jnp.arange(clips)[:, None]
        logits, cache = advance(alive.tokens[..., state.step].reshape(-1), take_rows(state.cache, rows.reshape(-1)))
        return _Beams(state.step + 1, alive, done, logits.reshape(clips, beams, -1), cache)

    cache = take_rows(cache, jnp.repeat(jnp.arange(clips), beams))
    repeated = jnp.repeat(logits[:, None], beams, axis=1)
    end = jax.lax.while_loop(unfinished, step, _Beams(jnp.zeros((), jnp.int32), alive, empty, repeated, cache))
    cut = end.alive.scores / _penalty(search.max_tokens, search)
    cut = jnp.where((end.step == search.max_tokens) & (end.alive.scores > NEVER / 2), cut, NEVER)
    best = _best(_joined(end.done, end.alive._replace(scores=cut)), 1)
    return jax.tree.map(lambda leaf: leaf[:, 0], best)


def _penalty(length: Any, search: Search) -> Any:
    return jnp.asarray(length, jnp.float32) ** search.length_penalty


def _joined(one: Texts, other: Texts) -> Texts:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), one, other)


def _best(texts: Texts, count: int) -> Texts:
    return _best_with_places(texts, count)[0]


def _best_with_places(texts: Texts, count: int) -> tuple[Texts, jax.Array]:
    """The `count` texts of highest score of each clip, and their places among those given."""
    scores, places = jax.lax.top_k(texts.scores, count)
    tokens = jnp.take_along_axis(texts.tokens, places[..., None], axis=1)
    return Texts(tokens, jnp.take_along_axis(texts.lengths, places, axis=1), scores), places


# FOLDED vlab_jax/models/generation.py: A trained model in use: what is asked of it, compiled once for each shape of
# what is given.  Dimensions: `B` clips or texts, `T` frames, `S` pixels, `E` embedding width, `L` text tokens, `Q`
# texts to write, `P` tokens of what they go on from.


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
    return decoder_of(model).apply({"params": parameters["decoder"]}, visual.streams, method="encode_visual")


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
    return generate(decoder_of(model), decoder_parameters, seen, prefix, lengths, search)
