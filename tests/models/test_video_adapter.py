"""The video adapter starts as the identity, mixes over time as its two mixers say, and takes any number of frames."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import (
    FRAMES,
    PATCHES,
    SIZE,
    VISION,
    WIDTH,
    encode_frames,
    largest_difference,
    quick_jit,
    random_like,
    random_video,
    random_vision_parameters,
    tiny_vlab,
)

from vlab_jax.models.layers import interpolate_positions
from vlab_jax.models.towers import VisionTower, normalise_pixels
from vlab_jax.models.video_adapter import VideoAdapter

INNER = 8  # the adapter's width


def adapter_and_parameters(frames: int = FRAMES, patches: int = PATCHES, **fields):
    """An adapter and random parameters, none of them zero."""
    module = VideoAdapter(width=INNER, frames=frames, **fields)
    example = jnp.zeros((1, frames, patches + 1, WIDTH))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), example))["params"]
    return module, random_like(shapes)


def random_tokens(clips: int, frames: int = FRAMES, patches: int = PATCHES) -> jax.Array:
    """Tokens `[B, T, M, D]`."""
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(clips, frames, patches + 1, WIDTH)), jnp.float32)


def frame_encoder(model, jit=quick_jit):
    """The function (parameters, video) → the video stream's tokens and embeddings."""
    return jit(lambda parameters, video: model.apply({"params": parameters}, video, method=encode_frames))


@pytest.fixture(scope="module")
def plain_clip():
    """CLIP's weights, two clips, and what the plain tower makes of their frames."""
    parameters = random_vision_parameters(tiny_vlab(adapter={"blocks": ()}))
    video = random_video(2)
    assert set(parameters) == {"vision", "logit_scale"}
    tower = VisionTower(**VISION)

    def run(vision, video):
        images = normalise_pixels(video.reshape(-1, SIZE, SIZE, 3))
        return tower.apply({"params": vision}, images)

    tokens, embeddings = jax.jit(run)(parameters["vision"], video)
    return parameters, video, tokens.reshape(2, FRAMES, *tokens.shape[1:]), embeddings.reshape(2, FRAMES, -1)


def initial_adapter(model, video):
    """What `VLAB` initialises its adapters to; all else is cut from the compiled program."""
    key = jax.random.key(0, impl="rbg")
    return quick_jit(lambda: model.init(key, video, method=encode_frames)["params"]["video_adapter"])()


@pytest.mark.parametrize(
    "fields",
    [
        {"mixer": "conv"},
        {"mixer": "conv", "kernel": (3, 3, 3), "before_mlp": True, "blocks": (1,)},
        {"mixer": "attention", "before_mlp": True, "blocks": (0,)},
    ],
    ids=["conv", "conv-before-mlp-partial", "attention-before-mlp-partial"],
)
def test_at_initialisation_the_video_encoder_is_clip_to_the_bit(plain_clip, fields):
    parameters, video, tokens, embeddings = plain_clip
    model = tiny_vlab(adapter=fields)
    adapter = initial_adapter(model, video)
    places = {"before_attention", "before_mlp"} if fields.get("before_mlp") else {"before_attention"}
    assert set(adapter) == places
    assert all(part["up"]["kernel"].shape[0] == len(fields.get("blocks", (0, 1))) for part in adapter.values())
    assert all(np.abs(part["down"]["kernel"]).max() > 0 for part in adapter.values())
    encode = frame_encoder(model, jax.jit)
    ours = encode({**parameters, "video_adapter": adapter}, video)
    assert np.array_equal(ours[0], tokens)
    assert np.array_equal(ours[1], embeddings)
    changed = encode({**parameters, "video_adapter": random_like(adapter)}, video)
    assert largest_difference(changed[1], embeddings) > 1e-3


def test_an_adapter_in_the_last_block_is_one_in_every_block_that_does_nothing_before():
    model = tiny_vlab(adapter={"blocks": (1,)})
    parameters, video = random_vision_parameters(model), random_video(1)
    silent = jax.tree.map(jnp.zeros_like, parameters["video_adapter"])
    everywhere = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), silent, parameters["video_adapter"])
    encode = frame_encoder(model)
    last, _ = encode(parameters, video)
    expected, _ = frame_encoder(tiny_vlab())({**parameters, "video_adapter": everywhere}, video)
    assert largest_difference(last, expected) < 1e-5
    assert largest_difference(last, encode({**parameters, "video_adapter": silent}, video)[0]) > 1e-2


def test_the_class_token_passes_by_the_convolution():
    module, parameters = adapter_and_parameters()
    x = random_tokens(2)
    run = quick_jit(module.apply)
    y = run({"params": parameters}, x)
    assert np.array_equal(y[:, :, 0], x[:, :, 0])
    assert np.abs(y[:, :, 1:] - x[:, :, 1:]).max() > 0.1
    other_class_token = run({"params": parameters}, x.at[:, :, 0].add(5.0))
    assert np.array_equal(y[:, :, 1:], other_class_token[:, :, 1:])


