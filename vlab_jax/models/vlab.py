"""VLAB: CLIP's two towers, the video adapter, the image stream beside the video stream, the multimodal decoder.

Two streams see a clip (He et al., arXiv 2305.13167; the details are a reconstruction):

- the *video stream*: CLIP's vision tower with adapters, over `T` frames;
- the *image stream*: CLIP's vision tower without, over some of the same frames.

Parameters are one tree: `vision`, `text`, `video_adapter`, `image_encoder` (where it is separate), `decoder`,
`logit_scale`. `vision`, `text` and `logit_scale` are a CLIP model, unchanged.

Dimensions: `B` clips or texts, `N` texts of the decoder (several a clip), `T` frames, `M` tokens a frame (class token
first), `D` vision width, `E` joint embedding width, `L` text tokens, `V` vocabulary.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import freeze
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from vlab_jax.models.attention import Kernels
from vlab_jax.models.decoder import MultimodalDecoder
from vlab_jax.models.layers import Insertion, apply_function, stacked_init
from vlab_jax.models.towers import TextTower, VisionTower, normalise_pixels
from vlab_jax.models.video_adapter import VideoAdapter

STREAMS = ("video", "image")
FRAME_POOLINGS = ("mean_then_normalise", "normalise_then_mean")
# Parts of the parameter tree that not every model has.
OPTIONAL_PARTS = ("video_adapter", "image_encoder")
# What the decoder takes from the text tower where it starts from CLIP.
DECODER_FROM_TEXT = ("token_embedding", "position_embedding", "transformer", "ln_final")


class Visual(NamedTuple):
    """What is seen of clips: each stream's tokens `[B, T, M, D]`, and embeddings `[B, E]` of unit length."""

    streams: dict[str, jax.Array]
    embedding: jax.Array


