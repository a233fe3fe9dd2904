"""How many floating-point operations the model's matrix products take: an analytic count, a multiply-add as two.

What is elementwise (norms, activations, softmax) is left out, as is usual for model FLOPs utilisation (Chowdhery et
al., arXiv 2204.02311, appendix B), and so is what a remat policy computes twice. Attention counts in full, where it is
causal too, since that is what is computed.

A product of activations with parameters costs as much again for the gradient of the parameters, if they learn, and as
much again for the gradient of the activations, if anything before them learns. A product of activations with each other
(attention's two) costs twice as much again if anything before it learns.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from vlab_jax.models.decoder import BLENDINGS
from vlab_jax.models.video_adapter import MIXERS
from vlab_jax.models.vlab import VLAB, common_blocks


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one layer multiplies: FLOPs with parameters (`weights`) and of activations with each other (`pairs`), and
    the part of the parameter tree that its parameters are in."""

    part: str
    weights: float
    pairs: float = 0.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What a batch asks for.

    Attributes:
      clips: clips in the batch; frames, image_frames: of each, in the video and in the image stream.
      streams: which of `video` and `image` are computed.
      contrasted: texts that the text tower embeds.
      read: texts that the decoder reads, of all objectives; passes: how often it looks at the streams anew for them.
    """

    clips: int
    frames: int
    image_frames: int
    streams: tuple[str, ...]
    contrasted: int
    read: int
    passes: int = 1


def forward_flops(model: VLAB, work: Work) -> float:
    """FLOPs of computing everything that the batch asks for, once."""
    return step_flops(model, work, {})


def step_flops(model: VLAB, work: Work, learns: Mapping[str, bool]) -> float:
    """FLOPs of a training step: the forward pass, and the gradients of what learns.

    Args:
      learns: for each part of the parameter tree (`vision`, `text`, `video_adapter`, `image_encoder`, `decoder`),
        whether any of it learns; a part that is left out does not.
    """
    total, reached = 0.0, {}
    for stream in work.streams:
        layers, before = _tower(model, work, stream), []
        if stream == "image" and "video" in work.streams and model.image_encoder == "shared":
            before, layers = _parted(layers, common_blocks(model.vision, model.adapter))  # the video stream counts it
        cost, reached[stream] = _in_sequence(layers, learns, any(learns.get(layer.part) for layer in before))
        total += cost
    if work.contrasted:
        cost, text_reached = _in_sequence(_text_tower(model, work.contrasted), learns, False)
        pairs = 2.0 * work.clips * work.contrasted * model.text["embed_width"]
        total += cost + pairs * (3 if text_reached or any(reached.values()) else 1)
    return total + (_decoder(model, work, learns, reached) if work.read else 0.0)


def _in_sequence(layers: Iterable[Layer], learns: Mapping[str, bool], reached: bool) -> tuple[float, bool]:
    """FLOPs of layers in a row, and whether a gradient has to flow back to the last one's output.

    `reached` says whether anything before the first one learns.
    """
    total = 0.0
    for layer in layers:
        own = learns.get(layer.part, False)
        total += layer.weights * (1 + own + reached) + layer.pairs * (3 if own or reached else 1)
        reached = reached or own
    return total, reached


def _tower(model: VLAB, work: Work, stream: str) -> list[Layer]:
    """The layers of one stream: CLIP's vision tower, with adapters in the video stream."""
    fields, images = model.vision, work.clips * (work.frames if stream == "video" else work.image_frames)
    part = "image_encoder" if stream == "image" and model.image_encoder == "separate" else "vision"
    patches = (fields["image_size"] // fields["patch_size"]) ** 2
    layers = [Layer(part, 2.0 * images * patches * fields["patch_size"] ** 2 * 3 * fields["width"])]
    block = _block(part, images, patches + 1, fields)
    adapted = model.adapter["blocks"] if stream == "video" else ()
    for number in range(fields["depth"]):
        adapter = [_adapter(model, work, patches)] if number in adapted else []
        layers += [*adapter, block[0], *(adapter if model.adapter["before_mlp"] else []), block[1]]
    return [*layers, Layer(part, 2.0 * images * fields["width"] * fields["embed_width"])]


def _parted(layers: list[Layer], blocks: int) -> tuple[list[Layer], list[Layer]]:
    """A tower's layers, parted before the block of this number; no block before it has an adapter."""
    count = 1 + 2 * blocks
    return layers[:count], layers[count:]


def _block(part: str, rows: int, tokens: int, fields: Mapping[str, Any]) -> tuple[Layer, Layer]:
    """A block's attention and its MLP."""
    width, mlp = fields["width"], fields["mlp_width"]
    products = 3 if fields.get("gated_mlp") else 2
    attention = Layer(part, 8.0 * rows * tokens * width**2, 4.0 * rows * tokens**2 * width)
    return attention, Layer(part, 2.0 * products * rows * tokens * width * mlp)


def _adapter(model: VLAB, work: Work, patches: int) -> Layer:
    mixer = MIXERS[model.adapter["mixer"]]
    tokens = work.clips * work.frames * (patches + mixer.mixes_class_token)
    weights, pairs = mixer.flops(model.adapter, tokens, work.frames)
    down_and_up = 4.0 * tokens * model.vision["width"] * model.adapter["width"]
    return Layer("video_adapter", weights + down_and_up, pairs)


def _text_tower(model: VLAB, texts: int) -> list[Layer]:
    fields = model.text
    block = _block("text", texts, fields["context_length"], fields)
    return [*block * fields["depth"], Layer("text", 2.0 * texts * fields["width"] * fields["embed_width"])]


def _decoder(model: VLAB, work: Work, learns: Mapping[str, bool], reached: Mapping[str, bool]) -> float:
    """FLOPs of the decoder; `reached` says of each stream whether anything behind it learns."""
    fields, vision, length = model.text, model.vision, model.text["context_length"]
    width, every = fields["width"], model.decoder["cross_attention_every"]
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    seen = {
        stream: work.clips * tokens * (work.frames if stream == "video" else work.image_frames)
        for stream in BLENDINGS[model.decoder["blending"]].streams
        if stream in work.streams
    }
    crossings = fields["depth"] // every
    total, beside = 0.0, False
    for stream, rows in seen.items():
        rows *= work.passes
        project = Layer("decoder", 2.0 * rows * vision["width"] * width)
        keys = Layer("decoder", 4.0 * rows * width**2 * crossings)
        cost, flows = _in_sequence([project, keys], learns, reached[stream])
        total, beside = total + cost, beside or flows
    attentions = 1 if BLENDINGS[model.decoder["blending"]].joined else len(seen)
    queries = work.read * length
    pairs = 4.0 * queries * sum(seen.values()) / work.clips * width
    crossing = Layer("decoder", 4.0 * queries * width**2 * attentions, pairs)
    block = _block("decoder", work.read, length, fields)
    layers = []
    for number in range(fields["depth"]):
        crossed = [crossing] if number % every == every - 1 else []
        layers += [block[0], *crossed, block[1]]
    head = Layer("decoder", 2.0 * queries * width * fields["vocab_size"])
    cost, _ = _in_sequence([*layers, head], learns, learns.get("decoder", False) or beside)
    return total + cost