@pytest.mark.parametrize("kernel", [(3, 1, 1), (5, 1, 1), (3, 3, 3), (1, 3, 5)])
def test_the_convolution_is_a_depthwise_one_over_frames_rows_and_columns(kernel):
    """The reference is XLA's own convolution with one group a channel and zeros around the clip."""
    clips, frames, side = 2, 5, 3
    module, parameters = adapter_and_parameters(frames, side * side, kernel=kernel, activation="none")
    x = random_tokens(clips, frames, side * side)
    assert parameters["conv_kernel"].shape == (*kernel, INNER)
    down, up = parameters["down"], parameters["up"]
    inner = x[:, :, 1:] @ down["kernel"] + down["bias"]
    mixed = jax.lax.conv_general_dilated(
        inner.reshape(clips, frames, side, side, INNER),
        parameters["conv_kernel"].reshape(*kernel, 1, INNER),
        window_strides=(1, 1, 1),
        padding="SAME",
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        feature_group_count=INNER,
    )
    mixed = mixed.reshape(clips, frames, side * side, INNER) + parameters["conv_bias"]
    expected = x[:, :, 1:] + mixed @ up["kernel"] + up["bias"]
    ours = quick_jit(module.apply)({"params": parameters}, x)[:, :, 1:]
    assert largest_difference(ours, expected) < 1e-5
    assert largest_difference(ours, x[:, :, 1:]) > 0.1


def attention_in_numpy(x: np.ndarray, parameters, heads: int) -> np.ndarray:
    """The attention mixer written out, in float64, one token position after the other."""
    parameters = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), parameters)
    y = x.astype(np.float64) @ parameters["down"]["kernel"] + parameters["down"]["bias"]
    y = y + parameters["frame_position"][:, None]  # [B, T, M, A]
    mixed = np.zeros_like(y)
    width = INNER // heads
    for clip, token, head in np.ndindex(x.shape[0], x.shape[2], heads):
        query, key, value = (
            y[clip, :, token] @ parameters["qkv"]["kernel"][:, part, head] + parameters["qkv"]["bias"][part, head]
            for part in range(3)
        )
        weights = np.exp(query @ key.T / np.sqrt(width))  # [T, T]
        weights /= weights.sum(axis=1, keepdims=True)
        mixed[clip, :, token, head * width : (head + 1) * width] = weights @ value
    mixed = mixed / (1 + np.exp(-1.702 * mixed))
    return x + mixed @ parameters["up"]["kernel"] + parameters["up"]["bias"]


def test_the_attention_attends_over_the_frames_of_the_same_token():
    module, parameters = adapter_and_parameters(mixer="attention", heads=2, activation="quick_gelu")
    x = random_tokens(2)
    expected = attention_in_numpy(np.asarray(x), parameters, heads=2)
    ours = quick_jit(module.apply)({"params": parameters}, x)
    assert largest_difference(ours, expected) < 1e-5
    assert largest_difference(ours, x) > 0.1


def embeddings_of_both_orders(model) -> tuple[jax.Array, jax.Array]:
    """The clip embeddings of two clips, and of the same clips with their frames permuted.

    They have more frames than positions were learned for.
    """
    order = jnp.array([2, 0, 3, 6, 1, 4, 5])
    assert len(order) > model.frames
    video = random_video(2, frames=len(order))
    both = jnp.concatenate([video, video[:, order]])
    tokens, embeddings = frame_encoder(model)(random_vision_parameters(model), both)
    assert tokens.shape == (4, len(order), PATCHES + 1, WIDTH)
    means = embeddings.mean(axis=1)
    return means[:2], means[2:]


@pytest.mark.parametrize("mixer", ["conv", "attention"])
def test_adapters_see_the_order_of_frames(mixer):
    ordered, permuted = embeddings_of_both_orders(tiny_vlab(adapter={"mixer": mixer}))
    assert largest_difference(ordered, permuted) > 1e-3


def test_without_adapters_the_order_of_frames_is_lost():
    ordered, permuted = embeddings_of_both_orders(tiny_vlab(adapter={"blocks": ()}))
    assert largest_difference(ordered, permuted) < 1e-5
    assert largest_difference(ordered[0], ordered[1]) > 1e-3


@pytest.mark.parametrize("frames", [1, 3, 8, 13])
@pytest.mark.parametrize("mixer", ["conv", "attention"])
def test_any_number_of_frames_works_at_apply_time(mixer, frames):
    module, parameters = adapter_and_parameters(frames=8, mixer=mixer, heads=2)
    x = random_tokens(1, frames)
    y = quick_jit(module.apply)({"params": parameters}, x)
    assert y.shape == x.shape
    assert np.isfinite(y).all()
    assert np.abs(y - x).max() > 0.1


def test_temporal_positions_are_interpolated_between_the_learned_ones():
    """Positions that rise evenly with time still do so for another number of frames."""
    positions = jnp.arange(8.0)[:, None] * jnp.array([1.0, -2.0])
    doubled = np.asarray(interpolate_positions(positions, 16))
    assert np.array_equal(interpolate_positions(positions, 8), positions)
    assert largest_difference(doubled[1:-1, 0], np.arange(1, 15) / 2 - 0.25) < 1e-5
    assert largest_difference(doubled[:, 1], -2 * doubled[:, 0]) < 1e-5
