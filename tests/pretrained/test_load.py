"""Loading fills everything or nothing, in any precision, at any resolution, wherever the parameters are to lie."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from pytorch import pytorch
from safetensors.numpy import save_file
from saved_clip import FILE, flat, full_fields, on_one_device, rewrite, save_clip
from tiny_models import tiny_vlab

from vlab_jax.errors import InputError
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.pretrained import load
from vlab_jax.pretrained.convert import fit_positions
from vlab_jax.pretrained.load import check_model, format_origins, load_parameters, open_checkpoint
from vlab_jax.runtime import sharding

ROOT = pathlib.Path(__file__).parents[2]
CLIP = ("vision", "text", "logit_scale")


def load_tiny(folder: pathlib.Path, model: VLAB | None = None):
    """The CLIP parameters of a folder, for the tiny model or another, by path; and where they came from."""
    shapes = parameter_shapes(model or tiny_vlab(), 4)
    parameters, origins = load_parameters(open_checkpoint(str(folder)), shapes, on_one_device(shapes))
    return flat(parameters), origins


def clip_of(parameters) -> dict[str, np.ndarray]:
    return flat({part: parameters[part] for part in CLIP})


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for path, array in one.items():
        np.testing.assert_array_equal(array, other[path], err_msg=path)


def test_saved_parameters_are_loaded_bit_for_bit(tmp_path):
    _, parameters = save_clip(tmp_path)
    loaded, _ = load_tiny(tmp_path)
    assert_equal(loaded, clip_of(parameters))
    assert {array.dtype for array in loaded.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_load_as_float32_of_the_same_value(dtype, tmp_path):
    _, parameters = save_clip(tmp_path)
    rewrite(tmp_path, lambda tensors: {name: tensor.astype(dtype) for name, tensor in tensors.items()})
    loaded, _ = load_tiny(tmp_path)
    assert_equal(loaded, {p: a.astype(dtype).astype(np.float32) for p, a in clip_of(parameters).items()})


def test_integers_are_refused(tmp_path):
    save_clip(tmp_path)
    rewrite(tmp_path, lambda tensors: {**tensors, "logit_scale": tensors["logit_scale"].astype(np.int32)})
    with pytest.raises(InputError, match=r"^the tensor logit_scale in .* is of type I32; it must be floating point$"):
        load_tiny(tmp_path)


FC1, FINAL = "text_model.encoder.layers.1.mlp.fc1.weight", "text_model.final_layer_norm.bias"
DAMAGES = {
    "missing": (lambda t: {name: tensor for name, tensor in t.items() if name != FINAL}, f"missing: {FINAL}"),
    "transposed": (
        lambda t: {**t, FC1: t[FC1].T.copy()},
        f"of another shape: {FC1} is [16, 32] and should be [32, 16]",
    ),
    "beyond": (lambda t: {**t, "vision_model.extra": t[FINAL]}, "not used: vision_model.extra"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_placed(damage, tmp_path, monkeypatch):
    save_clip(tmp_path)
    change, said = DAMAGES[damage]
    rewrite(tmp_path, change)
    placed = []
    monkeypatch.setattr(load, "_place", lambda *given: placed.append(given))
    with pytest.raises(InputError) as raised:
        load_tiny(tmp_path)
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert placed == []


def test_sizes_that_disagree_are_listed_old_and_new_with_what_to_set(tmp_path):
    save_clip(tmp_path)
    asked = full_fields(vision={"width": 24, "activation": "gelu"}, text={"depth": 3})
    with pytest.raises(InputError) as raised:
        check_model(open_checkpoint(str(tmp_path)), asked)
    message = str(raised.value)
    assert "\n" not in message
    for difference in (
        "model.vision.width: 24 → 16",
        "model.vision.activation: gelu → quick_gelu",
        "model.text.depth: 3 → 2",
    ):
        assert difference in message
    assert "--config.model.vision.width=16" in message


def test_fields_that_the_file_does_not_show_are_taken_from_the_config_and_noted(tmp_path):
    save_clip(tmp_path)
    assert check_model(open_checkpoint(str(tmp_path)), full_fields()) == []
    (tmp_path / "config.json").unlink()
    notes = check_model(open_checkpoint(str(tmp_path)), full_fields())
    assert [note.split(" does not show ")[1] for note in notes] == [
        f"model.{tower}.{field}; the config's {value} is used"
        for tower in ("vision", "text")
        for field, value in (("heads", 2), ("activation", "quick_gelu"), ("epsilon", 1e-05))
    ]


def test_a_config_of_another_kind_of_model_is_refused(tmp_path):
    save_clip(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(InputError, match=r"config\.json describes a model of type 'siglip'; it must be 'clip'$"):
        open_checkpoint(str(tmp_path))


def test_positions_that_form_no_square_are_refused(tmp_path):
    save_clip(tmp_path)
    name = "vision_model.embeddings.position_embedding.weight"
    for count in (0, 4):
        rewrite(tmp_path, lambda tensors, count=count: {**tensors, name: np.zeros((count, 16), np.float32)})
        with pytest.raises(InputError, match=rf" has {count - 1} positions of patches, which do not form a square$"):
            open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("pixels", [[0.5, 0.5, 0.5], [0.5], 0.5])
def test_weights_that_need_other_pixels_are_refused(pixels, tmp_path):
    save_clip(tmp_path)
    for name, config, what in (
        ("open_clip_config.json", {"preprocess_cfg": {"std": pixels}}, "deviation"),
        ("preprocessor_config.json", {"image_mean": pixels}, "mean"),
    ):
        (tmp_path / name).write_text(json.dumps(config))
        with pytest.raises(InputError, match=rf"needs pixels of {what} {re.escape(str(pixels))}; known: CLIP's"):
            open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("asked", [{"resample": 2}, {"do_center_crop": False}], ids=["bilinear", "no crop"])
def test_weights_that_need_another_resizing_are_refused(asked, tmp_path):
    save_clip(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(asked))
    with pytest.raises(InputError, match=r"known: .*, as in CLIP$"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(("old", "new"), [(7, 7), (7, 14), (16, 24), (14, 7), (5, 3), (1, 4)])
def test_positions_are_interpolated_as_openclip_does(old, new):
    torch = pytorch()
    from open_clip.model import resize_pos_embed

    positions = np.random.default_rng(0).normal(size=(old * old + 1, 6)).astype(np.float32)
    state = {"visual.positional_embedding": torch.from_numpy(positions)}

    class Model:
        class visual:
            grid_size = (new, new)

    resize_pos_embed(state, Model())
    ours = fit_positions(positions, new * new + 1)
    # Both are in float32, and up to 4e-6 off the exact values, by the processor's own vector instructions.
    np.testing.assert_allclose(ours, state["visual.positional_embedding"].numpy(), atol=1e-5)


def test_another_resolution_and_shorter_texts_are_made_to_fit_and_noted(tmp_path):
    _, parameters = save_clip(tmp_path)
    changes = {"vision": {"image_size": 32}, "text": {"context_length": 5}}
    assert check_model(open_checkpoint(str(tmp_path)), full_fields(**changes)) == [
        "model.vision.image_size is 32 where the checkpoint has 16: positions are interpolated",
        "model.text.context_length is 5 where the checkpoint has 8: the first 5 positions are used",
    ]
    loaded, origins = load_tiny(tmp_path, tiny_vlab(**full_fields(**changes)))
    old = clip_of(parameters)
    np.testing.assert_array_equal(loaded["text/position_embedding"], old["text/position_embedding"][:5])
    np.testing.assert_array_equal(
        loaded["vision/position_embedding"], fit_positions(old["vision/position_embedding"], 17)
    )
    changed = {origin.target: origin.change for origin in origins if origin.change}
    assert changed == {
        "vision/position_embedding": "interpolated from 2 x 2 to 4 x 4 patches",
        "text/position_embedding": "the first 5 of 8 positions",
    }
    with pytest.raises(InputError, match=r"context_length is 9; the checkpoint has 8 positions, so set it to 8$"):
        check_model(open_checkpoint(str(tmp_path)), full_fields(text={"context_length": 9}))


@pytest.mark.eight_devices
def test_parameters_lie_where_the_mesh_says(tmp_path):
    _, parameters = save_clip(tmp_path)
    shapes = parameter_shapes(tiny_vlab(), 4)
    placement = sharding.shardings(shapes, sharding.make_mesh(data=2, fsdp=2, tensor=2))
    loaded, _ = load_parameters(open_checkpoint(str(tmp_path)), shapes, placement)
    assert_equal(flat(loaded), clip_of(parameters))
    wanted = {part: placement[part] for part in CLIP}
    assert jax.tree.all(jax.tree.map(lambda leaf, place: leaf.sharding == place, loaded, wanted))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(loaded))


def test_the_table_shows_where_parameters_come_from(tmp_path):
    save_clip(tmp_path)
    _, origins = load_tiny(tmp_path)
    lines = format_origins(origins, {"video_adapter/before_attention": (1234, "new")}).splitlines()
    assert sum(origin.size for origin in origins) == sum(a.size for a in load_tiny(tmp_path)[0].values())
    (fc1,) = (line for line in lines if line.startswith("text/transformer/blocks/mlp/input "))
    assert fc1.split() == ["text/transformer/blocks/mlp/input", "1,088", "text_model.encoder.layers.*.mlp.fc1"]
    assert lines[-1].split() == ["video_adapter/before_attention", "1,234", "new"]


MEASURE = """
import re, sys
import jax, numpy as np
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.pretrained.load import load_parameters, open_checkpoint
from vlab_jax.runtime import sharding

