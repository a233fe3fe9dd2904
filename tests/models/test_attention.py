"""Attention equals JAX's plain softmax attention: on every path, with gradients, for any lengths."""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import quick_jit

from vlab_jax.models import attention_check
from vlab_jax.models.attention import Kernels, attend, from_cache_layout, to_cache_layout, uses_cudnn
from vlab_jax.models.attention_check import AttentionShape, find_wrong_kernel

HEAD_WIDTHS = (24, 64, 72, 80, 88, 96, 104, 128)
ROWS, HEADS = 2, 2
XLA_PLATFORMS = ("cpu", "tpu")  # two implementations by XLA, which run on any machine


def arrays(seed: int, queries: int, keys: int, width: int, dtype=jnp.float32) -> list[jax.Array]:
    """Random queries, keys, values, and a cotangent of the output."""
    rng = np.random.default_rng(seed)
    shapes = [(ROWS, length, HEADS, width) for length in (queries, keys, keys, queries)]
    return [jnp.asarray(rng.normal(0, 1, shape), jnp.float32).astype(dtype) for shape in shapes]


def with_gradients(function, query, key, value, cotangent):
    output, pull = jax.vjp(function, query, key, value)
    return output, *pull(cotangent)


def plain(query, key, value, *, causal=False, kv_lengths=None):
    """JAX's softmax attention, with zeros for a row without keys."""
    lengths = None if kv_lengths is None else jnp.maximum(kv_lengths, 1)
    output = jax.nn.dot_product_attention(
        query, key, value, is_causal=causal, key_value_seq_lengths=lengths, implementation="xla"
    )
    return output if kv_lengths is None else output * (kv_lengths > 0)[:, None, None, None]


def assert_same(found, expected, tolerance):
    """Arrays and gradients are equal, relative to the largest value where that is above one."""
    for one, other in zip(found, expected, strict=True):
        scale = max(1.0, float(jnp.abs(other).max()))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


lengths_of = st.integers(1, 300)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 99),
    queries=lengths_of,
    keys=lengths_of,
    width=st.sampled_from(HEAD_WIDTHS),
    causal=st.booleans(),
    shares=st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1)),
    platform=st.sampled_from(XLA_PLATFORMS),
)
@example(seed=0, queries=1, keys=300, width=64, causal=False, shares=(0.0, 0.5), platform="tpu")
@example(seed=0, queries=257, keys=257, width=88, causal=True, shares=(0.0, 1.0), platform="cpu")
def test_attention_and_its_gradient_are_those_of_plain_softmax_attention(
    seed, queries, keys, width, causal, shares, platform
):
    if causal:
        keys = queries  # JAX's causal order is that of one sequence
    kv_lengths = None if shares is None else jnp.asarray([round(share * keys) for share in shares], jnp.int32)
    options = {"causal": causal, "kv_lengths": kv_lengths}
    inputs = arrays(seed, queries, keys, width)
    ours = quick_jit(functools.partial(with_gradients, functools.partial(attend, kernels=Kernels(platform), **options)))
    theirs = quick_jit(functools.partial(with_gradients, functools.partial(plain, **options)))
    assert_same(ours(*inputs), theirs(*inputs), 1e-5)


@pytest.mark.parametrize("platform", XLA_PLATFORMS)
def test_half_precision_differs_by_its_rounding_only_and_keeps_its_type(platform):
    inputs = arrays(1, 77, 197, 64, jnp.bfloat16)
    found = quick_jit(functools.partial(with_gradients, functools.partial(attend, kernels=Kernels(platform))))(*inputs)
    wide = [each.astype(jnp.float32) for each in inputs]
    exact = quick_jit(functools.partial(with_gradients, plain))(*wide)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == jnp.bfloat16
        mean, largest = attention_check.rounding_errors(one, other)
        assert mean <= 2 and largest <= 16


