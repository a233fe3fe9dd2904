"""The whole model: its two streams, their blend, and settings that must not change its outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    EMBED,
    FRAMES,
    LENGTH,
    PATCHES,
    VOCABULARY,
    WIDTH,
    encode_frames,
    largest_difference,
    quick_jit,
    random_batch,
    random_like,
    random_parameters,
    random_video,
    tiny_vlab,
)

from vlab_jax.models.layers import Insertion, Transformer, TransformerConfig
from vlab_jax.models.vlab import STREAMS, VLAB, example_inputs, parameter_shapes, start_from_clip, unit_length

NOTICEABLE, NEGLIGIBLE = 1e-3, 1e-5
IMAGE_FRAMES = (0, 2)


def visual_encoder(model):
    """The function (parameters, video) → features of the video stream, the image stream, and both together."""

    def run(parameters, video):
        def encode(*streams):
            return model.apply({"params": parameters}, video, streams, IMAGE_FRAMES, method="encode_visual")

        return {"video": encode("video"), "image": encode("image"), "both": encode("video", "image")}

    return quick_jit(run)


@pytest.fixture(scope="module", params=["shared", "separate"])
def encoded(request):
    """The kind of image encoder, parameters, two clips, the compiled encoder and its output.

    The shared one's blend is of weight 0, the separate one's of weight 1.
    """
    model = tiny_vlab(image_encoder=request.param, embedding_blend=float(request.param == "separate"))
    parameters, video, encode = random_parameters(model), random_video(2), visual_encoder(model)
    return request.param, parameters, video, encode, encode(parameters, video)


def test_a_stream_has_a_token_for_each_patch_and_class_of_its_frames(encoded):
    *_, views = encoded
    assert set(views["both"].streams) == set(STREAMS)
    assert set(views["video"].streams) == {"video"}
    assert views["both"].streams["video"].shape == (2, FRAMES, PATCHES + 1, WIDTH)
    assert views["both"].streams["image"].shape == (2, len(IMAGE_FRAMES), PATCHES + 1, WIDTH)
    assert views["both"].embedding.shape == (2, EMBED)


def test_clip_embeddings_have_unit_length(encoded):
    *_, views = encoded
    for view in views.values():
        assert largest_difference(jnp.linalg.norm(view.embedding, axis=-1), np.ones(2)) < NEGLIGIBLE


def test_only_a_separate_image_encoder_has_parameters_of_its_own(encoded):
    kind, parameters, *_ = encoded
    assert ("image_encoder" in parameters) == (kind == "separate")
    if kind == "separate":
        shapes = [jax.tree.map(jnp.shape, parameters[part]) for part in ("image_encoder", "vision")]
        assert shapes[0] == shapes[1]


def test_a_separate_image_stream_survives_a_change_of_the_vision_tower(encoded):
    kind, parameters, video, encode, views = encoded
    other = encode({**parameters, "vision": random_like(parameters["vision"], seed=5)}, video)
    assert largest_difference(other["video"].embedding, views["video"].embedding) > NOTICEABLE
    difference = largest_difference(other["image"].streams["image"], views["image"].streams["image"])
    assert difference == 0 if kind == "separate" else difference > NOTICEABLE


def test_the_image_stream_has_no_adapters(encoded):
    _, parameters, video, encode, views = encoded
    other = encode({**parameters, "video_adapter": random_like(parameters["video_adapter"], seed=5)}, video)
    assert largest_difference(other["video"].embedding, views["video"].embedding) > NOTICEABLE
    assert np.array_equal(other["image"].embedding, views["image"].embedding)


def test_only_its_own_frames_influence_the_image_stream(encoded):
    _, parameters, video, encode, views = encoded
    others = jnp.array([frame for frame in range(FRAMES) if frame not in IMAGE_FRAMES])
    changed = encode(parameters, video.at[:, others].add(100))
    assert np.array_equal(changed["image"].streams["image"], views["image"].streams["image"])
    assert largest_difference(changed["video"].embedding, views["video"].embedding) > NOTICEABLE
    changed = encode(parameters, video.at[:, IMAGE_FRAMES[1]].add(100))["image"].streams["image"]
    assert np.array_equal(changed[:, 0], views["image"].streams["image"][:, 0])
    assert largest_difference(changed[:, 1], views["image"].streams["image"][:, 1]) > NOTICEABLE


@pytest.mark.parametrize("blocks", [(), (1,)], ids=["no adapter", "adapter in the second block"])
def test_streams_that_share_blocks_equal_those_computed_alone(blocks):
    model = tiny_vlab(adapter={"blocks": blocks})
    parameters, video = random_parameters(model), random_video(2)
    views = visual_encoder(model)(parameters, video)
    for stream in STREAMS:
        assert largest_difference(views["both"].streams[stream], views[stream].streams[stream]) < 1e-6
    video_tokens = views["both"].streams["video"][:, jnp.array(IMAGE_FRAMES)]
    assert (largest_difference(views["both"].streams["image"], video_tokens) < 1e-6) == (blocks == ())


def test_the_gradient_flows_through_both_streams_into_the_blocks_that_they_share():
    """The gradient of a sum over both streams is the sum of the gradients of each stream computed alone."""
    model = tiny_vlab(adapter={"blocks": (1,)})
    parameters, video = random_parameters(model), random_video(2)

    def total(parameters, *streams):
        visual = model.apply({"params": parameters}, video, streams, IMAGE_FRAMES, method="encode_visual")
        return sum(jnp.sin(tokens).sum() for tokens in visual.streams.values())

    def gradients(parameters):
        gradient = jax.grad(total)
        alone = jax.tree.map(jnp.add, gradient(parameters, "video"), gradient(parameters, "image"))
        return gradient(parameters, "video", "image"), alone

    together, alone = (found["vision"] for found in quick_jit(gradients)(parameters))
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert np.abs(together["patch_embedding"]["kernel"]).max() > NOTICEABLE


def test_a_blend_of_0_is_the_video_stream_and_of_1_the_image_stream(encoded):
    kind, *_, views = encoded
    alone, other = ("video", "image") if kind == "shared" else ("image", "video")
    assert largest_difference(views["both"].embedding, views[alone].embedding) < 1e-6
    assert largest_difference(views["both"].embedding, views[other].embedding) > NOTICEABLE


@pytest.mark.parametrize("pooling", ["mean_then_normalise", "normalise_then_mean"])
def test_frames_are_averaged_as_they_are_or_at_unit_length_and_then_the_streams_are_blended(pooling):
    model = tiny_vlab(image_encoder="separate", embedding_blend=0.3, frame_pooling=pooling)
    parameters, video = random_parameters(model), random_video(2)

    def run(parameters, video):
        views = [
            model.apply({"params": parameters}, video, STREAMS[:n], IMAGE_FRAMES, method="encode_visual")
            for n in (1, 2)
        ]
        _, frames = model.apply({"params": parameters}, video, method=encode_frames)
        images = model.clone(image_encoder="shared", adapter={**model.adapter, "blocks": ()})
        alone = {**parameters, "vision": parameters["image_encoder"]}
        _, stills = images.apply({"params": alone}, video[:, jnp.array(IMAGE_FRAMES)], method=encode_frames)
        return [view.embedding for view in views], frames, stills

    (video_alone, both), *embedded = quick_jit(run)(parameters, video)
    if pooling == "normalise_then_mean":
        embedded = [unit_length(frames) for frames in embedded]
    moving, still = (frames.mean(axis=1) for frames in embedded)
    assert largest_difference(video_alone, unit_length(moving)) < 1e-6
    assert largest_difference(both, unit_length(0.7 * moving + 0.3 * still)) < 1e-6


@pytest.mark.parametrize(
    ("pooling", "expected"), [("mean_then_normalise", (0.0995, 0.9950)), ("normalise_then_mean", (0.7071, 0.7071))]
)
def test_a_frame_s_norm_weighs_only_where_frames_are_averaged_as_they_are(pooling, expected):
    frames = jnp.array([[[1.0, 0.0], [0.0, 10.0]]])
    means = tiny_vlab(frame_pooling=pooling)._mean_over_frames(frames)
    np.testing.assert_allclose(unit_length(means)[0], expected, atol=1e-3)


@given(st.integers(0, 2**31), st.floats(1e-4, 1e4))
@settings(max_examples=25, deadline=None)
def test_unit_length_divides_by_the_norm(seed, scale):
    x = scale * np.random.default_rng(seed).normal(size=(3, 5))
    expected = x / np.linalg.norm(x, axis=-1, keepdims=True)
    assert largest_difference(unit_length(jnp.asarray(x, jnp.float32)), expected) < NEGLIGIBLE


def test_the_unit_length_of_zero_is_finite_and_so_is_its_gradient():
    gradient = jax.grad(lambda x: unit_length(x).sum())(jnp.zeros((1, 4)))
    assert np.isfinite(unit_length(jnp.zeros((1, 4)))).all()
    assert np.isfinite(gradient).all()


def test_a_model_without_an_image_encoder_starts_from_clip_too():
    parameters = random_parameters(tiny_vlab(adapter={"blocks": ()}))
    started = start_from_clip(parameters)
    assert set(started) == set(parameters)
    assert np.array_equal(started["decoder"]["token_embedding"], parameters["text"]["token_embedding"])


def test_starting_from_clip_copies_the_towers_and_leaves_the_rest():
    parameters = random_parameters(tiny_vlab(image_encoder="separate"))
    started = start_from_clip(parameters)

    def same(one, other):
        return jax.tree.all(jax.tree.map(np.array_equal, one, other))

    assert not same(parameters["image_encoder"], parameters["vision"])
    assert same(started["image_encoder"], parameters["vision"])
    for part in ("token_embedding", "position_embedding", "transformer", "ln_final"):
        assert not same(parameters["decoder"][part], parameters["text"][part])
        assert same(started["decoder"][part], parameters["text"][part])
    for part in ("cross_attention", "mask_embedding", "video_projection", "image_type"):
        assert same(started["decoder"][part], parameters["decoder"][part])
    for part in ("vision", "text", "video_adapter", "logit_scale"):
        assert same(started[part], parameters[part])
    assert jax.tree.structure(started) == jax.tree.structure(parameters)


def test_what_starts_from_clip_shares_no_buffer_and_can_be_donated():
    started = start_from_clip(random_parameters(tiny_vlab(image_encoder="separate")))
    leaves = jax.tree.leaves(started)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
    expected = np.asarray(started["text"]["token_embedding"]) + 1
    donated = quick_jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(started)
    assert np.array_equal(donated["decoder"]["token_embedding"], expected)
    assert leaves[0].is_deleted()


@pytest.fixture(scope="module")
def reference_transformer():
    """Inputs of a three-block transformer with an insertion in two of them, and its output and gradients."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, WIDTH)), jnp.float32)
    inserted = jnp.asarray(rng.normal(0, 0.3, (2, WIDTH, WIDTH)), jnp.float32)
    module = Transformer(TransformerConfig(depth=3, heads=2, mlp_width=32))
    parameters = random_like(jax.eval_shape(lambda: module.init(jax.random.key(0), x))["params"])
    return (parameters, inserted, x), outputs_and_gradients((parameters, inserted, x), "none", 1)


