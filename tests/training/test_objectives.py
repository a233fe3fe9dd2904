"""The objectives against plain computations in numpy, and what must not weigh in them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import largest_difference, quick_jit

from vlab_jax.training import objectives
from vlab_jax.training.objectives import MAX_LOGIT_SCALE, clamp_temperature

contrastive = quick_jit(objectives.contrastive_loss)


def next_token_loss(logits, tokens, starts, lengths, smoothing):
    """With logits in the place of states, and a table that leaves them as they are."""
    table, count = jnp.eye(logits.shape[-1]), objectives.target_mask(tokens, starts, lengths).sum()
    return objectives.next_token_loss(logits, table, tokens, starts, lengths, smoothing, count)


next_tokens = quick_jit(next_token_loss, static_argnums=4)
draw_masked_tokens = quick_jit(objectives.draw_masked_tokens, static_argnums=3)
CLIPS, WIDTH, LENGTH, VOCABULARY = 6, 5, 7, 11


def embeddings(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Clips and texts of unit length, float64."""
    rng = np.random.default_rng(seed)
    pair = rng.normal(size=(2, CLIPS, WIDTH))
    return tuple(pair / np.linalg.norm(pair, axis=-1, keepdims=True))


def run_contrastive(clips, texts, logit_scale, identity):
    """Loss and accuracy as numbers."""
    loss, accuracy = contrastive(
        jnp.asarray(clips, jnp.float32),
        jnp.asarray(texts, jnp.float32),
        jnp.asarray(logit_scale, jnp.float32),
        jnp.asarray(identity, jnp.int32),
    )
    return float(loss), float(accuracy)


def plain_contrastive(clips, texts, scale, identity) -> float:
    """Symmetric InfoNCE, one row after the other."""
    scores = scale * clips @ texts.T
    total = 0.0
    for i in range(len(clips)):
        rivals = [j for j in range(len(clips)) if j == i or identity[j] != identity[i]]
        total += np.log(np.exp(scores[i, rivals]).sum()) - scores[i, i]
        total += np.log(np.exp(scores[rivals, i]).sum()) - scores[i, i]
    return total / (2 * len(clips))


@given(st.integers(0, 2**31), st.floats(0.0, 4.0), st.lists(st.integers(0, 5), min_size=CLIPS, max_size=CLIPS))
@settings(max_examples=30, deadline=None)
def test_contrastive_is_symmetric_infonce_without_the_clips_other_captions(seed, logit_scale, identity):
    clips, texts = embeddings(seed)
    loss, _ = run_contrastive(clips, texts, logit_scale, identity)
    assert loss == pytest.approx(plain_contrastive(clips, texts, np.exp(logit_scale), identity), abs=1e-4, rel=1e-4)


def test_another_caption_of_the_same_clip_is_no_negative():
    clips = texts = np.eye(CLIPS)[[0, 0, 2, 3, 4, 5]]  # one clip twice, with the same caption
    apart, _ = run_contrastive(clips, texts, 3.0, [0, 1, 2, 3, 4, 5])
    together, _ = run_contrastive(clips, texts, 3.0, [0, 0, 2, 3, 4, 5])
    assert apart == pytest.approx(together + np.log(2) / 3, abs=1e-3)  # two rows of six had an equal rival
    one_clip, accuracy = run_contrastive(*embeddings(0), 3.0, [7] * CLIPS)
    assert one_clip == pytest.approx(0.0, abs=1e-6)
    assert accuracy == 1.0


def test_the_gradient_is_finite_where_rows_share_a_clip():
    clips, texts = (jnp.asarray(part, jnp.float32) for part in embeddings(0))
    identity = jnp.array([0, 0, 1, 1, 1, 2], jnp.int32)
    loss = jax.grad(lambda *inputs: objectives.contrastive_loss(*inputs, identity)[0], argnums=(0, 1, 2))
    gradients = quick_jit(loss)(clips, texts, jnp.asarray(2.0))
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0


def test_batch_accuracy_is_the_share_of_clips_that_find_their_caption():
    clips = texts = np.eye(CLIPS, WIDTH + 1)
    assert run_contrastive(clips, texts, 0.0, range(CLIPS))[1] == 1.0
    swapped = texts[[1, 0, 2, 3, 4, 5]]
    assert run_contrastive(clips, swapped, 0.0, range(CLIPS))[1] == pytest.approx(4 / 6)


