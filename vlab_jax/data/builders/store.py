"""How a clip is stored: its media read, or made into frames, and all of it as one record.

A clip whose media cannot be read or decoded is stored without any, so that every variant of a data set holds the same
clips: whoever reads it is told, counts it, and names it, as with a file that cannot be decoded.
"""

import dataclasses
import functools
from typing import NamedTuple

import tensorflow_datasets as tfds
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from vlab_jax.data import frames, schema, video
from vlab_jax.data.builders.options import BuildOptions
from vlab_jax.data.files import read_file


class Stored(NamedTuple):
    """A clip as a record, and why it has no media, where it has none."""

    id: str
    record: bytes
    failure: str = ""


def store(clip: schema.Clip, options: BuildOptions) -> Stored:
    """The clip in the form that `options` say."""
    try:
        media = read(clip.media, options.limits.max_bytes)
        if options.variant == "frames" and isinstance(media, bytes):
            form = {"frame_rate": options.frame_rate, "short_side": options.short_side, "quality": options.jpeg_quality}
            media = tuple(frames.store(media, start=clip.start, end=clip.end, limits=options.limits, **form))
    except (OSError, video.DecodeError) as error:
        return without_media(clip, options, " ".join(str(error).split()))
    return _stored(clip, media, options.variant)


def without_media(clip: schema.Clip, options: BuildOptions, failure: str) -> Stored:
    """The clip without the media that cannot be had, for the reason `failure`."""
    return _stored(clip, b"" if options.variant == "file" else (), options.variant)._replace(failure=failure)


def read(media: bytes | tuple[bytes, ...] | str, most: int | None = None) -> bytes | tuple[bytes, ...]:
    """The media of a clip that is not stored yet: given, or those of a file, of `most` bytes. Raises `OSError`."""
    return read_file(media, most) if isinstance(media, str) else media


def _stored(clip: schema.Clip, media: bytes | tuple[bytes, ...], variant: str) -> Stored:
    features, serializer = _serializer(variant)
    example = schema.to_example(dataclasses.replace(clip, media=media))
    return Stored(clip.id, serializer.serialize_example(features.encode_example(example)))


@functools.cache
def _serializer(variant: str) -> tuple[tfds.features.FeaturesDict, ExampleSerializer]:
    features = schema.features(variant)
    return features, ExampleSerializer(features.get_serialized_info())
