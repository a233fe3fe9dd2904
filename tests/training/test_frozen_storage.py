"""Frozen parameters lie on the devices in the compute type, and nothing is rounded for good."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from run_files import saved_state
from safetensors.numpy import load_file
from saved_clip import flat
from tiny_models import quick_jit, random_batch, random_parameters, tiny_vlab

from vlab_jax.config import stage_config, training_config
from vlab_jax.export import export
from vlab_jax.runtime import sharding
from vlab_jax.training import frozen, loop, setup
from vlab_jax.training import stage as stages
from vlab_jax.training.objectives import Objective

ADAPTING = (("^(video_adapter|decoder)/", 1e-2), (".*", "frozen"))
NORMS = "/norm/"


def prepared(dtype: str, groups=ADAPTING, average_decay: float = 0.0):
    """A stage of the tiny model, that adapts."""
    config = training_config()
    config.frames, config.image_frames = 4, 4
    config.stage.adapt = stage_config(
        batch_size=8,
        groups=groups,
        objectives={"contrastive": 1.0, "captioning": 1.0, "masked_lm": 1.0},
        average_decay=average_decay,
        warmup_steps=0,
    )
    model = tiny_vlab(dtype=dtype)
    return stages.prepare(model, setup.read_stage(config, "adapt"), sharding.make_mesh()), model


def placed(stage, seed: int = 0):
    """Parameters where the stage has them, in float32."""
    parameters = random_parameters(tiny_vlab(), seed)
    return jax.device_put(jax.tree.map(np.asarray, parameters), stage.shardings.parameters)


def on_devices(tree) -> int:
    """The bytes of a tree's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_frozen_parameters_of_products_are_held_in_the_compute_type():
    stage, _ = prepared("bfloat16")
    parameters = placed(stage)
    originals = stage.originals(parameters)
    held = flat(stage.initial(parameters).parameters)
    for path, leaf in held.items():
        trains = path.startswith(("video_adapter/", "decoder/"))
        product = path.endswith(("kernel", "token_embedding")) or (path.endswith("bias") and NORMS not in path)
        assert (leaf.dtype == jnp.bfloat16) == (product and not trains), path
    rounded = {path for path, leaf in held.items() if leaf.dtype == jnp.bfloat16}
    assert {path for path, leaf in flatten_dict(originals, sep="/").items() if leaf is not None} == rounded
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(originals)} == {"pinned_host"}


def test_in_float32_nothing_is_rounded_and_no_copy_is_kept():
    stage, _ = prepared("float32")
    parameters = placed(stage)
    assert not jax.tree.leaves(stage.originals(parameters))
    assert {leaf.dtype for leaf in jax.tree.leaves(stage.initial(parameters).parameters)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_old_parameters_stay_on_the_devices_when_a_stage_starts(dtype):
    stage, _ = prepared(dtype)
    parameters = placed(stage)
    gc.collect()
    before = {id(array) for array in jax.live_arrays()} - {id(leaf) for leaf in jax.tree.leaves(parameters)}
    originals = stage.originals(parameters)
    state = stage.initial(parameters)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(parameters))
    held = {id(leaf) for leaf in jax.tree.leaves((state, originals))}
    left = [a for a in jax.live_arrays() if id(a) not in before | held and not a.is_deleted() and a.size > 1]
    assert not left


def test_optimiser_and_average_are_of_trainable_parameters_alone():
    stage, _ = prepared("float32", average_decay=0.9)
    state = stage.initial(placed(stage))
    trained = on_devices([state.parameters[part] for part in ("video_adapter", "decoder")])
    assert on_devices(state.average) == trained
    assert 2 * trained <= on_devices(state.optimizer) < 2 * trained + 1000  # two moments, and counts
    assert flat(state.evaluated).keys() == flat(state.parameters).keys()


def test_held_parameters_give_the_same_step_as_float32_ones():
    """To the bit: rounded parameters would be rounded before use anyway."""
    stage, model = prepared("bfloat16")
    parameters = placed(stage)
    objective = Objective({"contrastive": 1.0, "captioning": 1.0}, ("video", "image"), (0, 1, 2, 3))
    loss = quick_jit(lambda p: objective(model, p, random_batch(8), jax.random.key(0))[1])
    exact = loss(parameters)
    held = loss(stage.initial(parameters).parameters)
    assert {name: float(x) for name, x in exact.items()} == {name: float(x) for name, x in held.items()}


@pytest.fixture
def from_clip(config, clip):
    """In bfloat16, `adapt` with a frozen CLIP, then `blend`, where all of it is trained."""
    config.stage.adapt.steps = 2
    config.model.pretrained, config.tokenizer.kind = str(clip[0]), "bpe"
    config.dtype = "bfloat16"
    config.model.image_encoder = "separate"
    config.evaluation.batch_size = 8
    return config


def starts(monkeypatch) -> list:
    """The parameters that stages start from, by path, in their order."""
    seen = []
    keep_originals = frozen.keep_originals

    def noted(parameters, *arguments):
        seen.append(flat(parameters))
        return keep_originals(parameters, *arguments)

    monkeypatch.setattr(frozen, "keep_originals", noted)
    return seen


def assert_is_clip(found: dict[str, np.ndarray], clip: dict[str, np.ndarray]) -> None:
    for path, leaf in clip.items():
        assert found[path].dtype == np.float32, path
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.mark.long
def test_clip_is_the_loaded_files_to_the_bit_after_a_stage_that_froze_it(from_clip, clip, tmp_path, monkeypatch):
    """Where `blend` begins, in the checkpoint, in the export; and all of it again where `adapt` was interrupted."""
    seen = starts(monkeypatch)
    from_clip.stop_after = 1
    loop.train(from_clip, tmp_path)
    saved = {path[len("['parameters']") :]: leaf for path, leaf in saved_state(tmp_path, 1).items()}
    assert_is_clip({path.strip("[]'").replace("']['", "/"): leaf for path, leaf in saved.items()}, clip[1])
    export(tmp_path, tmp_path / "exported")
    assert_is_clip(exported(tmp_path / "exported"), clip[1])
    from_clip.stop_after = 3
    loop.train(from_clip, tmp_path)
    before, resumed, blend = seen
    for start in (before, resumed, blend):
        assert_is_clip(start, clip[1])
    assert not np.array_equal(blend["decoder/token_embedding"], before["decoder/token_embedding"])


def exported(folder) -> dict[str, np.ndarray]:
    """An export's parameters, by path."""
    return {name.replace(".", "/"): leaf for name, leaf in load_file(folder / "model.safetensors").items()}