class VLAB(nn.Module):
    """The whole model. Fields are plain values, so that a model depends on nothing but its arguments.

    Attributes:
      vision: fields of `VisionTower`.
      text: fields of `TextTower`.
      decoder: fields of `MultimodalDecoder` beyond those that the text tower gives (its sizes are the text tower's).
      adapter: fields of `VideoAdapter`, and `blocks` (the vision blocks that carry one) and `before_mlp` (whether
        each carries a second one, before its MLP). No blocks: no adapter at all.
      image_encoder: `shared` (the image stream reuses the video stream's CLIP parameters) or `separate` (it has its
        own copy, which stays as it was where an optimiser freezes `image_encoder`).
      embedding_blend: the image stream's weight in the video embedding where both streams are present.
      frame_pooling: how a stream's frame embeddings become one: `mean_then_normalise` averages them as they are, so
        that a frame of a larger norm weighs more; `normalise_then_mean` averages them at unit length, as CLIP4Clip's
        mean pooling does. Where both streams are present, each is averaged by itself, and the two means are then
        blended by their weights (reconstruction). The outcome is of unit length either way.
      frames: the number of frames that temporal positions are learned for.
      remat: what the backward pass recomputes (`none`, `dots`, `full`); unroll: blocks per iteration of the scan.
      dtype: what matrix products are computed in.
      platform, attention: what attention is computed by; see `attention.Kernels`.
    """

    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    decoder: Mapping[str, Any]
    adapter: Mapping[str, Any]
    image_encoder: str = "shared"
    embedding_blend: float = 0.5
    frame_pooling: str = "mean_then_normalise"
    frames: int = 8
    remat: str = "none"
    unroll: int = 1
    dtype: Any = jnp.float32
    platform: str = "cpu"
    attention: str = "auto"

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "VLAB":
        """A model from plain dictionaries, frozen so that it can be hashed (as jit's static arguments are)."""
        return cls(**{key: freeze(value) if isinstance(value, Mapping) else value for key, value in fields.items()})

    def setup(self):
        compute = {"remat": self.remat, "unroll": self.unroll, "dtype": self.dtype, "kernels": self.kernels}
        self.vision_tower = VisionTower(**self.vision, **compute, name="vision")
        self.text_tower = TextTower(**self.text, **compute, name="text")
        if self.image_encoder == "separate":
            self.image_tower = VisionTower(**self.vision, **compute, name="image_encoder")
        shape = {key: value for key, value in self.text.items() if key != "embed_width"}
        self.multimodal_decoder = MultimodalDecoder(
            **shape, **self.decoder, frames=self.frames, **compute, name="decoder"
        )
        self.video_adapter = self._adapters()
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(1 / 0.07)), ())

    @property
    def kernels(self) -> Kernels:
        """What attention is computed by."""
        return Kernels(self.platform, self.attention)

    def _adapters(self) -> tuple[Insertion, ...]:
        fields = dict(self.adapter)
        blocks, before_mlp = tuple(fields.pop("blocks")), fields.pop("before_mlp")
        if not blocks:
            return ()
        module = VideoAdapter(**fields, frames=self.frames, dtype=self.dtype, kernels=self.kernels, parent=None)
        places = ("attention", "mlp") if before_mlp else ("attention",)
        side = self.vision["image_size"] // self.vision["patch_size"]
        example = jnp.zeros((1, self.frames, side * side + 1, self.vision["width"]), self.dtype)
        # Several at once, for which cuDNN's attention takes no lengths; parameters depend on no kernel.
        initialise = stacked_init(module.clone(kernels=Kernels()), len(blocks), example)
        parameters = self.param(
            "video_adapter",
            lambda rng: {
                f"before_{place}": initialise(key)
                for place, key in zip(places, jax.random.split(rng, len(places)), strict=True)
            },
        )
        function = apply_function(module)
        return tuple(Insertion(place, function, parameters[f"before_{place}"], blocks) for place in places)

    def __call__(
        self,
        video: UInt8[Array, "B T S S 3"],
        tokens: Int[Array, "B L"],
        lengths: Int[Array, " B"],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Touches every parameter, for initialisation: clip embeddings, text embeddings, caption logits."""
        every_frame = tuple(range(video.shape[1]))
        visual = self.encode_visual(video, STREAMS, every_frame)
        logits = self.decode(tokens, visual.streams, causal=True)
        return visual.embedding, self.encode_text(tokens, lengths), logits

    def encode_text(self, tokens: Int[Array, "B L"], lengths: Int[Array, " B"]) -> Float[Array, "B E"]:
        """Text embeddings of unit length. `lengths` counts tokens, start and end of text included."""
        return unit_length(self.text_tower(tokens, lengths)[1])

    def encode_visual(
        self,
        video: UInt8[Array, "B T S S 3"],
        streams: tuple[str, ...],
        image_frames: tuple[int, ...],
    ) -> Visual:
        """Tokens of the chosen streams, and the clips' embeddings.

        Args:
          video: RGB frames.
          streams: which of `video` and `image` to compute.
          image_frames: the frames that the image stream takes.
        """
        views = {}
        begun = self._begin(video, self.vision_tower, self._common_blocks) if "video" in streams else None
        if begun is not None:
            views["video"] = self._video_stream(begun)
        if "image" in streams:
            views["image"] = self._image_stream(video, begun, image_frames)
        tokens = {stream: tokens for stream, (tokens, _) in views.items()}
        embeddings = {stream: embeddings for stream, (_, embeddings) in views.items()}
        weights = {"image": self.embedding_blend, "video": 1 - self.embedding_blend}
        means = {stream: _mean_over_frames(embedding, self.frame_pooling) for stream, embedding in embeddings.items()}
        if len(means) == 1:
            (mean,) = means.values()
        else:
            mean = sum(weights[stream] * means[stream] for stream in STREAMS)
        return Visual(tokens, unit_length(mean))

    def encode_frames(self, video: UInt8[Array, "B T S S 3"]) -> tuple[Float[Array, "B T M D"], Float[Array, "B T E"]]:
        """The video stream: tokens and projected pooled tokens, frame by frame, before pooling over time."""
        return self._video_stream(self._begin(video, self.vision_tower, self._common_blocks))

    @property
    def _common_blocks(self) -> int:
        """The vision blocks before the first adapter."""
        return common_blocks(self.vision, self.adapter)

    def _begin(self, video: jax.Array, tower: VisionTower, blocks: int) -> jax.Array:
        """The tokens of all frames that go into the block of this number: `[B, T, M, D]`."""
        x = tower.begin(normalise_pixels(video.reshape(-1, *video.shape[2:])), blocks)
        return x.reshape(*video.shape[:2], *x.shape[1:])

    def _end(self, x: jax.Array, tower: VisionTower, blocks: int, insertions: tuple[Insertion, ...] = ()):
        """Tokens `[B, T, M, D]` and embeddings `[B, T, E]`, from what `_begin` returned."""
        tokens, embeddings = tower.end(x.reshape(-1, *x.shape[2:]), insertions, blocks)
        return tokens.reshape(x.shape), embeddings.reshape(*x.shape[:2], -1)

    def _video_stream(self, begun: jax.Array):
        """The video stream, from the tokens before the first adapter."""
        clips, frames = begun.shape[:2]

        def over_clips(function):
            def inserted(parameters, x, context):
                clip = x.reshape(clips, frames, *x.shape[1:])  # [B, T, M, D]
                return function(parameters, clip).reshape(x.shape)

            return inserted

        insertions = tuple(
            insertion._replace(function=over_clips(insertion.function)) for insertion in self.video_adapter
        )
        return self._end(begun, self.vision_tower, self._common_blocks, insertions)

    def _image_stream(self, video: jax.Array, begun: jax.Array | None, chosen: tuple[int, ...]):
        """The image stream; a shared tower goes on from the tokens that the video stream has begun with, if it has."""
        if self.image_encoder == "shared" and begun is not None:
            return self._end(_frames(begun, chosen), self.vision_tower, self._common_blocks)
        tower = self.image_tower if self.image_encoder == "separate" else self.vision_tower
        return self._end(self._begin(_frames(video, chosen), tower, 0), tower, 0)

    def decode(
        self,
        tokens: Int[Array, "N L"],
        streams: Mapping[str, Float[Array, "B _ _ _"]],
        causal: bool,
        lengths: Int[Array, " N"] | None = None,
        masked: Bool[Array, "N L"] | None = None,
        states: bool = False,
    ) -> Float[Array, "N L _"]:
        """Logits over the vocabulary, or what they are made of; see `MultimodalDecoder`."""
        return self.multimodal_decoder(tokens, streams, causal, lengths, masked, states)


def _mean_over_frames(embeddings: Float[Array, "B T E"], pooling: str) -> Float[Array, "B E"]:
    """The mean of frame embeddings, as `VLAB.frame_pooling` says; it is not of unit length yet."""
    if pooling == "normalise_then_mean":
        embeddings = unit_length(embeddings)
    return embeddings.mean(axis=1)


def _frames(clips: Shaped[Array, "B T ..."], chosen: tuple[int, ...]) -> Shaped[Array, "B _ ..."]:
    """Some frames of each clip. Slices, since the gradient of an index by an array is a scatter."""
    if chosen == tuple(range(clips.shape[1])):
        return clips
    return jnp.stack([clips[:, frame] for frame in chosen], axis=1)


def common_blocks(vision: Mapping[str, Any], adapter: Mapping[str, Any]) -> int:
    """The vision blocks before the first adapter, by the fields of a `VLAB`: what they compute is the same in both
    streams where these share a tower."""
    return min(adapter["blocks"], default=vision["depth"])


def decoder_of(model: VLAB) -> MultimodalDecoder:
    """The model's decoder as a module of its own, which takes the parameters of the model's part `decoder`."""
    shape = {key: value for key, value in model.text.items() if key != "embed_width"}
    compute = {"remat": "none", "unroll": model.unroll, "dtype": model.dtype, "kernels": model.kernels}
    return MultimodalDecoder(**shape, **model.decoder, frames=model.frames, **compute, parent=None)


def unit_length(x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """Divides each vector by its Euclidean norm."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))


def start_from_clip(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Copies CLIP into the parts that start from it, where they have the same shape.

    The decoder takes the text tower's embeddings, blocks and final norm; a separate image encoder takes the vision
    tower. Cross-attentions and adapters keep what they have.
    """
    copied = dict(parameters)
    copies = {name: jax.tree.map(jnp.copy, parameters["text"][name]) for name in DECODER_FROM_TEXT}
    copied["decoder"] = {**parameters["decoder"], **copies}
    if "image_encoder" in parameters:
        copied["image_encoder"] = jax.tree.map(jnp.copy, parameters["vision"])
    return copied


def copied_from_clip(path: str) -> str | None:
    """The path of the parameter that `start_from_clip` copies to the one at `path`, if it does."""
    part, _, rest = path.partition("/")
    if part == "image_encoder":
        return f"vision/{rest}"
    return f"text/{rest}" if part == "decoder" and rest.split("/")[0] in DECODER_FROM_TEXT else None


def example_inputs(model: VLAB, frames: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inputs of the shapes that initialisation takes: one clip `[1, T, S, S, 3]`, one text `[1, L]`, its length."""
    size, length = model.vision["image_size"], model.text["context_length"]
    return (
        jnp.zeros((1, frames, size, size, 3), jnp.uint8),
        jnp.zeros((1, length), jnp.int32),
        jnp.full((1,), 2, jnp.int32),
    )


@functools.lru_cache(maxsize=8)
def parameter_shapes(model: VLAB, frames: int) -> Any:
    """The parameter tree as shapes and dtypes, without computing anything; not to be changed, since it is kept."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *example_inputs(model, frames)))["params"]
