"""Loaded weights compute what the reference that saved them computes; and a fault in the model would be seen."""

import functools
import pathlib
from collections.abc import Callable

import jax
import pytest
from parity import computed, differences, loaded
from pytorch import pytorch
from reference_models import CASES, HF_TEXT, HF_VISION, Reference, cached_reference, hugging_face
from reference_models import EVA02 as EVA02_TRUNK

TOLERANCE = 1e-4  # largest absolute difference in float32, of every block, of features, states and logits
LONG = ("HF, shape of ViT-L/14",)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], Reference]:
    """A reference by its name, made once."""
    return functools.cache(lambda case: cached_reference(case, CASES[case], tmp_path_factory.mktemp("reference")))


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.long] * (case in LONG)) for case in CASES])
def test_every_block_and_feature_is_that_of_the_reference(case, saved):
    reference = saved(case)
    found = differences(computed(*loaded(reference.path), reference), reference)
    assert set(found) == set(reference.outputs)
    assert max(found.values()) < TOLERANCE, found


HF, EXACT = "HF, quick GELU, end of text called 2", "HF, exact GELU, end of text by its id"
EVA02 = "EVA02, patch 14"

# Faults of fields: case, tower, field, wrong value.
WRONG_FIELDS = {
    "exact GELU for quick": (HF, "vision", {"activation": "gelu"}),
    "exact GELU for quick, text": (HF, "text", {"activation": "gelu"}),
    "quick GELU for exact": (EXACT, "vision", {"activation": "quick_gelu"}),
    "epsilon 1e-6 for 1e-5, vision": (HF, "vision", {"epsilon": 1e-6}),
    "epsilon 1e-6 for 1e-5, text": (HF, "text", {"epsilon": 1e-6}),
    "epsilon 1e-5 for 1e-6, EVA": (EVA02, "vision", {"epsilon": 1e-5}),
    "other heads": (HF, "vision", {"heads": 2}),
    "no norm before the blocks": (HF, "vision", {"pre_norm": False}),
    "no rotary positions": (EVA02, "vision", {"rotary_grid": 0}),
    "rotary positions of another grid": (EVA02, "vision", {"rotary_grid": 3}),
    "no inner norms": (EVA02, "vision", {"inner_norms": False}),
}


@pytest.mark.parametrize("fault", WRONG_FIELDS)
def test_a_wrong_field_is_seen(fault, saved):
    case, tower, wrong = WRONG_FIELDS[fault]
    reference = saved(case)
    fields, parameters = loaded(reference.path)
    broken = {**fields, tower: {**fields[tower], **wrong}}
    if wrong == {"heads": 2}:
        parameters = reshaped_heads(parameters, 2)
    found = differences(computed(broken, parameters, reference), reference)
    assert max(found.values()) > 2 * TOLERANCE, found


def reshaped_heads(parameters, heads: int):
    """The vision tower's attention in another number of heads, with the same numbers."""
    attention = parameters["vision"]["transformer"]["blocks"]["attention"]

    def reshaped(path, leaf):
        names = [key.key for key in path]
        if names[0] == "query_key_value":
            return leaf.reshape(*leaf.shape[:-2], heads, -1)
        return leaf.reshape(leaf.shape[0], heads, -1, leaf.shape[-1]) if names[-1] == "kernel" else leaf

    changed = jax.tree_util.tree_map_with_path(reshaped, attention)
    blocks = {**parameters["vision"]["transformer"]["blocks"], "attention": changed}
    return {**parameters, "vision": {**parameters["vision"], "transformer": {"blocks": blocks}}}


def transposed_projection(tower: str):
    """The tower's projection the wrong way round; it must be square, or no one would get so far."""

    def change(parameters):
        kernel = parameters[tower]["projection"]["kernel"]
        assert kernel.shape[0] == kernel.shape[1]
        return {**parameters, tower: {**parameters[tower], "projection": {"kernel": kernel.T}}}

    return change


