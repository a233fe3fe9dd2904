"""Analytic count of the floating-point operations of the model's matrix products; a multiply-add counts as two.

Elementwise operations are left out, as is usual for model FLOPs utilisation (Chowdhery et al., arXiv 2204.02311,
appendix B), and so are operations that a remat policy repeats. Causal attention counts in full: all of it is computed.

A product of activations with parameters costs as much again for the gradient of the parameters, where they are
trainable, and as much again for the gradient of the activations, where anything before them is trainable. A product of
activations (attention has two) costs twice as much again where anything before it is trainable.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from vlab_jax.models.decoder import BLENDINGS
from vlab_jax.models.video_adapter import MIXERS
from vlab_jax.models.vlab import VLAB


class LayerFlops(NamedTuple):
    """FLOPs of a layer: of products with parameters (in `part` of the tree), and of products of activations."""

    part: str
    with_parameters: float
    of_activations: float = 0.0


@dataclasses.dataclass(frozen=True)
class Workload:
    """The work of a batch.

    Attributes:
      frames, image_frames: of a clip in the video and in the image stream.
      streams: which of `video` and `image` are computed.
      embedded_texts: texts that the text tower embeds.
      decoded_texts: texts that the decoder reads, of all objectives.
      decoder_passes: how often the decoder computes keys and values of the streams for them.
    """

    clips: int
    frames: int
    image_frames: int
    streams: tuple[str, ...]
    embedded_texts: int
    decoded_texts: int
    decoder_passes: int = 1

    def images(self, stream: str) -> int:
        """The frames of all clips in a stream."""
        return self.clips * (self.frames if stream == "video" else self.image_frames)


def forward_flops(model: VLAB, work: Workload) -> float:
    """FLOPs of one forward pass over a batch."""
    return step_flops(model, work, {})


def step_flops(model: VLAB, work: Workload, trainable: Mapping[str, bool]) -> float:
    """FLOPs of a training step: the forward pass, and the gradients of trainable parameters.

    Args:
      trainable: for each part of the parameter tree (`vision`, `text`, `video_adapter`, `image_encoder`, `decoder`),
        whether any of it is trainable; parts that are left out are not.
    """
    total, has_gradient = 0.0, {}
    for stream in work.streams:
        layers, before = _tower(model, work, stream), []
        if stream == "image" and "video" in work.streams and model.image_encoder == "shared":
            # The video stream counts the blocks before the first adapter: the patch embedding, and two layers of each.
            count = 1 + 2 * model.common_blocks
            before, layers = layers[:count], layers[count:]
        flops, has_gradient[stream] = _sequence(layers, trainable, any(trainable.get(layer.part) for layer in before))
        total += flops
    if work.embedded_texts:
        text, count = model.text, work.embedded_texts
        blocks = _block("text", count, text["context_length"], text) * text["depth"]
        layers = [*blocks, LayerFlops("text", 2.0 * count * text["width"] * text["embed_width"])]
        flops, text_has_gradient = _sequence(layers, trainable, False)
        similarities = 2.0 * work.clips * count * text["embed_width"]
        total += flops + similarities * (3 if text_has_gradient or any(has_gradient.values()) else 1)
    return total + (_decoder(model, work, trainable, has_gradient) if work.decoded_texts else 0.0)


def _sequence(layers: Iterable[LayerFlops], trainable: Mapping[str, bool], has_gradient: bool) -> tuple[float, bool]:
    """FLOPs of consecutive layers, and whether their output has a gradient; `has_gradient` is the input's."""
    total = 0.0
    for layer in layers:
        own = trainable.get(layer.part, False)
        total += layer.with_parameters * (1 + own + has_gradient)
        total += layer.of_activations * (3 if own or has_gradient else 1)
        has_gradient = has_gradient or own
    return total, has_gradient


def _tower(model: VLAB, work: Workload, stream: str) -> list[LayerFlops]:
    """The vision tower, with adapters in the video stream."""
    fields, images = model.vision, work.images(stream)
    part = "image_encoder" if stream == "image" and model.image_encoder == "separate" else "vision"
    patches = model.tokens_per_frame - 1
    layers = [LayerFlops(part, 2.0 * images * patches * fields["patch_size"] ** 2 * 3 * fields["width"])]
    attention, mlp = _block(part, images, patches + 1, fields)
    adapted = model.adapter["blocks"] if stream == "video" else ()
    for number in range(fields["depth"]):
        adapter = [_adapter(model, work)] if number in adapted else []
        layers += [*adapter, attention, *(adapter if model.adapter["before_mlp"] else []), mlp]
    return [*layers, LayerFlops(part, 2.0 * images * fields["width"] * fields["embed_width"])]


def _block(part: str, rows: int, tokens: int, fields: Mapping[str, Any]) -> tuple[LayerFlops, LayerFlops]:
    """A block's attention and its MLP."""
    width, mlp = fields["width"], fields["mlp_width"]
    products = 3 if fields.get("gated_mlp") else 2
    attention = LayerFlops(part, 8.0 * rows * tokens * width**2, 4.0 * rows * tokens**2 * width)
    return attention, LayerFlops(part, 2.0 * products * rows * tokens * width * mlp)


def _adapter(model: VLAB, work: Workload) -> LayerFlops:
    mixer = MIXERS[model.adapter["mixer"]]
    tokens = work.images("video") * (model.tokens_per_frame - (not mixer.mixes_class_token))
    with_parameters, of_activations = mixer.flops(model.adapter, tokens, work.frames)
    down_and_up = 4.0 * tokens * model.vision["width"] * model.adapter["width"]
    return LayerFlops("video_adapter", with_parameters + down_and_up, of_activations)


def _decoder(model: VLAB, work: Workload, trainable: Mapping[str, bool], has_gradient: Mapping[str, bool]) -> float:
    """`has_gradient`: by stream, whether its tokens have a gradient."""
    fields, vision, blending = model.text, model.vision, BLENDINGS[model.decoder["blending"]]
    width, every = fields["width"], model.decoder["cross_attention_every"]
    present = [stream for stream in blending.streams if stream in work.streams]
    tokens = {stream: work.images(stream) * model.tokens_per_frame for stream in present}
    total, visual_has_gradient = 0.0, False
    for stream, count in tokens.items():
        rows = count * work.decoder_passes
        projection = LayerFlops("decoder", 2.0 * rows * vision["width"] * width)
        keys_and_values = LayerFlops("decoder", 4.0 * rows * width**2 * (fields["depth"] // every))
        flops, reaches = _sequence([projection, keys_and_values], trainable, has_gradient[stream])
        total, visual_has_gradient = total + flops, visual_has_gradient or reaches
    queries = work.decoded_texts * fields["context_length"]
    lengths = blending.lengths({stream: count // work.clips for stream, count in tokens.items()})
    crossing = LayerFlops("decoder", *blending.flops(width, queries, lengths))
    attention, mlp = _block("decoder", work.decoded_texts, fields["context_length"], fields)
    layers = []
    for number in range(fields["depth"]):
        layers += [attention, *([crossing] if number % every == every - 1 else []), mlp]
    layers.append(LayerFlops("decoder", 2.0 * queries * width * fields["vocab_size"]))
    flops, _ = _sequence(layers, trainable, trainable.get("decoder", False) or visual_has_gradient)
    return total + flops
