"""The inputs that logits of the multimodal decoder depend on, with all blendings and both masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import (
    LENGTH,
    TEXT,
    VOCABULARY,
    WIDTH,
    largest_difference,
    quick_jit,
    random_like,
    with_block_states,
)

from vlab_jax.models.decoder import BLENDINGS, MultimodalDecoder

FRAMES, COUNT, VISION_WIDTH = 2, 3, 12
NOTICEABLE, NEGLIGIBLE = 1e-3, 1e-5
ROWS = LENGTH + 1


def make_decoder(**fields) -> MultimodalDecoder:
    """A decoder of the tiny text tower's sizes."""
    sizes = {key: value for key, value in TEXT.items() if key != "embed_width"}
    return MultimodalDecoder(**{**sizes, "frames": FRAMES, **fields})


def random_streams(clips: int, frames: int = FRAMES, seed: int = 0) -> dict[str, jax.Array]:
    """Tokens of both streams; the image stream has fewer frames."""
    rng = np.random.default_rng(seed)
    counts = {"video": frames, "image": 1}
    return {
        stream: jnp.asarray(rng.normal(size=(clips, count, COUNT, VISION_WIDTH)), jnp.float32)
        for stream, count in counts.items()
    }


def random_tokens(texts: int, seed: int = 0) -> jax.Array:
    """Token ids below the last one, which no text holds."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCABULARY - 1, (texts, LENGTH)), jnp.int32)


def random_parameters(decoder: MultimodalDecoder) -> dict:
    """Random parameters, none of them zero."""
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), random_tokens(1), random_streams(1), True))
    return random_like(shapes["params"])


@functools.partial(quick_jit, static_argnums=(0, 4))
def run(decoder, parameters, tokens, streams, causal, lengths, masked):
    """The decoder's logits."""
    return decoder.apply({"params": parameters}, tokens, streams, causal, lengths, masked)


def decode(decoder, parameters, tokens, streams, causal, lengths=None, masked=None):
    """Logits of up to `ROWS` texts, always computed as a batch of `ROWS`: one program serves many tests."""
    lengths = jnp.full(len(tokens), LENGTH, jnp.int32) if lengths is None else lengths
    masked = jnp.zeros(tokens.shape, bool) if masked is None else masked
    repeated = jnp.arange(ROWS) % len(tokens)
    batch = jax.tree.map(lambda leaf: leaf[repeated], (tokens, streams, lengths, masked))
    return run(decoder, parameters, *batch[:2], causal, *batch[2:])[: len(tokens)]


@pytest.fixture(scope="module")
def concat():
    """The default decoder and its parameters."""
    decoder = make_decoder()
    return decoder, random_parameters(decoder)


@pytest.mark.parametrize("blending", list(BLENDINGS))
def test_a_blending_attends_to_its_streams_and_to_no_other(blending):
    decoder = make_decoder(blending=blending)
    base, other = random_streams(1), random_streams(1, seed=1)
    variants = [base, {**base, "video": other["video"]}, {**base, "image": other["image"]}]
    streams = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *variants)
    tokens = jnp.tile(random_tokens(1), (3, 1))
    logits = decode(decoder, random_parameters(decoder), tokens, streams, True)
    assert logits.shape == (3, LENGTH, VOCABULARY)
    for changed, stream in ((1, "video"), (2, "image")):
        difference = np.abs(np.asarray(logits[changed] - logits[0])).max(axis=-1)  # [L]
        if stream in BLENDINGS[blending].streams:
            assert difference.min() > NOTICEABLE  # at every text position
        else:
            assert difference.max() < NEGLIGIBLE


EXPECTED_TREES = {
    "concat": ({"ln", "attend"}, {"image", "video"}),
    "parallel": ({"ln", "attend_image", "attend_video"}, {"image", "video"}),
    "stacked": ({"ln_image", "ln_video", "attend_image", "attend_video"}, {"image", "video"}),
    "none": ({"ln", "attend"}, {"video"}),
    "image_only": ({"ln", "attend"}, {"image"}),
}


@pytest.mark.parametrize("blending", list(EXPECTED_TREES))
def test_a_blending_has_the_parameters_that_it_needs_and_no_more(blending):
    parameters = random_parameters(make_decoder(blending=blending))
    cross_attention, streams = EXPECTED_TREES[blending]
    assert set(parameters["cross_attention"]) == cross_attention
    projected = {name.removesuffix("_projection") for name in parameters if name.endswith("_projection")}
    assert projected == streams
    assert set(parameters) == {
        "token_embedding",
        "position_embedding",
        "mask_embedding",
        "transformer",
        "cross_attention",
        "ln_final",
        *(f"{stream}_{part}" for stream in streams for part in ("norm", "projection", "frame_position", "type")),
    }


