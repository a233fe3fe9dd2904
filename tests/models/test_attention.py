"""Softmax attention as the CPU does it, beside JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlab_jax.models.attention import attend

CLIPS, QUERIES, KEYS, HEADS, WIDTH = 2, 5, 7, 3, 8


def mask(kind: str) -> jax.Array | None:
    """For all clips and all queries, or for each; in the second, one query sees nothing."""
    rng = np.random.default_rng(1)
    if kind == "none":
        return None
    allowed = rng.random((1, 1, 1, KEYS) if kind == "of keys" else (CLIPS, 1, QUERIES, KEYS)) < 0.5
    allowed[..., :1, 0] = True
    if kind == "of each":
        allowed[1, 0, 2] = False
    return jnp.asarray(allowed)


@pytest.mark.parametrize("kind", ["none", "of keys", "of each"])
def test_attention_and_its_gradient_are_those_of_jax(kind):
    rng = np.random.default_rng(0)
    given = [jnp.asarray(rng.normal(0, 2, (CLIPS, n, HEADS, WIDTH)), jnp.float32) for n in (QUERIES, KEYS, KEYS)]
    allowed = mask(kind)

    def ours(*given):
        return attend(*given, allowed)

    def reference(*given):
        return jax.nn.dot_product_attention(*given, mask=allowed, implementation="xla")

    def gradient(attention):
        return jax.grad(lambda *given: (attention(*given) ** 2).sum(), (0, 1, 2))(*given)

    np.testing.assert_allclose(ours(*given), reference(*given), rtol=0, atol=1e-5)
    for one, other in zip(gradient(ours), gradient(reference), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * float(jnp.abs(other).max()))


def test_scores_that_would_overflow_do_not():
    query = jnp.full((1, 2, 1, 4), 1e3)
    value = jnp.arange(3.0).reshape(1, 3, 1, 1) * jnp.ones(4)
    keys = jnp.asarray([1e3, 2e3, -1e3]).reshape(1, 3, 1, 1) * jnp.ones(4)
    assert np.array_equal(attend(query, keys, value), np.ones((1, 2, 1, 4)))


def test_half_precision_stays_what_it_is():
    given = [jnp.ones((1, n, 1, 8), jnp.bfloat16) for n in (2, 3, 3)]
    assert attend(*given).dtype == jnp.bfloat16
