"""Layouts lose nothing, and rules leave nothing out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlab_jax.errors import InputError
from vlab_jax.pretrained import convert
from vlab_jax.pretrained.convert import LINEAR, Layout, Rule, check, linear

small = st.integers(1, 4)
LAYOUTS = {
    "SAME": lambda a, b, c: (a, b),
    "LINEAR": lambda a, b, c: (a, b),
    "FUSED_HEADS": lambda a, b, c: (a, 3, b, c),
    "FUSED_BIAS": lambda a, b, c: (3, a, b),
    "SEPARATE_HEADS": lambda a, b, c: (a, 3, b, c),
    "SEPARATE_BIASES": lambda a, b, c: (2, a, b),
    "OUTPUT": lambda a, b, c: (a, b, c),
    "PATCHES": lambda a, b, c: (a * a * 3, b),
    "ONE_AXIS_MORE": lambda a, b, c: (a, b),
    "TWO_AXES_MORE": lambda a, b, c: (a,),
}


def test_every_layout_is_tested():
    assert {name for name, value in vars(convert).items() if isinstance(value, Layout)} == set(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
@given(a=small, b=small, c=small)
def test_a_layout_there_and_back_changes_nothing(name, a, b, c):
    layout, shape = getattr(convert, name), LAYOUTS[name](a, b, c)
    ours = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    theirs = layout.to_theirs(ours)
    assert [part.shape for part in theirs] == layout.source_shapes(shape)
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


def refusal(targets=TARGETS, sources=SOURCES, rules=RULES) -> str:
    with pytest.raises(InputError) as raised:
        check(rules, targets, sources, ("position_ids",), "clip.safetensors")
    assert str(raised.value).startswith("clip.safetensors does not hold this model; ")
    return str(raised.value)


def test_rules_that_fit_pass_and_buffers_are_left_out():
    check(RULES, TARGETS, {**SOURCES, "text.position_ids": (1, 77)}, ("position_ids",), "clip.safetensors")


def test_a_missing_tensor_is_named():
    sources = {name: shape for name, shape in SOURCES.items() if name != "block.1.fc.bias"}
    assert refusal(sources=sources).endswith("missing: block.1.fc.bias")


def test_a_tensor_of_another_shape_is_named_with_both_shapes():
    message = refusal(sources={**SOURCES, "block.0.fc.weight": (3, 4)})
    assert message.endswith("of another shape: block.0.fc.weight is [3, 4] and should be [4, 3]")


def test_a_tensor_that_is_not_used_is_named():
    assert refusal(sources={**SOURCES, "block.2.fc.bias": (4,)}).endswith("not used: block.2.fc.bias")


def test_a_parameter_that_is_not_filled_is_named():
    assert refusal(targets={**TARGETS, "text/extra": (1,)}).endswith("not filled: text/extra")


def test_a_rule_without_a_parameter_is_named():
    rules = [*RULES, Rule("text/none", ("none",), LINEAR)]
    assert refusal(sources={**SOURCES, "none": (1, 1)}, rules=rules).split("; ")[1] == "missing: a place for none"


def test_long_lists_of_names_are_cut():
    assert refusal(sources={}).endswith("block.0.fc.weight, block.1.fc.weight, block.0.fc.bias, block.1.fc.bias, scale")
    assert " and 3 more" in refusal(sources={**SOURCES, **{f"extra.{i}": (1,) for i in range(8)}})