@pytest.mark.parametrize("blending", ["concat", "parallel", "stacked"])
def test_a_blending_without_its_image_stream_is_that_of_the_video_stream(blending):
    """As in the stage `adapt`: the same parameters, the image stream's part left out."""
    blended = make_decoder(blending=blending)
    parameters = random_parameters(blended)
    cross_attention = parameters["cross_attention"]
    renamed = {
        "ln": cross_attention.get("ln", cross_attention.get("ln_video")),
        "attend": cross_attention.get("attend", cross_attention.get("attend_video")),
    }
    alone = {name: value for name, value in parameters.items() if not name.startswith("image_")}
    tokens, video = random_tokens(2), {"video": random_streams(2)["video"]}
    ours = decode(blended, parameters, tokens, video, True)
    expected = decode(make_decoder(blending="none"), {**alone, "cross_attention": renamed}, tokens, video, True)
    assert largest_difference(ours, expected) < NEGLIGIBLE


def test_only_every_second_block_has_a_cross_attention():
    decoder = make_decoder(depth=4, cross_attention_every=2)
    parameters = random_parameters(decoder)
    assert parameters["cross_attention"]["ln"]["norm"]["scale"].shape == (2, WIDTH)
    streams = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), random_streams(1), random_streams(1, seed=1))
    tokens = jnp.tile(random_tokens(1), (2, 1))
    _, states = with_block_states(decoder, parameters, tokens, streams, causal=True)
    assert largest_difference(states[0, 0], states[0, 1]) < NEGLIGIBLE
    assert largest_difference(states[1, 0], states[1, 1]) > NOTICEABLE

    silent = jax.tree.map(lambda leaf: leaf.at[1].set(0.0), parameters["cross_attention"])
    _, quiet = with_block_states(decoder, {**parameters, "cross_attention": silent}, tokens, streams, causal=True)
    assert largest_difference(quiet[2], states[2]) < NEGLIGIBLE  # block 2 has none: the second is block 3's
    assert largest_difference(quiet[3], states[3]) > NOTICEABLE


def logits_of_each_changed_token(decoder, parameters, causal: bool) -> np.ndarray:
    """`[L, L]`: how much the logits at a position (column) change when the token at another (row) does."""
    base = random_tokens(1)
    changed = jnp.where(jnp.eye(LENGTH, dtype=bool), (base + 7) % (VOCABULARY - 1), base)
    tokens = jnp.concatenate([base, changed])
    streams = jax.tree.map(lambda leaf: jnp.tile(leaf, (LENGTH + 1, 1, 1, 1)), random_streams(1))
    logits = np.asarray(decode(decoder, parameters, tokens, streams, causal))
    return np.abs(logits[1:] - logits[:1]).max(axis=-1)


def test_causal_logits_depend_on_no_later_token(concat):
    influence = logits_of_each_changed_token(*concat, causal=True)
    later, earlier = np.triu_indices(LENGTH), np.tril_indices(LENGTH, -1)
    assert influence[later].min() > NOTICEABLE
    assert influence[earlier].max() < NEGLIGIBLE


def test_bidirectional_logits_depend_on_all_tokens(concat):
    assert logits_of_each_changed_token(*concat, causal=False).min() > NOTICEABLE


@pytest.mark.parametrize("causal", [True, False])
def test_padding_past_the_end_has_no_influence(concat, causal):
    decoder, parameters = concat
    lengths = jnp.array([3, 5, LENGTH], jnp.int32)
    tokens = random_tokens(3)
    padded = jnp.where(jnp.arange(LENGTH) < lengths[:, None], tokens, (tokens + 5) % (VOCABULARY - 1))
    streams = random_streams(3)
    one = decode(decoder, parameters, tokens, streams, causal, lengths)
    other = decode(decoder, parameters, padded, streams, causal, lengths)
    for text, length in enumerate(lengths.tolist()):
        assert largest_difference(one[text, :length], other[text, :length]) < NEGLIGIBLE
    assert largest_difference(one[0, 3:], other[0, 3:]) > NOTICEABLE
    if not causal:
        unaware = [decode(decoder, parameters, text, streams, causal) for text in (tokens, padded)]
        assert largest_difference(unaware[0][0, :3], unaware[1][0, :3]) > NOTICEABLE


