"""The traps on the way to CLIP's towers: norms, activations, patches, pixels. Their parity is tested where weights are
loaded (`tests/pretrained/test_parity.py`)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import largest_difference

from vlab_jax.models.layers import ACTIVATIONS, LayerNorm
from vlab_jax.models.towers import PIXEL_DEVIATION, PIXEL_MEAN, TextTower, VisionTower, normalise_pixels, patches


def norm_error(x, norm: LayerNorm) -> float:
    """The largest error of a norm, whose scale is one and whose bias is zero, against float64."""
    exact = np.asarray(x, np.float64)
    expected = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + norm.epsilon)
    ours = norm.apply(norm.init(jax.random.key(0), x), x)
    assert ours.dtype == x.dtype
    return largest_difference(ours, expected)


def test_the_layer_norm_keeps_its_precision_where_the_mean_is_large():
    """The variance as a difference of squares, Flax's default, loses all digits here."""
    x = jnp.asarray(300 + 0.1 * np.random.default_rng(0).normal(size=(5, 64)), jnp.float32)
    assert norm_error(x, LayerNorm()) < 1e-3


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_the_layer_norm_adds_its_epsilon(epsilon):
    x = jnp.asarray(1e-3 * np.random.default_rng(0).normal(size=(5, 64)), jnp.float32)
    assert norm_error(x, LayerNorm(epsilon)) < 1e-5


def test_the_norm_is_computed_in_float32_whatever_the_type_of_its_input():
    """The mean of many bfloat16 numbers is not rounded on the way: the error is the rounding of the result alone."""
    x = jnp.asarray(64 + np.random.default_rng(0).normal(size=(2, 512)), jnp.bfloat16)
    assert norm_error(x, LayerNorm(dtype=jnp.bfloat16)) < 0.01


def test_the_default_epsilon_is_clips():
    assert VisionTower.epsilon == TextTower.epsilon == 1e-5


def test_gelu_is_the_exact_form_and_quick_gelu_openais():
    x = np.linspace(-6, 6, 97).astype(np.float32)
    exact = [value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x.tolist()]
    quick = [value / (1 + math.exp(-1.702 * value)) for value in x.tolist()]
    assert largest_difference(ACTIVATIONS["gelu"](x), exact) < 2e-6
    assert largest_difference(ACTIVATIONS["quick_gelu"](x), quick) < 2e-6
    assert largest_difference(exact, quick) > 0.01
    assert largest_difference(jax.nn.gelu(x), exact) > 1e-4  # the tanh form, Flax's default, would fail this test


def test_patches_are_cut_row_by_row_and_flattened_as_row_column_channel():
    image = np.arange(4 * 6 * 6 * 3, dtype=np.float32).reshape(4, 6, 6, 3)
    cut = patches(jnp.asarray(image), 3)
    assert cut.shape == (4, 4, 27)
    assert np.array_equal(cut[2, 1], image[2, 0:3, 3:6].reshape(-1))
    assert np.array_equal(cut[3, 2], image[3, 3:6, 0:3].reshape(-1))


def test_pixels_are_normalised_by_clips_mean_and_deviation():
    image = np.zeros((1, 2, 2, 3), np.uint8)
    image[0, 0, 0] = (255, 0, 51)
    ours = normalise_pixels(jnp.asarray(image))[0, 0, 0]
    expected = (np.array([1.0, 0.0, 0.2]) - PIXEL_MEAN) / PIXEL_DEVIATION
    assert largest_difference(ours, expected) < 1e-6