def test_the_temperature_is_clamped_at_100():
    clips, texts = embeddings(1)
    at_limit, _ = run_contrastive(clips, texts, np.log(MAX_LOGIT_SCALE), range(CLIPS))
    assert MAX_LOGIT_SCALE == 100.0
    assert run_contrastive(clips, texts, 9.0, range(CLIPS))[0] == pytest.approx(at_limit, rel=1e-5)
    assert run_contrastive(clips, texts, 4.0, range(CLIPS))[0] != pytest.approx(at_limit, rel=1e-2)
    assert float(clamp_temperature(jnp.asarray(1.5))) == 1.5


def test_a_temperature_at_the_limit_still_learns():
    """Published CLIP weights stand there: a gradient of zero would freeze them."""
    clips, texts = (jnp.asarray(part, jnp.float32) for part in embeddings(1))
    limit = clamp_temperature(jnp.asarray(9.0))
    gradient = jax.grad(
        lambda logit_scale: objectives.contrastive_loss(clips, texts, logit_scale, jnp.arange(CLIPS))[0]
    )(limit)
    assert gradient > 1.0  # random pairs: a lower scale is better
    assert np.exp(limit) == pytest.approx(100.0, rel=1e-6)


@pytest.mark.parametrize(("logit_scale", "slope"), [(4.0, 1.0), (np.log(100.0), 1.0), (4.7, 0.0)])
def test_the_clamp_passes_the_whole_gradient_up_to_the_limit_and_none_past_it(logit_scale, slope):
    assert float(jax.grad(clamp_temperature)(jnp.float32(logit_scale))) == slope


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("chunk", [0, 2])
def test_similarities_and_their_gradients_are_products_in_full_float32(platform, chunk):
    def loss(clips, texts):
        return objectives.contrastive_loss(clips, texts, jnp.asarray(2.0), jnp.arange(CLIPS), chunk)[0]

    rows = jax.ShapeDtypeStruct((CLIPS, WIDTH), jnp.float32)
    traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(rows, rows)
    lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(products) >= 6  # by clip and by text: similarities, and a gradient of either side
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def texts_and_logits(seed: int = 0):
    """Logits, tokens and lengths of three texts, one of them without padding."""
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(2 * rng.normal(size=(3, LENGTH, VOCABULARY)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, VOCABULARY, (3, LENGTH)), jnp.int32)
    return logits, tokens, jnp.array([LENGTH, 4, 2], jnp.int32)


def captioning(logits, tokens, lengths, smoothing):
    """The loss of whole texts."""
    return next_tokens(logits, tokens, jnp.ones_like(lengths), lengths, smoothing)


def log_probabilities(logits) -> np.ndarray:
    """The logarithm of the softmax, float64."""
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_captioning_is_the_mean_cross_entropy_of_the_next_tokens(smoothing):
    logits, tokens, lengths = texts_and_logits()
    log = log_probabilities(logits)
    terms = []
    for text, length in enumerate(lengths.tolist()):
        for position in range(length - 1):
            target = np.full(VOCABULARY, smoothing / VOCABULARY)
            target[int(tokens[text, position + 1])] += 1 - smoothing
            terms.append(-(target * log[text, position]).sum())
    assert len(terms) == 6 + 3 + 1
    assert float(captioning(logits, tokens, lengths, smoothing)) == pytest.approx(np.mean(terms), rel=1e-5)


def test_label_smoothing_is_optaxs():
    logits, tokens, _ = texts_and_logits()
    smoothed = optax.smooth_labels(jax.nn.one_hot(tokens[:, 1:], VOCABULARY), 0.2)
    expected = optax.softmax_cross_entropy(logits[:, :-1], smoothed).mean()
    full = jnp.full(3, LENGTH, jnp.int32)
    assert float(captioning(logits, tokens, full, 0.2)) == pytest.approx(float(expected), rel=1e-5)


