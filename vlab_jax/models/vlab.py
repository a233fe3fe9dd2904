"""VLAB: CLIP's two towers, the video adapter, a video and an image stream, and the multimodal decoder.

Two streams encode a clip (a reconstruction from the abstract of He et al., arXiv 2305.13167): the *video stream* is
CLIP's vision tower with adapters, over `T` frames; the *image stream* is one without, over some of the same frames.
Parameters are one tree: `vision`, `text`, `video_adapter`, `image_encoder` (where it is separate), `decoder`,
`logit_scale`. `vision`, `text` and `logit_scale` are an unchanged CLIP model.

Dimensions: `B` clips or texts, `N` texts of the decoder (several per clip), `T` frames of `S × S` pixels, `M` tokens
per frame (class token first), `D` vision width, `E` joint embedding width, `L` text tokens.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import freeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, Shaped, UInt8

from vlab_jax.models.attention import Kernels
from vlab_jax.models.decoder import MultimodalDecoder
from vlab_jax.models.layers import Insertion, stacked_init
from vlab_jax.models.towers import TextTower, VisionTower, normalise_pixels
from vlab_jax.models.video_adapter import VideoAdapter

STREAMS = ("video", "image")
FRAME_POOLINGS = ("mean_then_normalise", "normalise_then_mean")
# Parts of the parameter tree that some models do not have.
OPTIONAL_PARTS = ("video_adapter", "image_encoder")
# The parameters that `start_from_clip` copies from the text tower to the decoder.
DECODER_FROM_TEXT = ("token_embedding", "position_embedding", "transformer", "ln_final")


class VisualFeatures(NamedTuple):
    """Features of clips: the tokens of each stream `[B, T, M, D]`, and embeddings `[B, E]` of unit length."""

    streams: dict[str, jax.Array]
    embedding: jax.Array


class VLAB(nn.Module):
    """The whole model. Fields are plain values, so that a model is determined by its arguments.

    Attributes:
      vision: fields of `VisionTower`.
      text: fields of `TextTower`.
      decoder: fields of `MultimodalDecoder` that the text tower does not have (its sizes are the text tower's).
      adapter: fields of `VideoAdapter`, `blocks` (the vision blocks with an adapter, if any) and `before_mlp` (whether
        each of them has a second one, before its MLP).
      image_encoder: `shared` (the image stream uses the video stream's CLIP parameters) or `separate` (its own copy).
      embedding_blend: the image stream's weight in the clip embedding where both streams are present.
      frame_pooling: how a stream's frame embeddings become one: `mean_then_normalise` averages them unnormalised, so
        that a frame of a larger norm weighs more; `normalise_then_mean` averages them at unit length, as CLIP4Clip's
        mean pooling does. Each stream is averaged separately, and the two means are blended by their weights
        (reconstruction).
      frames: the number of frames that temporal positions are learned for.
      remat, unroll, dtype: see `TransformerModule`; platform, attention: see `Kernels`.
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
        """A model from plain dictionaries, frozen so that it can be hashed (as a static argument of `jit`)."""
        return cls(**{key: freeze(value) if isinstance(value, Mapping) else value for key, value in fields.items()})

    def setup(self):
        compute = {"remat": self.remat, "unroll": self.unroll, "dtype": self.dtype, "kernels": self.kernels}
        self.vision_tower = VisionTower(**self.vision, **compute, name="vision")
        self.text_tower = TextTower(**self.text, **compute, name="text")
        if self.image_encoder == "separate":
            self.image_tower = VisionTower(**self.vision, **compute, name="image_encoder")
        self.multimodal_decoder = MultimodalDecoder(**self._decoder_fields(), **compute, name="decoder")
        self.video_adapter = self.param("video_adapter", self._init_adapters) if self.adapter["blocks"] else {}
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(1 / 0.07)), ())

    @property
    def kernels(self) -> Kernels:
        """`platform` and `attention`."""
        return Kernels(self.platform, self.attention)

    @property
    def common_blocks(self) -> int:
        """The number of vision blocks before the first adapter: streams that share a tower compute them once."""
        return min(self.adapter["blocks"], default=self.vision["depth"])

    @property
    def tokens_per_frame(self) -> int:
        """`M`."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2 + 1

    def standalone_decoder(self) -> MultimodalDecoder:
        """The decoder as a module of its own, which takes the parameters of the model's part `decoder`."""
        compute = {"unroll": self.unroll, "dtype": self.dtype, "kernels": self.kernels}
        return MultimodalDecoder(**self._decoder_fields(), **compute, parent=None)

    def _decoder_fields(self) -> dict[str, Any]:
        sizes = {key: value for key, value in self.text.items() if key != "embed_width"}
        return {**sizes, **self.decoder, "frames": self.frames}

    def _adapter(self) -> VideoAdapter:
        fields = {key: value for key, value in self.adapter.items() if key not in ("blocks", "before_mlp")}
        return VideoAdapter(**fields, frames=self.frames, dtype=self.dtype, kernels=self.kernels, parent=None)

    def _init_adapters(self, rng: jax.Array) -> dict[str, Any]:
        """The parameters of the adapters by their place, stacked over blocks."""
        places = ("before_attention", "before_mlp")[: 1 + self.adapter["before_mlp"]]
        example = jnp.zeros((1, self.frames, self.tokens_per_frame, self.vision["width"]), self.dtype)
        # Under `vmap`, cuDNN's attention refuses lengths; the parameters do not depend on the kernels.
        module = self._adapter().clone(kernels=Kernels())
        initialise = stacked_init(module, len(self.adapter["blocks"]), example)
        return {place: initialise(key) for place, key in zip(places, jax.random.split(rng, len(places)), strict=True)}

    def __call__(
        self, video: UInt8[Array, "B T S S 3"], tokens: Int[Array, "B L"], lengths: Int[Array, " B"]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Clip embeddings, text embeddings and caption logits: every parameter is used, for initialisation."""
        visual = self.encode_visual(video, STREAMS, tuple(range(video.shape[1])))
        logits = self.decode(tokens, visual.streams, causal=True)
        return visual.embedding, self.encode_text(tokens, lengths), logits

    def encode_text(self, tokens: Int[Array, "B L"], lengths: Int[Array, " B"]) -> Float[Array, "B E"]:
        """Text embeddings of unit length; `lengths` counts tokens, start and end of text included."""
        return unit_length(self.text_tower(tokens, lengths)[1])

    def encode_visual(
        self, video: UInt8[Array, "B T S S 3"], streams: tuple[str, ...], image_frames: tuple[int, ...]
    ) -> VisualFeatures:
        """Tokens of the chosen streams, and embeddings of the clips.

        Args:
          video: RGB frames.
          streams: which of `video` and `image` to compute.
          image_frames: the indices of the image stream's frames.
        """
        encoded, prefix = {}, None
        if "video" in streams:
            prefix = self._run_until(video, self.vision_tower, self.common_blocks)
            encoded["video"] = self._video_stream(prefix)
        if "image" in streams:
            encoded["image"] = self._image_stream(video, prefix, image_frames)
        weights = {"image": self.embedding_blend, "video": 1 - self.embedding_blend}
        means = {name: self._mean_over_frames(embeddings) for name, (_, embeddings) in encoded.items()}
        if len(means) == 1:
            (mean,) = means.values()
        else:
            mean = sum(weights[stream] * means[stream] for stream in STREAMS)
        return VisualFeatures({name: tokens for name, (tokens, _) in encoded.items()}, unit_length(mean))

    def _mean_over_frames(self, embeddings: Float[Array, "B T E"]) -> Float[Array, "B E"]:
        if self.frame_pooling == "normalise_then_mean":
            embeddings = unit_length(embeddings)
        return embeddings.mean(axis=1)

    def _run_until(self, video: jax.Array, tower: VisionTower, block: int) -> jax.Array:
        """The input tokens of a block, `[B, T, M, D]`."""
        x = tower.run_until(normalise_pixels(video.reshape(-1, *video.shape[2:])), block)
        return x.reshape(*video.shape[:2], *x.shape[1:])

    def _run_from(self, x: jax.Array, tower: VisionTower, block: int, insertions: tuple[Insertion, ...] = ()):
        """Tokens `[B, T, M, D]` and embeddings `[B, T, E]`, from the input tokens of a block."""
        tokens, embeddings = tower.run_from(x.reshape(-1, *x.shape[2:]), insertions, block)
        return tokens.reshape(x.shape), embeddings.reshape(*x.shape[:2], -1)

    def _video_stream(self, prefix: jax.Array):
        """The video stream, from the input tokens of the first block with an adapter."""
        blocks = tuple(self.adapter["blocks"])
        adapter = self._adapter() if blocks else None

        def adapt(parameters: Any, x: jax.Array) -> jax.Array:
            clips = x.reshape(*prefix.shape[:2], *x.shape[1:])  # [B, T, M, D]
            return adapter.apply({"params": parameters}, clips).reshape(x.shape)

        insertions = tuple(
            Insertion(place.removeprefix("before_"), adapt, parameters, blocks)
            for place, parameters in self.video_adapter.items()
        )
        return self._run_from(prefix, self.vision_tower, self.common_blocks, insertions)

    def _image_stream(self, video: jax.Array, prefix: jax.Array | None, frames: tuple[int, ...]):
        """The image stream; a shared tower continues from the tokens `prefix` of the video stream, if there are any."""
        if self.image_encoder == "shared" and prefix is not None:
            return self._run_from(_select_frames(prefix, frames), self.vision_tower, self.common_blocks)
        tower = self.image_tower if self.image_encoder == "separate" else self.vision_tower
        return self._run_from(self._run_until(_select_frames(video, frames), tower, 0), tower, 0)

    def decode(self, tokens: Int[Array, "N L"], *arguments: Any, **options: Any) -> Float[Array, "N L _"]:
        """Logits over the vocabulary, or the states before them; see `MultimodalDecoder.__call__`."""
        return self.multimodal_decoder(tokens, *arguments, **options)


def _select_frames(clips: Shaped[Array, "B T ..."], frames: tuple[int, ...]) -> Shaped[Array, "B _ ..."]:
    """Some frames of each clip, by slices: the gradient of indexing by an array would be a scatter."""
    if frames == tuple(range(clips.shape[1])):
        return clips
    return jnp.stack([clips[:, frame] for frame in frames], axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def embed_clips(
    model: VLAB,
    streams: tuple[str, ...],
    image_frames: tuple[int, ...],
    parameters: Any,
    video: UInt8[Array, "B T S S 3"],
) -> Float[Array, "B E"]:
    """Embeddings of clips, compiled once per shape; see `VLAB.encode_visual`."""
    return model.apply({"params": parameters}, video, streams, image_frames, method="encode_visual").embedding


@functools.partial(jax.jit, static_argnums=0)
def embed_texts(
    model: VLAB, parameters: Any, tokens: Int[Array, "B L"], lengths: Int[Array, " B"]
) -> Float[Array, "B E"]:
    """Embeddings of texts, compiled once per shape; see `VLAB.encode_text`."""
    return model.apply({"params": parameters}, tokens, lengths, method="encode_text")


def unit_length(x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """Divides each vector by its Euclidean norm."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))


def copied_from_clip(path: str) -> str | None:
    """The path of the CLIP parameter that the parameter at `path` can start as a copy of; None: there is none.

    The decoder starts as the text tower's embeddings, blocks and final norm, a separate image encoder as the vision
    tower.
    """
    part, _, rest = path.partition("/")
    if part == "image_encoder":
        return f"vision/{rest}"
    return f"text/{rest}" if part == "decoder" and rest.split("/")[0] in DECODER_FROM_TEXT else None


def start_from_clip(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Copies CLIP's parameters to the parts of the same shape, as `copied_from_clip` says."""
    leaves = flatten_dict(parameters, sep="/")
    sources = {path: copied_from_clip(path) for path in leaves}
    copied = {path: jnp.copy(leaves[source]) for path, source in sources.items() if source}
    return unflatten_dict({**leaves, **copied}, sep="/")


def example_inputs(model: VLAB, frames: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inputs for initialisation: one clip `[1, T, S, S, 3]`, one text `[1, L]`, and its length."""
    size, length = model.vision["image_size"], model.text["context_length"]
    return (
        jnp.zeros((1, frames, size, size, 3), jnp.uint8),
        jnp.zeros((1, length), jnp.int32),
        jnp.full((1,), 2, jnp.int32),
    )


@functools.lru_cache(maxsize=8)
def parameter_shapes(model: VLAB, frames: int) -> Any:
    """The parameter tree as shapes and dtypes, without computing anything. It is cached: do not change it."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *example_inputs(model, frames)))["params"]
