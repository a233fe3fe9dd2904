"""Text generation by greedy decoding and beam search, and the log-likelihood of texts.

A text follows a prefix: the start of text alone (captioning), or a question (answering). Each search is one compiled
loop per shape, which stops when every text has ended.

Dimensions: `B` clips, `T` frames, `S` pixels, `Q` prefixes, each of one clip, `R` beams or texts per prefix,
`N = Q · R`, `P` tokens of a prefix, `G` tokens of a text, `V` vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from vlab_jax.errors import InputError
from vlab_jax.models.decoder import VisualCache, logits_of, token_losses
from vlab_jax.models.layers import KeyValueCache
from vlab_jax.models.vlab import VLAB

NEVER = -1e9  # the log-probability of an impossible token; finite, so that sums of it can be compared
# The most texts and tokens (of prefixes and texts together) that one step of `text_likelihoods` holds.
TEXTS_AT_ONCE, TOKENS_AT_ONCE = 512, 16384
LENGTH_STEP = 8  # texts are padded to a multiple of this length, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How texts are generated.

    Attributes:
      max_tokens: the length limit, end of text included; a text that has not ended by then is cut.
      end: the token id of the end of text.
      beams: 1: greedy decoding.
      length_penalty: the score of a finished beam is its log-likelihood divided by its length to this power.
    """

    max_tokens: int
    end: int
    beams: int = 1
    length_penalty: float = 1.0

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], end: int, context_length: int) -> "GenerationConfig":
        """From the fields of `config.generation_config`.

        Raises:
          InputError: `max_tokens` is more than the text tower has positions for.
        """
        room = context_length - 1  # the start of text takes one position
        if fields["max_tokens"] > room:
            raise InputError(
                f"config.generation.max_tokens is {fields['max_tokens']}, but after the start of text there are only "
                f"{room} positions (model.text.context_length)"
            )
        return cls(fields["max_tokens"] or room, end, fields["beams"], float(fields["length_penalty"]))


class GeneratedTexts(NamedTuple):
    """Texts, with zeros after the end; `lengths` count the end of text. Scores are log-likelihoods, which beam search
    divides by the length to the power of the penalty."""

    tokens: jax.Array  # [Q, G]
    lengths: jax.Array  # [Q]
    scores: jax.Array  # [Q]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def cache_visual(
    model: VLAB,
    streams: tuple[str, ...],
    image_frames: tuple[int, ...],
    parameters: Any,
    video: UInt8[Array, "B T S S 3"],
) -> VisualCache:
    """The keys and values of clips, for the functions below; the arguments are those of `vlab.embed_clips`."""
    features = model.apply({"params": parameters}, video, streams, image_frames, method="encode_visual")
    inputs = {"params": parameters["decoder"]}, features.streams
    return model.standalone_decoder().apply(*inputs, method="cache_visual")


@functools.partial(jax.jit, static_argnums=(0, 1))
def generate_texts(
    model: VLAB,
    config: GenerationConfig,
    decoder_parameters: Any,
    visual: VisualCache,
    clips: Int[Array, " Q"] | None,
    prefix: Int[Array, "Q P"],
    lengths: Int[Array, " Q"],
) -> GeneratedTexts:
    """Generates a text for each prefix.

    Args:
      clips: the index of each prefix's clip; None: prefixes and clips are paired in order.
      prefix, lengths: the tokens that the texts follow, and their number.
    """
    visual = visual if clips is None else visual.take(clips)
    room = prefix.shape[1] + config.max_tokens
    logits, cache = _prefill(model, decoder_parameters, visual, prefix, lengths, room)
    decoder = model.standalone_decoder()

    def advance(tokens: jax.Array, cache: KeyValueCache) -> tuple[jax.Array, KeyValueCache]:
        """From the last tokens `[N]` to logits `[N, V]`, and the cache with these tokens."""
        inputs = {"params": decoder_parameters}, tokens[:, None], visual, cache
        logits, cache = decoder.apply(*inputs, method="decode_step")
        return logits[:, 0], cache._replace(lengths=cache.lengths + 1)

    return (_greedy if config.beams == 1 else _beam_search)(advance, logits, cache, config)


