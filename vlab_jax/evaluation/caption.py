"""The captions of a model for the clips of a split, and how they are scored."""

import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from vlab_jax.data.pieces import Batch
from vlab_jax.errors import InputError
from vlab_jax.evaluation import captioning
from vlab_jax.evaluation.run import Encoder, all_without_media
from vlab_jax.models import compiled
from vlab_jax.models.generation import Search
from vlab_jax.runtime import processes, sharding


class Captioned(NamedTuple):
    """What `evaluate_captioning` found: figures, and the caption of each clip by the clip's index in the source."""

    metrics: dict[str, float]
    captions: dict[int, str]


def caption_clips(
    encoder: Encoder,
    source: Sequence,
    search: Search,
    max_failed_share: float = 0.01,
    update: Callable[[int], None] = lambda done: None,
) -> dict[int, str]:
    """A caption of each clip that can be decoded, by the clip's index in the source.

    Args:
      source: a data source of the schema.
      max_failed_share: see `pipeline.FailureCount`.
      update: called with the number of clips done.
    """
    prefix = np.full((encoder.batch, 1), encoder.tokenizer.start, np.int32)
    start = sharding.to_global({"prefix": prefix, "lengths": np.ones(encoder.batch, np.int32)}, encoder.mesh)
    decoder_parameters = encoder.parameters["decoder"]

    def write(batch: Batch, video: jax.Array) -> Iterator[tuple[int, str]]:
        memory = encoder.remember(video)
        written = compiled.write(
            encoder.model, search, decoder_parameters, memory, None, start["prefix"], start["lengths"]
        )
        for index, valid, row in zip(batch["index"], batch["valid"], np.asarray(written.tokens), strict=True):
            if valid:
                yield int(index), encoder.tokenizer.decode(row)

    return dict(encoder.of_clips(source, write, max_failed_share, update))


def evaluate_captioning(
    encoder: Encoder,
    source: Sequence,
    search: Search,
    folder: pathlib.Path | None,
    max_failed_share: float = 0.01,
    update: Callable[[int], None] = lambda done: None,
) -> Captioned:
    """Scores a caption of each clip against the clip's own captions.

    Args:
      folder: where predictions and references go as COCO-format JSON; None: nowhere.

    Returns:
      Its metrics are `BLEU-1` to `BLEU-4`, `METEOR`, `ROUGE-L` and `CIDEr`, times 100 as papers print them.

    Raises:
      InputError: no clip of the split has a caption, or the scorers are not installed.
    """
    written = caption_clips(encoder, source, search, max_failed_share, update)
    clips = dict(zip(written, all_without_media(source, list(written)), strict=True))
    described = {index: clip for index, clip in clips.items() if clip.captions}
    if not described:
        raise InputError("no clip of the split to caption has a caption to compare with")
    predictions = {clip.id: written[index] for index, clip in described.items()}
    references = {clip.id: clip.captions for clip in described.values()}
    if folder is not None:
        captioning.save_coco(folder, predictions, references)
    logging.info("scoring %d captions", len(predictions))
    scores = processes.agreed(lambda: captioning.score_captions(predictions, references))
    return Captioned({name: 100 * score for name, score in scores.items()}, written)