@pytest.mark.parametrize("platform", XLA_PLATFORMS)
@pytest.mark.parametrize("queries", [1, 5])
def test_queries_after_a_cache_attend_to_all_earlier_tokens(platform, queries):
    """As if the whole sequence had been queried at once."""
    width, keys, starts = 24, 9, (0, 4)
    _, key, value, _ = arrays(2, queries, keys, width)
    every = arrays(3, keys, keys, width)[0]
    whole = attend(every, key, value, causal=True, kernels=Kernels(platform))
    query = jnp.stack([every[row, start : start + queries] for row, start in enumerate(starts)])
    starting = jnp.asarray(starts, jnp.int32)
    found = attend(query, key, value, causal=True, query_starts=starting, kernels=Kernels(platform))
    for row, start in enumerate(starts):
        np.testing.assert_allclose(found[row], whole[row, start : start + queries], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernels", [Kernels("cpu"), Kernels("tpu"), Kernels("cuda"), Kernels("cuda", "xla")])
def test_a_soft_cap_bounds_the_scores(kernels):
    query, key, value, _ = arrays(4, 6, 7, 24)
    found = attend(query * 30, key, value, soft_cap=3.0, kernels=kernels)
    scores = 3 * np.tanh(np.einsum("blhd,bkhd->bhlk", query * 30, key, dtype=np.float64) / 24**0.5 / 3)
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found, np.einsum("bhlk,bkhd->blhd", weights, value), rtol=0, atol=1e-5)


@pytest.mark.parametrize("platform", XLA_PLATFORMS)
def test_scores_that_would_overflow_do_not(platform):
    query = jnp.full((1, 2, 1, 4), 1e3)
    value = jnp.arange(3.0).reshape(1, 3, 1, 1) * jnp.ones(4)
    keys = jnp.asarray([1e3, 2e3, -1e3]).reshape(1, 3, 1, 1) * jnp.ones(4)
    assert np.array_equal(attend(query, keys, value, kernels=Kernels(platform)), np.ones((1, 2, 1, 4)))


@pytest.mark.parametrize(
    ("kernels", "dtype", "head_width", "expected"),
    [
        (Kernels("cpu"), jnp.bfloat16, 64, False),
        (Kernels("tpu"), jnp.bfloat16, 64, False),
        (Kernels("rocm"), jnp.bfloat16, 64, False),
        (Kernels("cuda"), jnp.float32, 64, False),
        (Kernels("cuda"), jnp.bfloat16, 64, True),
        (Kernels("cuda"), jnp.float16, 128, True),
        (Kernels("cuda"), jnp.bfloat16, 88, True),
        (Kernels("cuda"), jnp.bfloat16, 20, False),
        (Kernels("cuda"), jnp.bfloat16, 256, False),
        (Kernels("cuda", "xla"), jnp.bfloat16, 64, False),
    ],
)
def test_the_fused_kernel_is_used_only_where_it_supports_the_shapes(kernels, dtype, head_width, expected):
    assert uses_cudnn(kernels, dtype, head_width) == expected


@contextlib.contextmanager
def xla_for_cudnn():
    """Replaces cuDNN's attention by XLA's under its conditions: even lengths, no mask, NaN after the valid queries.

    Yields the list of its calls: whether causal, and which lengths were passed.
    """
    calls = []
    real = jax.nn.dot_product_attention

    def attention(query, key, value, *, implementation, is_causal=False, mask=None, **lengths):
        if implementation == "xla":
            return real(query, key, value, mask=mask, is_causal=is_causal, implementation="xla", **lengths)
        assert mask is None and query.shape[1] % 8 == 0 and key.shape[1] % 8 == 0
        calls.append((is_causal, sorted(lengths)))
        output = real(query, key, value, is_causal=is_causal, implementation="xla", **lengths)
        if not lengths:
            return output
        valid = jnp.arange(query.shape[1]) < lengths["query_seq_lengths"][:, None]
        return jnp.where(valid[..., None, None], output, jnp.nan)

    with mock.patch.object(jax.nn, "dot_product_attention", attention):
        yield calls


