"""Layouts lose nothing, and rules leave nothing out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlab_jax.errors import InputError
from vlab_jax.pretrained import convert
from vlab_jax.pretrained.convert import LINEAR, Layout, Rule, check, linear

small = st.integers(1, 4)
LAYOUTS = [
    ("SAME", lambda a, b, c: (a, b)),
    ("LINEAR", lambda a, b, c: (a, b)),
    ("LINEAR", lambda a, b, c: (a, 3, b, c)),
    ("FUSED_BIAS", lambda a, b, c: (3, a, b)),
    ("SEPARATE_HEADS", lambda a, b, c: (a, 3, b, c)),
    ("SEPARATE_BIASES", lambda a, b, c: (2, a, b)),
    ("OUTPUT", lambda a, b, c: (a, b, c)),
    ("PATCHES", lambda a, b, c: (a * a * 3, b)),
    ("ONE_AXIS_MORE", lambda a, b, c: (a, b)),
    ("TWO_AXES_MORE", lambda a, b, c: (a,)),
]


def test_every_layout_is_tested():
    assert {name for name, value in vars(convert).items() if isinstance(value, Layout)} == {name for name, _ in LAYOUTS}


@pytest.mark.parametrize(("name", "shape_of"), LAYOUTS)
@given(a=small, b=small, c=small)
def test_a_layout_there_and_back_changes_nothing(name, shape_of, a, b, c):
    layout, shape = getattr(convert, name), shape_of(a, b, c)
    ours = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    theirs = layout.to_theirs(ours)
    assert [part.shape for part in theirs] == Rule("", ("",), layout).source_shapes(shape)
    np.testing.assert_array_equal(layout.to_ours(theirs, shape), ours)


def test_a_patch_kernel_gives_what_the_convolution_gives():
    rng = np.random.default_rng(0)
    convolution, patch = rng.normal(size=(5, 3, 2, 2)), rng.normal(size=(2, 2, 3))
    kernel = convert.PATCHES.to_ours([convolution], (12, 5))
    np.testing.assert_allclose(patch.reshape(-1) @ kernel, np.einsum("dcij,ijc->d", convolution, patch))


RULES = [*linear("text/mlp", "block.{}.fc"), Rule("text/scale", ("scale",))]
TARGETS = {"text/mlp/kernel": (2, 3, 4), "text/mlp/bias": (2, 4), "text/scale": ()}
SOURCES = {f"block.{i}.fc.{part}": shape for i in range(2) for part, shape in (("weight", (4, 3)), ("bias", (4,)))}
SOURCES["scale"] = ()


MISFITS = {
    "a missing tensor": (
        {"sources": {n: s for n, s in SOURCES.items() if "1.fc.b" not in n}},
        "missing: block.1.fc.bias",
    ),
    "another shape": (
        {"sources": {**SOURCES, "block.0.fc.weight": (3, 4)}},
        "of another shape: block.0.fc.weight is [3, 4] and should be [4, 3]",
    ),
    "a tensor too many": ({"sources": {**SOURCES, "block.2.fc.bias": (4,)}}, "not used: block.2.fc.bias"),
    "a parameter too many": ({"targets": {**TARGETS, "text/extra": (1,)}}, "not filled: text/extra"),
    "a rule without a parameter": (
        {"sources": {**SOURCES, "none": (1, 1)}, "rules": [*RULES, Rule("text/none", ("none",), LINEAR)]},
        "missing: a place for none; not used: none",
    ),
    "as many names as are listed": (
        {"sources": {}},
        "missing: block.0.fc.weight, block.1.fc.weight, block.0.fc.bias, block.1.fc.bias, scale",
    ),
    "more names than are listed": (
        {"sources": {**SOURCES, **{f"extra.{i}": (1,) for i in range(8)}}},
        "not used: extra.0, extra.1, extra.2, extra.3, extra.4 and 3 more",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_named(misfit):
    changes, message = MISFITS[misfit]
    sides = {"rules": RULES, "targets": TARGETS, "sources": SOURCES, **changes}
    with pytest.raises(InputError) as raised:
        check(**sides, buffers=("position_ids",), where="clip.safetensors")
    assert str(raised.value) == f"clip.safetensors does not hold this model; {message}"


def test_rules_that_fit_pass_and_buffers_are_left_out():
    check(RULES, TARGETS, {**SOURCES, "text.position_ids": (1, 77)}, ("position_ids",), "clip.safetensors")