def test_the_head_is_the_token_embedding(concat):
    decoder, parameters = concat
    unused = VOCABULARY - 1
    tokens, streams = random_tokens(2), random_streams(2)
    table = parameters["token_embedding"]
    changed = {**parameters, "token_embedding": table.at[unused].add(1.0)}
    one = decode(decoder, parameters, tokens, streams, True)
    other = decode(decoder, changed, tokens, streams, True)
    assert np.array_equal(one[..., :unused], other[..., :unused])
    assert largest_difference(one[..., unused], other[..., unused]) > NOTICEABLE
    assert not [name for name in parameters if "head" in name]


def test_the_mask_embedding_replaces_masked_tokens_and_no_others(concat):
    decoder, parameters = concat
    hidden = 3
    base = random_tokens(1)
    tokens = jnp.concatenate([base, base.at[0, hidden].add(1), base.at[0, hidden + 1].add(1)])
    streams = jax.tree.map(lambda leaf: jnp.tile(leaf, (3, 1, 1, 1)), random_streams(1))
    masked = jnp.zeros((3, LENGTH), bool).at[:, hidden].set(True)
    logits = decode(decoder, parameters, tokens, streams, False, None, masked)
    assert largest_difference(logits[0], logits[1]) < NEGLIGIBLE  # a masked token has no influence
    assert largest_difference(logits[0], logits[2]) > NOTICEABLE  # others have
    other_mask = {**parameters, "mask_embedding": parameters["mask_embedding"][::-1]}
    assert largest_difference(logits, decode(decoder, other_mask, tokens, streams, False, None, masked)) > NOTICEABLE
    unmasked = decode(decoder, parameters, tokens, streams, False)
    assert np.array_equal(unmasked, decode(decoder, other_mask, tokens, streams, False))


def test_by_default_all_tokens_are_valid_and_none_is_masked(concat):
    decoder, parameters = concat
    tokens, streams = random_tokens(ROWS), random_streams(ROWS)
    default = run(decoder, parameters, tokens, streams, False, None, None)
    assert largest_difference(default, decode(decoder, parameters, tokens, streams, False)) < NEGLIGIBLE


def test_the_order_of_frames_has_an_influence_by_frame_positions_alone(concat):
    decoder, parameters = concat
    streams = random_streams(1)
    permuted = {**streams, "video": streams["video"][:, ::-1]}
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), streams, permuted)
    tokens = jnp.tile(random_tokens(1), (2, 1))
    ordered = decode(decoder, parameters, tokens, both, True)
    assert largest_difference(ordered[0], ordered[1]) > NOTICEABLE
    constant = jax.tree.map(lambda leaf: leaf, parameters)
    constant["video_frame_position"] = jnp.zeros_like(parameters["video_frame_position"])
    unordered = decode(decoder, constant, tokens, both, True)
    assert largest_difference(unordered[0], unordered[1]) < NEGLIGIBLE


def test_without_frame_positions_the_frames_are_a_set():
    decoder = make_decoder(frame_positions=False)
    streams, parameters = random_streams(1), random_parameters(decoder)
    assert not any("frame_position" in name for name in parameters)
    permuted = {stream: tokens[:, ::-1] for stream, tokens in streams.items()}
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), streams, permuted)
    logits = decode(decoder, parameters, jnp.tile(random_tokens(1), (2, 1)), both, True)
    assert largest_difference(logits[0], logits[1]) < NEGLIGIBLE


@pytest.mark.parametrize("frames", [1, 5])
def test_any_number_of_frames_can_be_attended_to(concat, frames):
    logits = decode(*concat, random_tokens(1), random_streams(1, frames), True)
    assert logits.shape == (1, LENGTH, VOCABULARY)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("blending", ["concat", "stacked"])
def test_several_texts_of_a_clip_do_not_influence_each_other(blending):
    decoder = make_decoder(blending=blending)
    parameters, streams = random_parameters(decoder), random_streams(2)
    tokens = random_tokens(6)  # three texts a clip
    together = run(decoder, parameters, tokens, streams, True, None, None)
    for text in range(6):
        own = {stream: tokens_of[text // 3][None] for stream, tokens_of in streams.items()}
        alone = decode(decoder, parameters, tokens[text][None], own, True)
        assert largest_difference(together[text], alone[0]) < NEGLIGIBLE
