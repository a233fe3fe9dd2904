"""How likely a model holds given texts for given clips: what answers are ranked by, and retrieved clips ranked anew.

Dimensions: `Q` rows (a clip with a prefix), `P` tokens of a prefix, `R` texts a row, `G` their tokens.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from vlab_jax.models.decoder import Memory
from vlab_jax.models.generation import likelihood_behind, prefill
from vlab_jax.models.vlab import VLAB, decoder_of

# Of the decoder's cache in one step: rows, and places of all rows, those of prefixes among them.
TEXTS_AT_ONCE, TOKENS_AT_ONCE = 512, 16384
LENGTH_STEP = 8  # texts are cut to the longest of them, in steps, so that few shapes are compiled


def text_likelihoods(
    model: VLAB,
    decoder_parameters: Any,
    memory: Memory,
    rows: Int[np.ndarray, " Q"] | None,
    prefix: tuple[Int[np.ndarray, "Q P"], Int[np.ndarray, " Q"]],
    texts: tuple[Int[np.ndarray, "Q R G"], Int[np.ndarray, "Q R"]],
) -> Float[np.ndarray, "Q R"]:
    """Log-likelihoods of each row's texts, their end included; of a text of length 0, `-inf`.

    Prefixes are read and the rows' clips are gathered once; texts come in steps of as many as `TEXTS_AT_ONCE`
    and `TOKENS_AT_ONCE` allow.

    Args:
      rows: each row's clip, of those in `memory`; None: the rows are the clips, in their order.
      prefix: token ids that the texts of a row go on from, and their lengths.
      texts: token ids and their lengths, as `stacked` makes them.
    """
    ids, lengths = texts
    longest = -(-max(1, int(lengths.max(initial=0))) // LENGTH_STEP) * LENGTH_STEP
    ids = ids[:, :, :longest]
    seen, read = _read(model, ids.shape[2], decoder_parameters, memory, rows, *prefix)
    room = prefix[0].shape[1] + ids.shape[2]
    width = min(max(1, min(TEXTS_AT_ONCE, TOKENS_AT_ONCE // room) // len(ids)), ids.shape[1])
    scores = []
    for first in range(0, ids.shape[1], width):
        part, counts = ids[:, first : first + width], lengths[:, first : first + width]
        missing = width - part.shape[1]  # the last step is filled up
        part, counts = np.pad(part, ((0, 0), (0, missing), (0, 0))), np.pad(counts, ((0, 0), (0, missing)))
        scores.append(np.asarray(_likelihoods(model, decoder_parameters, seen, read, part, counts)))
    return np.concatenate(scores, axis=1)[:, : ids.shape[1]]


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    """`items` in parts of `size`, the last of which may be shorter."""
    for first in range(0, len(items), size):
        yield items[first : first + size]


def stacked(
    texts: Sequence[Sequence[np.ndarray]], longest: int
) -> tuple[Int[np.ndarray, "Q R {longest}"], Int[np.ndarray, "Q R"]]:
    """Token ids of each row's texts as one array, zeros behind them, and lengths; of a text that a row lacks, 0.

    Args:
      longest: tokens that a text has at most.
    """
    most = max(map(len, texts))
    ids, lengths = np.zeros((len(texts), most, longest), np.int32), np.zeros((len(texts), most), np.int32)
    for row, lines in enumerate(texts):
        for column, line in enumerate(lines):
            ids[row, column, : len(line)], lengths[row, column] = line, len(line)
    return ids, lengths


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(model, longest, parameters, memory, rows, prefix, lengths):
    seen = memory if rows is None else memory.of(rows)
    room = prefix.shape[1] + longest
    return seen, prefill(decoder_of(model), parameters, seen, prefix, lengths, room)


@functools.partial(jax.jit, static_argnums=0)
def _likelihoods(model, parameters, seen, read, texts, text_lengths) -> jax.Array:
    return likelihood_behind(decoder_of(model), parameters, seen, read, texts, text_lengths)