pretrained = open_checkpoint(sys.argv[1])
fields = {"vision": pretrained.architecture.vision, "text": pretrained.architecture.text}
heads = {"vision": {"heads": 16}, "text": {"heads": 12}}
fields = {tower: {**fields[tower], **heads[tower]} for tower in fields}  # the file alone does not show them
fields |= {"adapter": {"blocks": (), "before_mlp": False}, "decoder": {"blending": "none"}, "frames": 1}
shapes = parameter_shapes(VLAB.from_fields(fields), 1)
placement = sharding.shardings(shapes, sharding.make_mesh(data=1, fsdp=-1))
jax.block_until_ready(jax.device_put(np.zeros(8)))
def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

before = kilobytes("VmRSS")
loaded, _ = load_parameters(pretrained, shapes, placement)
jax.block_until_ready(loaded)
peak = (kilobytes("VmHWM") - before) * 1024
print(peak / sum(leaf.nbytes for leaf in jax.tree.leaves(loaded)))
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize("devices", [1, 4])
def test_loading_l14_takes_little_more_memory_than_its_parameters(devices, large, tmp_path):
    """Peak of the process's memory, mapped files included, over the size of the float32 parameters."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    ratio = float(done.stdout)
    print(f"ViT-L/14 on {devices} devices: peak {ratio:.3f} x the parameters")
    assert 0.9 < ratio < 1.3


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> pathlib.Path:
    """A checkpoint of the shape of ViT-L/14, in float32: 1.7 GB."""
    from configs.sizes import SIZES
    from vlab_jax.pretrained import hugging_face

    folder = tmp_path_factory.mktemp("l14")
    sizes = full_fields(**{group: SIZES["l14"][group] for group in ("vision", "text")})
    shapes = {path: leaf.shape for path, leaf in flat_shapes(tiny_vlab(**sizes, adapter={"blocks": ()})).items()}
    tensors = {}
    for rule in hugging_face.rules():
        shape = shapes[rule.target]
        for names in rule.source_names(shape):
            for name, part in zip(names, rule.source_shapes(shape), strict=True):
                tensors[name] = np.full(part, 0.01, np.float32)
    save_file(tensors, folder / FILE)
    return folder / FILE


def flat_shapes(model: VLAB):
    from flax.traverse_util import flatten_dict

    return flatten_dict(parameter_shapes(model, 1), sep="/")
