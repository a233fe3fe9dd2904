"""How likely a model holds given texts for given clips: what answers are ranked by, and retrieved clips ranked anew.

Dimensions: `Q` rows (a clip with a prefix), `P` tokens of a prefix, `R` texts a row, `G` their tokens.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from vlab_jax.evaluation.run import Encoder
from vlab_jax.models.cached_decoder import Memory, NextTokens
from vlab_jax.models.generation import log_likelihood
from vlab_jax.models.vlab import decoder_of

TEXTS_AT_ONCE = 512  # rows of the decoder's cache in one step


def text_likelihoods(
    encoder: Encoder,
    memory: Memory,
    rows: Int[np.ndarray, " Q"],
    prefix: tuple[Int[np.ndarray, "Q P"], Int[np.ndarray, " Q"]],
    texts: Sequence[Sequence[str]],
    encode: Callable[[Sequence[str]], Iterable[np.ndarray]],
    longest: int,
) -> Float[np.ndarray, "Q R"]:
    """Log-likelihoods of each row's texts, `R` the most that one row has; where one has fewer, `-inf`.

    Args:
      rows: each row's clip, of those in `memory`.
      prefix: token ids that the texts of a row go on from, and their lengths.
      encode: texts to their token ids, with their end and without a start.
      longest: tokens that a text has at most.
    """
    most = max(map(len, texts))
    width = min(max(1, TEXTS_AT_ONCE // len(rows)), most)
    parameters = encoder.parameters["decoder"]
    scores = []
    for first in range(0, most, width):
        chosen = [encode(each[first : first + width]) for each in texts]
        ids, lengths = np.zeros((len(rows), width, longest), np.int32), np.zeros((len(rows), width), np.int32)
        for row, lines in enumerate(chosen):
            for column, line in enumerate(lines):
                ids[row, column, : len(line)], lengths[row, column] = line, len(line)
        scores.append(np.asarray(_likelihoods(encoder.model, parameters, memory, rows, *prefix, ids, lengths)))
    return np.concatenate(scores, axis=1)[:, :most]  # the last step's texts are filled up


@functools.partial(jax.jit, static_argnums=0)
def _likelihoods(model, parameters, memory, rows, prefix, lengths, texts, text_lengths) -> jax.Array:
    decoder = decoder_of(model, NextTokens)
    return log_likelihood(decoder, parameters, memory.of(rows), prefix, lengths, texts, text_lengths)
