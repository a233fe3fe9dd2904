"""The gradient of a batch in micro-batches is that of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FRAMES, quick_jit, random_batch, random_parameters, tiny_vlab

from vlab_jax.runtime import sharding
from vlab_jax.training.objectives import Objective
from vlab_jax.training.step import join_rows, micro_batched_gradient, split_rows

CLIPS = 8
EVERY = {"contrastive": 1.0, "captioning": 0.5, "masked_lm": 2.0, "question_answering": 1.5}
UNTRAINED = ("vision", "logit_scale")
MODEL = tiny_vlab()


def batch_with_questions():
    """A batch in which clips have different numbers of tokens to learn from, and some are of the same clip."""
    batch = dict(random_batch(CLIPS))
    rng = np.random.default_rng(1)
    length = batch["tokens"].shape[1]
    ends = rng.integers(3, length + 1, (CLIPS, 2))
    return batch | {
        "clip": jnp.asarray(rng.integers(0, 6, CLIPS), jnp.int32),
        "question_tokens": jnp.asarray(rng.integers(1, 30, (CLIPS, 2, length)), jnp.int32),
        "answer_starts": jnp.asarray(ends - rng.integers(0, 3, (CLIPS, 2)), jnp.int32),
        "question_lengths": jnp.asarray(ends, jnp.int32),
    }


def gradients(objective, parts, frozen=()):
    """The gradient and the metrics of one batch, whole (`parts` 0) or in parts."""
    parameters, batch, rng = random_parameters(MODEL), batch_with_questions(), jax.random.key(3)
    trainable = {name: None if name in frozen else value for name, value in parameters.items()}

    def all_params(trainable):
        return {name: parameters[name] if value is None else value for name, value in trainable.items()}

    if not parts:
        return quick_jit(jax.grad(lambda trainable: objective(MODEL, all_params(trainable), batch, rng), has_aux=True))(
            trainable
        )
    return quick_jit(lambda p: micro_batched_gradient(objective, MODEL, all_params, p, batch, rng, parts))(trainable)


def largest_difference(one, other):
    """Relative to the largest entry of either."""
    ones, others = jax.tree.leaves(one), jax.tree.leaves(other)
    assert len(ones) == len(others)
    scale = max(float(jnp.abs(leaf).max()) for leaf in ones)
    return max(float(jnp.abs(a - b).max()) for a, b in zip(ones, others, strict=True)) / scale


def agree(one, other):
    """Whether gradients and metrics are equal."""
    (gradient, metrics), (expected, figures) = one, other
    assert largest_difference(gradient, expected) < 1e-5
    assert set(metrics) == set(figures)
    for name, value in figures.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), name


@pytest.fixture(scope="module")
def whole():
    return gradients(Objective(EVERY, ("video", "image"), (0, 2)), 0)


def test_gradients_in_parts_are_those_of_the_whole_batch(whole):
    agree(gradients(Objective(EVERY, ("video", "image"), (0, 2), contrastive_chunk=4), 2), whole)


@pytest.mark.parametrize(("weights", "frozen"), [({"captioning": 1.0}, ()), ({"contrastive": 1.0}, UNTRAINED)])
def test_objectives_left_out_and_frozen_parameters_are_too(weights, frozen):
    objective = Objective(weights, ("video",), tuple(range(FRAMES)))
    gradient, metrics = gradients(objective, 4, frozen)
    assert all(gradient[name] is None for name in frozen)
    agree((gradient, metrics), gradients(objective, 0, frozen))


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_parts_hold_every_row_once_and_join_to_the_whole(parts, rows, more):
    array = jnp.arange(parts * rows * (more + 1)).reshape(parts * rows, more + 1)
    split = split_rows(array, parts)
    assert split.shape == (parts, rows, more + 1)
    assert (join_rows(split) == array).all()


@pytest.mark.eight_devices
def test_each_device_has_its_share_of_every_part():
    mesh = sharding.make_mesh(data=8)
    with jax.set_mesh(mesh):
        rows = jax.device_put(jnp.arange(32.0), sharding.batch_sharding(mesh))
        split = jax.jit(lambda rows: split_rows(rows, 2))(rows)
    # The second dimension stays with the devices that had it: no row moves.
    assert split.sharding.shard_shape(split.shape) == (2, 2)
    held = {shard.device: np.asarray(shard.data).ravel() for shard in rows.addressable_shards}
    for shard in split.addressable_shards:
        assert set(np.asarray(shard.data).ravel()) == set(held[shard.device])