def exchanged_query_and_key(parameters):
    blocks = parameters["text"]["transformer"]["blocks"]
    heads = jax.tree.map(lambda leaf: leaf[..., [1, 0, 2], :, :], blocks["attention"]["query_key_value"])
    attention = {**blocks["attention"], "query_key_value": heads}
    changed = {"blocks": {**blocks, "attention": attention}}
    return {**parameters, "text": {**parameters["text"], "transformer": changed}}


def exchanged_patch_axes(parameters):
    kernel = parameters["vision"]["patch_embedding"]["kernel"]
    side = round((kernel.shape[0] / 3) ** 0.5)
    turned = kernel.reshape(side, side, 3, -1).transpose(1, 0, 2, 3).reshape(kernel.shape)
    return {**parameters, "vision": {**parameters["vision"], "patch_embedding": {"kernel": turned}}}


WRONG_PARAMETERS = {
    "transposed image projection": transposed_projection("vision"),
    "transposed text projection": transposed_projection("text"),
    "query and key exchanged": exchanged_query_and_key,
    "rows and columns of patches exchanged": exchanged_patch_axes,
}


@pytest.fixture(scope="module")
def square(tmp_path_factory) -> Reference:
    """A reference whose widths are all equal, so that transposed matrices fit."""
    text = {**HF_TEXT, "hidden_size": 32, "num_attention_heads": 4}

    def make(folder: pathlib.Path) -> Reference:
        return hugging_face(folder, vision=HF_VISION, text=text, embed=32)

    return cached_reference("square", make, tmp_path_factory.mktemp("square"))


@pytest.mark.parametrize("fault", WRONG_PARAMETERS)
def test_a_wrong_layout_is_seen(fault, square):
    fields, parameters = loaded(square.path)
    assert max(differences(computed(fields, parameters, square), square).values()) < TOLERANCE
    found = differences(computed(fields, WRONG_PARAMETERS[fault](parameters), square), square)
    assert max(found.values()) > 2 * TOLERANCE, found


def test_the_authors_spelling_of_eva02_is_that_of_timms_own_converter(saved, tmp_path):
    """EVA-CLIP's authors name parts otherwise; `timm` reads their names, and here too they give the same model."""
    pytorch()
    from safetensors.torch import load_file, save_file
    from timm.models.eva import Eva, checkpoint_filter_fn

    reference = saved(EVA02)
    theirs = load_file(reference.path / "open_clip_model.safetensors")
    authors = {in_authors_spelling(name): tensor for name, tensor in theirs.items()}
    (tmp_path / "model").mkdir()
    save_file(authors, tmp_path / "model" / "eva.safetensors")

    model = Eva(img_size=42, num_classes=20, global_pool="token", **EVA02_TRUNK)
    back = checkpoint_filter_fn({n: tensor for n, tensor in authors.items() if n.startswith("visual.")}, model)
    assert {f"visual.trunk.{name}" for name in back} == {n for n in theirs if n.startswith("visual.")}
    found = differences(computed(*loaded(tmp_path / "model"), reference), reference)
    assert max(found.values()) < TOLERANCE, found


def in_authors_spelling(name: str) -> str:
    pairs = {
        "visual.trunk.": "visual.",
        "mlp.fc1_g": "mlp.w1",
        "mlp.fc1_x": "mlp.w2",
        "mlp.norm": "mlp.ffn_ln",
        "mlp.fc2": "mlp.w3",
        "attn.norm": "attn.inner_attn_ln",
        "q_proj.bias": "q_bias",
        "v_proj.bias": "v_bias",
    }
    for theirs, authors in pairs.items():
        name = name.replace(theirs, authors)
    return name


def test_both_conventions_for_the_end_of_text_give_the_reference_features(saved):
    """`eos_token_id: 2` pools at the highest id, any other at its first place: both are where this package pools."""
    for case in (HF, EXACT):
        reference = saved(case)
        config = (pathlib.Path(reference.path) / "config.json").read_text()
        assert ('"eos_token_id": 2' in config) == (case == HF)
        found = differences(computed(*loaded(reference.path), reference), reference)
        assert found["text features"] < TOLERANCE