def outputs_and_gradients(inputs, remat: str, unroll: int):
    """A causal transformer's output, and the gradients of a loss in its parameters and its input."""

    def loss(parameters, inserted, x):
        insertion = Insertion("mlp", lambda kernel, x: x + jnp.tanh(x @ kernel), inserted, (0, 2))
        module = Transformer(TransformerConfig(depth=3, heads=2, mlp_width=32, remat=remat, unroll=unroll))
        y, _ = module.apply({"params": parameters}, x, causal=True, insertions=(insertion,))
        return jnp.sin(y).mean(), y

    return quick_jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)


@pytest.mark.parametrize(("remat", "unroll"), [("none", 3), ("dots", 2), ("full", 1)])
def test_neither_recomputation_nor_unrolling_changes_outputs_or_gradients(reference_transformer, remat, unroll):
    inputs, (expected_gradients, expected) = reference_transformer
    gradients, output = outputs_and_gradients(inputs, remat, unroll)
    assert largest_difference(output, expected) < NEGLIGIBLE
    differences = jax.tree.map(largest_difference, gradients, expected_gradients)
    assert max(jax.tree.leaves(differences)) < NEGLIGIBLE
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) > 0


@pytest.mark.parametrize(("remat", "expected"), [("none", 0), ("full", 4)])
def test_remat_applies_to_all_towers(remat, expected):
    """Video stream, image stream, decoder and text tower."""
    model = tiny_vlab(remat=remat)
    video, tokens, lengths = example_inputs(model, FRAMES)
    shapes = parameter_shapes(model, FRAMES)
    traced = jax.make_jaxpr(lambda parameters: model.apply({"params": parameters}, video, tokens, lengths))(shapes)
    assert str(traced).count("prevent_cse=False") == expected


def test_bfloat16_keeps_float32_parameters_and_comes_close():
    batch = random_batch(2)
    outputs = {}
    for dtype in ("float32", "bfloat16"):
        model = tiny_vlab(dtype=dtype)
        shapes = parameter_shapes(model, FRAMES)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"float32"}
        inputs = batch["video"], batch["tokens"], batch["lengths"]
        outputs[dtype] = quick_jit(model.apply)({"params": random_parameters(model)}, *inputs)
    for exact, rounded in zip(outputs["float32"], outputs["bfloat16"], strict=True):
        assert exact.dtype == rounded.dtype == jnp.float32
        assert 0 < largest_difference(exact, rounded) < 0.05 * np.abs(exact).max()
    assert outputs["float32"][2].shape == (2, LENGTH, VOCABULARY)


def test_a_model_from_plain_fields_can_be_hashed_and_compared():
    assert hash(tiny_vlab()) == hash(tiny_vlab())
    assert tiny_vlab() == tiny_vlab()
    assert tiny_vlab() != tiny_vlab(embedding_blend=0.25)
    assert isinstance(tiny_vlab(), VLAB)