def test_padded_positions_weigh_nothing():
    logits, tokens, lengths = texts_and_logits()
    other_logits, other_tokens, _ = texts_and_logits(1)
    position = jnp.arange(LENGTH)
    padding = position >= lengths[:, None]
    no_target = position >= lengths[:, None] - 1  # the last token predicts nothing that counts
    changed = jnp.where(no_target[..., None], other_logits, logits)
    loss = captioning(logits, tokens, lengths, 0.1)
    assert float(captioning(changed, jnp.where(padding, other_tokens, tokens), lengths, 0.1)) == float(loss)
    slope = quick_jit(jax.grad(next_token_loss), static_argnums=4)
    gradient = np.abs(slope(logits, tokens, jnp.ones_like(lengths), lengths, 0.1)).max(axis=-1)
    assert np.array_equal(gradient == 0, no_target)


def test_texts_without_a_next_token_give_a_loss_of_zero():
    logits, tokens, _ = texts_and_logits()
    assert float(captioning(logits, tokens, jnp.ones(3, jnp.int32), 0.1)) == 0.0


def test_masked_lm_is_the_mean_cross_entropy_of_the_masked_tokens():
    logits, tokens, _ = texts_and_logits()
    table = jnp.eye(VOCABULARY)
    masked = np.zeros((3, LENGTH), bool)
    masked[0, 2] = masked[1, 1] = masked[1, 3] = True
    log = log_probabilities(logits)
    expected = -np.mean([log[text, place, int(tokens[text, place])] for text, place in np.argwhere(masked)])
    loss = quick_jit(lambda masked: objectives.mean_token_loss(logits, table, tokens, masked, 0.0, masked.sum()))
    assert float(loss(jnp.asarray(masked))) == pytest.approx(expected, rel=1e-5)
    assert float(loss(jnp.zeros_like(masked))) == 0.0


def test_losses_are_float32_for_bfloat16_logits():
    logits, tokens, lengths = texts_and_logits()
    rounded = logits.astype(jnp.bfloat16)
    loss = captioning(rounded, tokens, lengths, 0.1)
    assert loss.dtype == jnp.float32
    assert largest_difference(loss, captioning(rounded.astype(jnp.float32), tokens, lengths, 0.1)) < 1e-6


@given(st.integers(0, 2**31), st.lists(st.integers(1, LENGTH), min_size=4, max_size=4), st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_masked_tokens_are_inner_ones_and_at_least_one_a_text(seed, lengths, share):
    tokens = jnp.zeros((4, LENGTH), jnp.int32)
    masked = np.asarray(draw_masked_tokens(jax.random.key(seed), tokens, jnp.array(lengths, jnp.int32), share))
    for row, length in zip(masked, lengths, strict=True):
        assert not row[0]
        assert not row[length - 1 :].any()
        assert row.any() == (length > 2)


def test_about_15_percent_are_masked_at_every_position_alike():
    texts, length = 4000, 30
    masked = draw_masked_tokens(
        jax.random.key(0), jnp.zeros((texts, length + 4), jnp.int32), jnp.full(texts, length, jnp.int32)
    )
    inner = np.asarray(masked)[:, 1 : length - 1]
    assert inner.mean() == pytest.approx(0.15, abs=0.005)
    assert np.abs(inner.mean(axis=0) - 0.15).max() < 0.03


def test_the_choice_depends_on_the_key_alone():
    tokens, lengths = jnp.zeros((8, 20), jnp.int32), jnp.full(8, 20, jnp.int32)
    first, again, other = (draw_masked_tokens(jax.random.key(seed), tokens, lengths) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_question_answering_counts_the_answer_and_its_end_alone():
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(3, 6, 9)).astype(np.float32), rng.integers(0, 9, (3, 6)).astype(np.int32)
    starts, lengths = np.array([2, 4, 3], np.int32), np.array([5, 6, 3], np.int32)  # the last has no answer
    log_p = jax.nn.log_softmax(logits)
    places = [(0, 2), (0, 3), (0, 4), (1, 4), (1, 5)]
    expected = -np.mean([log_p[row, place - 1, tokens[row, place]] for row, place in places])
    given = (jnp.asarray(value) for value in (logits, tokens, starts, lengths))
    assert float(next_tokens(*given, 0.0)) == pytest.approx(expected, rel=1e-5)