def _prefill(model, parameters, visual, prefix, lengths, room) -> tuple[Float[Array, "Q V"], KeyValueCache]:
    """Decodes whole prefixes: the logits of the token after each, and a cache of `room` tokens that holds them."""
    decoder = model.standalone_decoder()
    cache = decoder.empty_cache(prefix.shape[0], room)
    states, cache = decoder.apply({"params": parameters}, prefix, visual, cache, states=True, method="decode_step")
    last = jnp.take_along_axis(states, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [Q, W]
    # The cache's entries of padding are overwritten by later tokens.
    return logits_of(last, parameters["token_embedding"]), cache._replace(lengths=lengths)


def _greedy(advance: Callable, logits: jax.Array, cache: KeyValueCache, config: GenerationConfig) -> GeneratedTexts:
    rows = logits.shape[0]
    texts = GeneratedTexts(jnp.zeros((rows, config.max_tokens), jnp.int32), jnp.zeros(rows, jnp.int32), jnp.zeros(rows))

    def unfinished(state: tuple) -> jax.Array:
        number, _, done, *_ = state
        return (number < config.max_tokens) & ~done.all()

    def step(state: tuple) -> tuple:
        number, texts, done, logits, cache = state
        token = logits.argmax(axis=-1).astype(jnp.int32)
        score = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        texts = GeneratedTexts(
            texts.tokens.at[:, number].set(jnp.where(done, 0, token)),
            texts.lengths + ~done,
            texts.scores + jnp.where(done, 0.0, score),
        )
        return number + 1, texts, done | (token == config.end), *advance(token, cache)

    start = jnp.zeros((), jnp.int32), texts, jnp.zeros(rows, bool), logits, cache
    return jax.lax.while_loop(unfinished, step, start)[1]


def _beam_search(
    advance: Callable, logits: jax.Array, cache: KeyValueCache, config: GenerationConfig
) -> GeneratedTexts:
    """Beam search with `R` unfinished and `R` finished texts per prefix.

    It stops when no unfinished text can still beat the worst finished one, or at the length limit; texts that are cut
    there compete with the finished ones.
    """
    (rows, vocabulary), beams = logits.shape, config.beams
    # `alive` and `done` are `[Q, R, …]`; the scores of `alive` are log-likelihoods, those of `done` are divided by the
    # length penalty, or NEVER where a place is empty.
    done = GeneratedTexts(
        jnp.zeros((rows, beams, config.max_tokens), jnp.int32),
        jnp.zeros((rows, beams), jnp.int32),
        jnp.full((rows, beams), NEVER),
    )
    alive = done._replace(scores=done.scores.at[:, 0].set(0.0))  # all beams are still equal: only one counts

    def penalty(length: Any) -> jax.Array:
        return jnp.asarray(length, jnp.float32) ** config.length_penalty

    def unfinished(state: tuple) -> jax.Array:
        number, alive, done, *_ = state
        best = alive.scores.max(axis=1) / penalty(config.max_tokens)
        return (number < config.max_tokens) & (best > done.scores.min(axis=1)).any()

    def step(state: tuple) -> tuple:
        number, alive, done, logits, cache = state
        scores = alive.scores[..., None] + jax.nn.log_softmax(logits)  # [Q, R, V]
        scores, indices = jax.lax.top_k(scores.reshape(rows, -1), 2 * beams)
        parent, token = indices // vocabulary, (indices % vocabulary).astype(jnp.int32)
        tokens = jnp.take_along_axis(alive.tokens, parent[..., None], axis=1).at[..., number].set(token)
        extended = GeneratedTexts(tokens, jnp.full(token.shape, number + 1), scores)
        ended = token == config.end
        finished = jnp.where(ended & (scores > NEVER / 2), scores / penalty(number + 1), NEVER)
        done, _ = _best(beams, done, extended._replace(scores=finished))
        alive, kept = _best(beams, extended._replace(scores=jnp.where(ended, NEVER, scores)))
        sources = jnp.take_along_axis(parent, kept, axis=1) + beams * jnp.arange(rows)[:, None]
        logits, cache = advance(alive.tokens[..., number].reshape(-1), cache.take(sources.reshape(-1)))
        return number + 1, alive, done, logits.reshape(rows, beams, -1), cache

    cache = cache.take(jnp.repeat(jnp.arange(rows), beams))
    repeated = jnp.repeat(logits[:, None], beams, axis=1)
    start = jnp.zeros((), jnp.int32), alive, done, repeated, cache
    number, alive, done, *_ = jax.lax.while_loop(unfinished, step, start)
    cut = alive.scores / penalty(config.max_tokens)
    cut = jnp.where((number == config.max_tokens) & (alive.scores > NEVER / 2), cut, NEVER)
    best, _ = _best(1, done, alive._replace(scores=cut))
    return jax.tree.map(lambda leaf: leaf[:, 0], best)


def _best(count: int, *groups: GeneratedTexts) -> tuple[GeneratedTexts, jax.Array]:
    """The `count` texts of highest score of each row, and their indices in the groups one after the other."""
    texts = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *groups)
    scores, indices = jax.lax.top_k(texts.scores, count)
    tokens = jnp.take_along_axis(texts.tokens, indices[..., None], axis=1)
    return GeneratedTexts(tokens, jnp.take_along_axis(texts.lengths, indices, axis=1), scores), indices