@settings(max_examples=5, deadline=None)
@given(
    queries=st.integers(2, 300),
    keys=lengths_of,
    width=st.sampled_from(HEAD_WIDTHS),
    causal=st.booleans(),
    shares=st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@example(queries=257, keys=257, width=64, causal=False, shares=None)
@example(queries=77, keys=77, width=64, causal=True, shares=(0.0, 1.0))
@example(queries=64, keys=64, width=64, causal=True, shares=None)
def test_padding_for_the_fused_kernel_has_no_influence(queries, keys, width, causal, shares):
    if causal:
        keys = queries
    kv_lengths = None if shares is None else jnp.asarray([round(share * keys) for share in shares], jnp.int32)
    inputs = arrays(5, queries, keys, width, jnp.bfloat16)
    options = {"causal": causal, "kv_lengths": kv_lengths}
    fused = quick_jit(functools.partial(with_gradients, functools.partial(attend, kernels=Kernels("cuda"), **options)))
    with xla_for_cudnn() as calls:
        found = fused(*inputs)
    assert calls
    without = functools.partial(attend, kernels=Kernels("cuda", "xla"), **options)
    expected = quick_jit(functools.partial(with_gradients, without))(*inputs)
    assert_same([x.astype(np.float32) for x in found], [x.astype(np.float32) for x in expected], 2e-2)


def test_the_fused_kernel_takes_causal_order_and_lengths_instead_of_a_mask():
    inputs = arrays(6, 77, 77, 64, jnp.bfloat16)[:3]
    lengths = ["key_value_seq_lengths", "query_seq_lengths"]
    with xla_for_cudnn() as calls:
        attend(*inputs, causal=True, kernels=Kernels("cuda"))
        attend(*inputs, kv_lengths=jnp.asarray([3, 77], jnp.int32), kernels=Kernels("cuda"))
        attend(*(each[:, :64] for each in inputs), causal=True, kernels=Kernels("cuda"))
    assert calls == [(True, lengths), (False, lengths), (True, [])]


@pytest.mark.parametrize("kernels", [Kernels("cpu"), Kernels("cuda")])
def test_the_cache_layout_can_be_undone(kernels):
    x = arrays(7, 3, 3, 64, jnp.bfloat16)[0]
    assert np.array_equal(from_cache_layout(to_cache_layout(x, kernels), kernels, 64), x)


SHAPES = [
    AttentionShape(77, 77, 2, 64, causal=True),
    AttentionShape(16, 33, 2, 64, lengths=True),
    AttentionShape(5, 5, 2, 20),
]


def right(query, key, value, *, kernels, **options):
    """A correct kernel in the place of the fused one."""
    return attend(query, key, value, kernels=kernels._replace(attention="xla"), **options)


def not_causal(query, key, value, *, causal, **options):
    return right(query, key, value, causal=False, **options)


def without_lengths(query, key, value, *, kv_lengths=None, **options):
    return right(query, key, value, **options)


def last_query_twice(query, key, value, **options):
    return right(query.at[:, -1].set(query[:, -2]), key, value, **options)


def wrong_gradient(query, key, value, **options):
    halved = value / 2 + jax.lax.stop_gradient(value / 2)
    return right(query, key, halved, **options)


def refused(query, key, value, **options):
    raise NotImplementedError(f"Unsupported sequence length Q {query.shape[1]}\nand so on")


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (not_causal, "causal, 77 queries, 77 keys, 2 heads of 64: its output is off by"),
        (without_lengths, "16 queries, 33 keys, 2 heads of 64: its output is off by"),
        (last_query_twice, "its output is off by"),
        (wrong_gradient, "its gradient of the value is off by"),
        (refused, "causal, 77 queries, 77 keys, 2 heads of 64: Unsupported sequence length Q 77"),
    ],
)
def test_a_wrong_kernel_is_found_before_it_is_used(kernel, message):
    wrong = find_wrong_kernel(SHAPES, jnp.bfloat16, Kernels("cuda"), kernel)
    assert wrong is not None and message in wrong and "\n" not in wrong


def test_a_right_kernel_passes_and_only_fused_kernels_are_checked():
    assert find_wrong_kernel(SHAPES, jnp.bfloat16, Kernels("cuda"), right) is None
    for kernels, dtype in [(Kernels("cuda", "xla"), jnp.bfloat16), (Kernels("cpu"), jnp.bfloat16)]:
        assert find_wrong_kernel(SHAPES, dtype, kernels, refused) is None
    assert find_wrong_kernel(SHAPES, jnp.float32, Kernels("cuda"), refused) is None
