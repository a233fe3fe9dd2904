"""What is exported is read back bit for bit, here and by `transformers`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pytorch import pytorch
from safetensors.numpy import load_file
from saved_clip import FILE, flat, full_fields, on_one_device, save_clip
from tiny_models import ADAPTER, DECODER, random_parameters, random_video, tiny_vlab

from vlab_jax.errors import InputError
from vlab_jax.models.vlab import parameter_shapes
from vlab_jax.pretrained.export import model_card, new_folder, write_hugging_face, write_vlab
from vlab_jax.pretrained.load import check_model, load_parameters, open_checkpoint

TRAINING = {
    "frames": 4,
    "stages": ["adapt"],
    "stage": {"adapt": {"steps": 8, "batch_size": 4, "train": [], "streams": ["video"]}},
    "data": {"train": ["motion"], "evaluate": "motion"},
}


def training_fields() -> dict:
    """The config of a run, as an export keeps it."""
    return {**TRAINING, "model": {**full_fields(), "adapter": ADAPTER, "decoder": DECODER}}


def test_a_whole_vlab_comes_back_bit_for_bit(tmp_path):
    model = tiny_vlab()
    parameters = random_parameters(model)
    write_vlab(tmp_path, parameters, {"training": training_fields()})
    opened = open_checkpoint(str(tmp_path))
    assert opened.whole
    assert check_model(opened, training_fields()["model"]) == []
    shapes = parameter_shapes(model, 4)
    loaded, _ = load_parameters(opened, shapes, on_one_device(shapes))
    assert jax.tree.structure(loaded) == jax.tree.structure(parameters)
    for path, array in flat(parameters).items():
        np.testing.assert_array_equal(flat(loaded)[path], array, err_msg=path)


def test_an_export_fits_another_number_of_frames_and_computes_there_what_it_computed(tmp_path):
    adapter = {**ADAPTER, "mixer": "attention"}
    model, longer = tiny_vlab(adapter=adapter), tiny_vlab(adapter=adapter, frames=6)
    parameters = random_parameters(model)
    training = training_fields()
    training["model"]["adapter"] = adapter
    write_vlab(tmp_path, parameters, {"training": training})
    shapes = parameter_shapes(longer, 6)
    loaded, origins = load_parameters(open_checkpoint(str(tmp_path)), shapes, on_one_device(shapes))
    changed = {origin.target for origin in origins if origin.change == "interpolated from 4 to 6 frames"}
    assert len(changed) == 3 and all(path.endswith("frame_position") for path in changed)

    def logits(model, parameters):
        def run(module, video, tokens):
            return module.decode(tokens, module.encode_visual(video, ("video",), ()).streams, causal=True)

        given = (random_video(2, frames=6), jnp.ones((2, 8), jnp.int32))
        return jax.jit(lambda p: model.apply({"params": p}, *given, method=run))(parameters)

    np.testing.assert_allclose(logits(longer, loaded), logits(model, parameters), atol=1e-4)


def test_another_adapter_or_blending_is_refused(tmp_path):
    write_vlab(tmp_path, random_parameters(tiny_vlab()), {"training": training_fields()})
    asked = training_fields()["model"]
    asked = {
        **asked,
        "adapter": {**asked["adapter"], "mixer": "attention"},
        "decoder": {**DECODER, "blending": "stacked"},
    }
    with pytest.raises(InputError) as raised:
        check_model(open_checkpoint(str(tmp_path)), asked)
    assert "model.adapter.mixer: attention → conv" in str(raised.value)
    assert "model.decoder.blending: stacked → concat" in str(raised.value)


def test_an_export_without_its_config_is_refused(tmp_path):
    write_vlab(tmp_path, random_parameters(tiny_vlab()), {"training": training_fields()})
    for text in (None, "{}", json.dumps({"model_type": "clip"})):
        (tmp_path / "config.json").unlink() if text is None else (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"lacks the config\.json of a VLAB export"):
            open_checkpoint(str(tmp_path))


def test_transformers_loads_the_exported_clip_and_computes_the_same(tmp_path):
    torch = pytorch()
    from parity import computed
    from reference_models import Reference
    from transformers import CLIPModel

    _, parameters = save_clip(tmp_path)
    model, report = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    tokens, lengths = (
        np.array([[38, 5, 6, 39, 0, 0, 0, 0], [38, 7, 8, 9, 1, 2, 3, 39]], np.int32),
        np.array([4, 8], np.int32),
    )
    ours = computed(full_fields(), parameters, Reference(tmp_path, images, tokens, lengths, {}))
    with torch.no_grad():
        pixels, ids = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(tokens).long()
        theirs = model.eval()(input_ids=ids, pixel_values=pixels).logits_per_text.numpy()
    np.testing.assert_allclose(ours["logits"], theirs, atol=1e-4)


def test_a_clip_of_transformers_goes_through_unchanged(tmp_path):
    """Saved by `transformers`, loaded here, exported: the same tensors, bit for bit."""
    pytorch()
    from reference_models import HF_TEXT, HF_VISION, hugging_face

    reference = hugging_face(tmp_path / "theirs", vision=HF_VISION, text=HF_TEXT)
    opened = open_checkpoint(str(reference.path))
    fields = {"vision": opened.architecture.vision, "text": opened.architecture.text}
    shapes = parameter_shapes(tiny_vlab(**fields, adapter={"blocks": ()}), 4)
    loaded, _ = load_parameters(opened, shapes, on_one_device(shapes))
    (tmp_path / "ours").mkdir()
    write_hugging_face(tmp_path / "ours", loaded, fields["vision"], fields["text"], 97, 98)
    theirs, ours = load_file(reference.path / FILE), load_file(tmp_path / "ours" / FILE)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(tensor, ours[name], err_msg=name)


def test_an_eva_tower_is_not_exported_as_what_it_is_not(tmp_path):
    model = tiny_vlab(vision={"key_bias": False, "pre_norm": False})
    parameters = random_parameters(model)
    fields = full_fields(vision={"key_bias": False, "pre_norm": False})
    with pytest.raises(InputError, match=r"has no vision tower with model\.vision\.pre_norm=False, .*key_bias=False"):
        write_hugging_face(tmp_path, parameters, fields["vision"], fields["text"], 1, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_when_it_is_complete_and_never_replaces_another(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    with pytest.raises(InputError, match=r"out exists already; name another directory"), new_folder(tmp_path / "out"):
        pass


def test_an_export_is_replaced_where_that_is_asked_for_and_nothing_else_ever_is(tmp_path):
    def write(text: str, replace: bool) -> None:
        with new_folder(tmp_path / "out", replace) as folder:
            (folder / "README.md").write_text(model_card("vlab", TRAINING, 8, {}, None))
            (folder / text).write_text(text)
            assert text != "half"

    write("first", True)
    write("second", True)
    with pytest.raises(AssertionError):
        write("half", True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "second"]
    (tmp_path / "out" / "README.md").write_text("# Another's\n")
    with pytest.raises(InputError, match=r"out exists already, and is not an export to replace"):
        write("third", True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_card_names_data_stages_figures_and_the_base_weights_licence():
    base = {"name": "someone/clip", "format": "OpenCLIP", "licence": "mit"}
    card = model_card("vlab", TRAINING, 8, {"adapt (test)": {"text_to_video/R@1": 12.34}}, base)
    assert card.startswith("---\nlicense: mit\n")
    for text in ("someone/clip (OpenCLIP); licence: mit", "| adapt | 8 | 4 | `motion` | video |", "12.3", "step 8"):
        assert text in card
    assert "trained from random parameters" in model_card("clip", TRAINING, 8, {}, None)
    unknown = model_card("vlab", TRAINING, 8, {}, {**base, "licence": "not stated in its files"})
    assert unknown.startswith("---\nlicense: unknown\n") and "licence: not stated in its files" in unknown