def text_likelihoods(
    model: VLAB,
    decoder_parameters: Any,
    visual: VisualCache,
    clips: Int[np.ndarray, " Q"] | None,
    prefix: tuple[Int[np.ndarray, "Q P"], Int[np.ndarray, " Q"]],
    texts: tuple[Int[np.ndarray, "Q R G"], Int[np.ndarray, "Q R"]],
) -> Float[np.ndarray, "Q R"]:
    """Log-likelihoods of the texts of each prefix, end of text included; `-inf` for a text of length 0.

    Prefixes are decoded once; texts come in steps of as many as `TEXTS_AT_ONCE` and `TOKENS_AT_ONCE` allow.

    Args:
      visual, clips, prefix: as in `generate_texts`.
      texts: token ids and their lengths, as from `stack_texts`.
    """
    ids, lengths = texts
    longest = -(-max(1, int(lengths.max(initial=0))) // LENGTH_STEP) * LENGTH_STEP
    ids = ids[:, :, :longest]
    visual, prefilled = _prefill_clips(model, ids.shape[2], decoder_parameters, visual, clips, *prefix)
    room = prefix[0].shape[1] + ids.shape[2]
    width = min(max(1, min(TEXTS_AT_ONCE, TOKENS_AT_ONCE // room) // len(ids)), ids.shape[1])
    scores = []
    for first in range(0, ids.shape[1], width):
        part, counts = ids[:, first : first + width], lengths[:, first : first + width]
        missing = width - part.shape[1]  # the last step is padded to the width of the others
        part, counts = np.pad(part, ((0, 0), (0, missing), (0, 0))), np.pad(counts, ((0, 0), (0, missing)))
        scores.append(np.asarray(_log_likelihoods(model, decoder_parameters, visual, prefilled, part, counts)))
    return np.concatenate(scores, axis=1)[:, : ids.shape[1]]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill_clips(model, longest, parameters, visual, clips, prefix, lengths):
    visual = visual if clips is None else visual.take(clips)
    return visual, _prefill(model, parameters, visual, prefix, lengths, prefix.shape[1] + longest)


@functools.partial(jax.jit, static_argnums=0)
def _log_likelihoods(model, parameters, visual, prefilled, texts, text_lengths):
    """`[Q, R]`, of texts `[Q, R, G]` after prefixes that `_prefill` has decoded, with room for `G` more tokens."""
    rows, count, longest = texts.shape
    logits, cache = prefilled
    cache = cache.take(jnp.repeat(jnp.arange(rows), count))
    flat = texts.reshape(rows * count, longest)
    counted = jnp.arange(longest) < text_lengths.reshape(-1, 1)
    first = jnp.take_along_axis(jax.nn.log_softmax(logits), texts[:, :, 0], axis=1)  # [Q, R]
    total = jnp.where(text_lengths > 0, first, 0.0)
    if longest > 1:
        inputs = {"params": parameters}, flat[:, :-1], visual, cache
        states, _ = model.standalone_decoder().apply(*inputs, states=True, method="decode_step")  # [N, G - 1, W]
        losses = token_losses(states, parameters["token_embedding"], flat[:, 1:], counted[:, 1:])
        total = total - losses.sum(axis=1).reshape(rows, count)
    return jnp.where(text_lengths > 0, total, -jnp.inf)


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    """`items` in parts of `size`; the last part may be shorter."""
    for first in range(0, len(items), size):
        yield items[first : first + size]


def stack_texts(
    texts: Sequence[Sequence[np.ndarray]], longest: int
) -> tuple[Int[np.ndarray, "Q R {longest}"], Int[np.ndarray, "Q R"]]:
    """The token ids of each row's texts as one array, padded with zeros, and their lengths; rows with fewer texts are
    padded with texts of length 0."""
    most = max(map(len, texts))
    ids, lengths = np.zeros((len(texts), most, longest), np.int32), np.zeros((len(texts), most), np.int32)
    for row, lines in enumerate(texts):
        for column, line in enumerate(lines):
            ids[row, column, : len(line)], lengths[row, column] = line, len(line)
    return ids, lengths
