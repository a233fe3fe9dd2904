"""Losses over the vocabulary in chunks equal those at once, and take little memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import quick_jit

from vlab_jax.models import decoder
from vlab_jax.models.decoder import token_losses

WIDTH, VOCABULARY = 8, 40
GIB = 2**30


def drawn(seed: int, texts: int, length: int, dtype=jnp.float32):
    """Random states, table, targets, and counted positions; in some columns none is counted."""
    rng = np.random.default_rng(seed)
    states = jnp.asarray(rng.normal(0, 1, (texts, length, WIDTH)), dtype)
    table = jnp.asarray(rng.normal(0, 1, (VOCABULARY, WIDTH)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCABULARY, (texts, length)), jnp.int32)
    counted = rng.random((texts, length)) < 0.5
    counted[:, length // 2 :] &= rng.random() < 0.5
    return states, table, targets, jnp.asarray(counted)


def reference(states, table, targets, counted, smoothing):
    """The plain form: all logits at once."""
    log = jax.nn.log_softmax(states.astype(jnp.float32) @ table.T)
    loss = -jnp.take_along_axis(log, targets[..., None], axis=-1)[..., 0]
    return jnp.where(counted, (1 - smoothing) * loss - smoothing * log.mean(axis=-1), 0.0)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 99),
    texts=st.integers(1, 4),
    length=st.integers(1, 9),
    places=st.integers(1, 10),
    smoothing=st.sampled_from([0.0, 0.1]),
)
def test_losses_and_gradients_do_not_depend_on_the_chunks(seed, texts, length, places, smoothing):
    inputs = drawn(seed, texts, length)
    weights = jnp.asarray(np.random.default_rng(seed).random((texts, length)), jnp.float32)

    def total(loss, states, table):
        return (loss(states, table, *inputs[2:], smoothing) * weights).sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "CHUNK_BYTES", 4 * texts * VOCABULARY * places)
        ours = quick_jit(jax.value_and_grad(functools.partial(total, token_losses), argnums=(0, 1)))(*inputs[:2])
    theirs = quick_jit(jax.value_and_grad(functools.partial(total, reference), argnums=(0, 1)))(*inputs[:2])
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_table_is_summed_in_float32(monkeypatch):
    """In bfloat16, the share of one chunk would be lost in the sum of many."""
    monkeypatch.setattr(decoder, "CHUNK_BYTES", 1)
    states, table, targets, _ = drawn(0, 2, 400, jnp.bfloat16)
    states = jnp.abs(states)  # so that shares do not cancel
    counted = jnp.ones_like(targets, bool)

    def total(loss, table):
        return loss(states, table, targets, counted, 0.0).sum()

    found = quick_jit(jax.grad(functools.partial(total, token_losses)))(table)
    exact = jax.grad(functools.partial(total, reference))(table.astype(jnp.bfloat16).astype(jnp.float32))
    error = jnp.sqrt(((found - exact) ** 2).mean() / (exact**2).mean())
    assert error < 2 * float(jnp.finfo(jnp.bfloat16).eps)


def test_positions_without_a_counted_target_are_not_computed(monkeypatch):
    """They can hold any values, as after the end of the longest text."""
    monkeypatch.setattr(decoder, "CHUNK_BYTES", 1)
    states, table, targets, _ = drawn(1, 3, 6)
    counted = jnp.zeros_like(targets, bool).at[:, :2].set(True)
    clean = token_losses(states, table, targets, counted)
    broken = token_losses(states.at[:, 2:].set(jnp.nan), table, targets, counted)
    np.testing.assert_array_equal(clean, broken)


CLIPS_VOCABULARY, CLIPS_LENGTH, TEXTS, B32_WIDTH = 49408, 77, 64, 512


def temporaries(function, *arguments) -> int:
    """Bytes of temporaries of a compiled program."""
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "with gradients"])
def test_losses_over_clips_vocabulary_take_little_memory(gradient):
    """64 texts: all of their logits would be 0.91 GiB, and their gradient as much again."""
    states = jax.ShapeDtypeStruct((TEXTS, CLIPS_LENGTH, B32_WIDTH), jnp.float32)
    table = jax.ShapeDtypeStruct((CLIPS_VOCABULARY, B32_WIDTH), jnp.float32)
    targets = jax.ShapeDtypeStruct((TEXTS, CLIPS_LENGTH), jnp.int32)

    def loss(states, table, targets):
        return token_losses(states, table, targets, targets > 0, 0.1).sum()

    memory = temporaries(jax.grad(loss, argnums=(0, 1)) if gradient else loss, states, table, targets)
    assert memory < (1.3 if gradient else 0.7) * GIB
