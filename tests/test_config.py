"""Mistakes in a config: each is one line that names the field, the mistake and what would be right."""

import copy
import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
import tiny_run
from ml_collections import ConfigDict
from saved_clip import save_clip

from vlab_jax import config as configuration
from vlab_jax import config_check, main
from vlab_jax.errors import InputError
from vlab_jax.models.towers import TextTower, VisionTower
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.pretrained.export import write_vlab
from vlab_jax.runtime.checkpoint import Checkpoints
from vlab_jax.training import optim
from vlab_jax.training.setup import check_workdir


@pytest.fixture
def config() -> ConfigDict:
    return tiny_run.get_config()


def set_field(config: ConfigDict, name: str, value: object) -> None:
    """Sets `a.b.c`, new fields too."""
    *groups, last = name.split(".")
    with config.unlocked():
        for group in groups:
            config = config[group]
        if last in config:
            del config[last]  # so that a value of another type can take its place
        config[last] = value


def refusal(config: ConfigDict) -> str:
    """The message of `check`."""
    with pytest.raises(InputError) as raised:
        config_check.check(config)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def fields(tree: ConfigDict, prefix: str = "") -> list[str]:
    """The names of all fields."""
    names = []
    for key, value in tree.items():
        names += fields(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [f"{prefix}{key}"]
    return names


# Checks before anything runs


def test_the_configs_of_the_repository_are_in_order(config):
    from configs import evaluate, pretrain
    from configs.sizes import SIZES

    config_check.check(config)
    config_check.check(evaluate.get_config())
    for argument in [*SIZES, "tiny,no_adapter", "long", "b16,end_to_end", "l14,data=folder:/my/videos", ""]:
        config_check.check(pretrain.get_config(argument))
    changed = pretrain.get_config("b16,data=folder:/my/videos,no_adapter")
    assert changed.data.evaluate == "folder:/my/videos" and changed.model.adapter.blocks == "none"


@pytest.mark.parametrize("size", ["tiny", "b16"])
def test_blending_leaves_the_image_encoder_as_it_was_unless_all_learns_end_to_end(size):
    from configs import pretrain

    for argument, learning in ((size, {False}), (f"{size},end_to_end", {True})):
        made = pretrain.get_config(argument)
        shapes = parameter_shapes(VLAB.from_fields(configuration.model_fields(configuration.plain(made.to_dict()))), 8)
        learns = optim.trainable_mask(shapes, optim.parse_groups(made.stage.blend.groups))
        assert set(jax.tree.leaves(learns.get("image_encoder", learns["vision"]))) == learning
        assert all(jax.tree.leaves({part: tree for part, tree in learns.items() if part != "image_encoder"}))


def test_every_misspelled_field_is_named_with_the_nearest_known_one(config):
    names = [name for name in fields(config) if len(name.split(".")[-1]) > 3]
    assert len(names) > 60
    for name in names:
        wrong = tiny_run.get_config()
        set_field(wrong, f"{name}{name[-1]}", 1)
        group, _, last = name.rpartition(".")
        assert refusal(wrong) == (
            f"unknown key {last + last[-1]!r} in {'config.' + group if group else 'config'}; did you mean {last!r}?"
        )


def test_a_field_unlike_any_is_answered_with_the_known_ones(config):
    set_field(config, "mesh.zzz", 1)
    assert refusal(config) == "unknown key 'zzz' in config.mesh; known: data, fsdp, tensor"


def test_every_field_that_is_missing_is_named(config):
    names = [name for name in fields(config) if name != "task"]
    for name in names:
        wrong = tiny_run.get_config()
        with wrong.unlocked():
            group = wrong
            *groups, last = name.split(".")
            for key in groups:
                group = group[key]
            del group[last]
        if not name.startswith("stage."):
            assert refusal(wrong).startswith(f"config.{name} is missing; its default is ")


@pytest.mark.parametrize(
    ("name", "value", "must"),
    [
        ("seed", "abc", "be of type int, like 0"),
        ("seed", 1.5, "be of type int, like 0"),
        ("seed", True, "be of type int, like 0"),
        ("stage.adapt.steps", None, "be of type int, like 1000"),
        ("stage.adapt.weight_decay", "1", "be of type float, like 0.05"),
        ("model.adapter.before_mlp", 0, "be of type bool, like False"),
        ("data.train", "motion", "be of type tuple, like ('motion',)"),
        ("data.train", (1,), "be of type tuple, like ('motion',)"),
        ("stages", (1,), "be of type tuple, like ()"),
        ("stage.adapt.groups", (3,), "be of type tuple, like (('.*', 0.0001),)"),
        ("model", 3, "be a group of fields"),
        ("task", "trian", "be 'train' or 'evaluate'"),
        ("dtype", "fp16", "be one of float32, bfloat16"),
        ("model.adapter.mixer", "lstm", "be one of conv, attention"),
        ("model.decoder.blending", "blend", "be one of concat, parallel, stacked, none, image_only"),
        ("data.short", "skip", "be one of repeat, fail"),
        ("model.frame_pooling", "max", "be one of mean_then_normalise, normalise_then_mean"),
        ("stage.blend.unused", "train", "be one of decay, frozen"),
        ("seed", -1, "be at least 0"),
        ("log_every", 0, "be at least 1"),
        ("checkpoint.every", 0, "be at least 1"),
        ("data.max_failed_share", 5.0, "be from 0.0 to 1.0"),
        ("stage.blend.average_decay", 1.5, "be from 0.0 to 1.0"),
        ("stage.blend.batch_size", 0, "be at least 1"),
        ("stage.blend.masked_share", float("nan"), "be from 0.0 to 1.0"),
        ("model.vision.heads", 0, "be at least 1"),
        ("image_frames", 5, "be from 1 to config.frames=4"),
        ("model.adapter.kernel", (2, 1, 1), "be three odd numbers (t, h, w)"),
        ("model.decoder.cross_attention_every", 3, "be from 1 to 2"),
        ("stage.adapt.streams", ("audio",), "name 'video', 'image' or both"),
    ],
)
def test_a_value_that_a_field_cannot_have_is_answered_with_what_it_can(config, name, value, must):
    set_field(config, name, value)
    assert refusal(config) == f"config.{name} is {value!r}; it must {must}"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.vision.heads", 3, "config.model.vision.width=16 does not divide by heads=3"),
        ("frames", 0, "config.image_frames is 2; it must be from 1 to config.frames=0"),
        ("model.vision.image_size", 20, "config.model.vision.image_size=20 does not divide by patch_size=8"),
        ("model.text.embed_width", 8, "embed_width=16 and config.model.text.embed_width=8 must be equal"),
        ("stages", (), "config.stages is (); name at least one stage of config.stage, each once"),
        ("stages", ("adapt", "adapt"), "('adapt', 'adapt'); name at least one stage of config.stage, each once"),
        ("stages", ("warm",), "names 'warm', but config.stage has no such stage (it has: adapt, blend)"),
    ],
)
def test_values_that_contradict_each_other_are_both_named(config, name, value, message):
    set_field(config, name, value)
    assert refusal(config).endswith(message)


def test_whole_numbers_and_lists_are_taken_for_floats_and_tuples(config):
    config.stage.adapt.clip_norm = 1
    set_field(config, "data.train", ["motion/tiny"])
    config_check.check(config)


def test_a_stage_without_objectives_is_refused(config):
    config.stage.blend.objectives.update({"contrastive": 0.0, "captioning": 0.0, "masked_lm": 0.0})
    assert refusal(config) == "config.stage.blend.objectives are all 0; give at least one of them a weight"


def test_a_stage_is_made_of_known_fields_alone():
    with pytest.raises(InputError, match=r"^unknown key 'stepz' in stage_config; did you mean 'steps'\?$"):
        configuration.stage_config(stepz=3)


@pytest.mark.parametrize(("group", "tower"), [("vision", VisionTower), ("text", TextTower)])
def test_the_fields_of_a_tower_are_those_of_its_class_with_their_defaults(group, tower):
    computation = {"remat", "unroll", "dtype", "kernels", "parent", "name"}
    known = {field.name: field.default for field in dataclasses.fields(tower) if field.name not in computation}
    configured = configuration.training_config().model[group].to_dict()
    assert configured.keys() == known.keys()
    defaults = {name: value for name, value in known.items() if value is not dataclasses.MISSING}
    assert len(defaults) > 2 and {name: configured[name] for name in defaults} == defaults


# Which blocks carry an adapter


@pytest.mark.parametrize(
    ("spec", "blocks"),
    [
        ("all", (0, 1, 2, 3, 4, 5)),
        ("none", ()),
        ("every:1", (0, 1, 2, 3, 4, 5)),
        ("every:2", (1, 3, 5)),
        ("every:6", (5,)),
        ("last:2", (4, 5)),
        ("0,4", (0, 4)),
        ("4, 0,4", (0, 4)),
        ("3", (3,)),
    ],
)
def test_blocks_are_chosen_by_a_word_or_by_numbers(spec, blocks):
    assert configuration.adapted_blocks(spec, 6) == blocks


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "al",
        "all:2",
        "every",
        "every:0",
        "every:-1",
        "every:7",
        "every:x",
        "last:0",
        "last:7",
        "6",
        "-1",
        "0,,2",
        "1.",
    ],
)
def test_blocks_that_do_not_exist_are_refused(config, spec):
    must = "all, none, every:n, last:n or numbers from 0 to 1 as in '0,2'"
    config.model.adapter.blocks = spec
    assert refusal(config) == f"config.model.adapter.blocks is {spec!r}; it must be {must}"


# Mistakes that show only with the model, the devices, the data or the workdir


def refused(config: ConfigDict, workdir: pathlib.Path | None) -> str:
    """The message of `main` about a config that passes `check` and cannot run."""
    with pytest.raises(InputError) as raised:
        main.run(config, None if workdir is None else str(workdir), None)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (((r"^visoin/", "frozen"), (".*", 1e-3)), "the frozen pattern '^visoin/' matches no parameter"),
        ((("^vision/", 1e-3),), "no parameter group matches "),
        (((".*", "forzen"),), "parameter group ('.*', 'forzen') must be (pattern, learning rate or 'frozen'): "),
        (((".*",),), "parameter group ('.*',) must be (pattern, learning rate or 'frozen'): "),
        ((("(", 1e-3),), "parameter group ('(', 0.001) must be (pattern, learning rate or 'frozen'): "),
    ],
)
def test_groups_that_do_not_fit_the_model_are_refused_before_any_stage_is_trained(config, tmp_path, groups, message):
    set_field(config, "stage.blend.groups", groups)  # of the last stage
    assert refused(config, tmp_path).startswith(f"config.stage.blend.groups: {message}")


@pytest.mark.eight_devices
def test_a_batch_that_does_not_divide_over_the_devices_is_refused(config, tmp_path):
    config.stage.blend.batch_size = 12
    assert refused(config, tmp_path) == (
        "config.stage.blend.batch_size=12 does not divide over the 8 devices that share the batch"
    )


def test_a_decoder_that_uses_none_of_a_stage_s_streams_is_refused(config):
    config.model.decoder.blending = "image_only"
    assert refusal(config).startswith("config.stage.adapt.streams is ('video',), of which the decoder uses none")
    config.stage.adapt.objectives.update({"captioning": 0.0, "masked_lm": 0.0})
    config_check.check(config)


@pytest.mark.eight_devices
def test_a_mesh_that_the_devices_do_not_fill_is_refused(config, tmp_path):
    config.mesh.tensor = 3
    assert re.match(r"the mesh .*tensor=3 does not fit 8 devices", refused(config, tmp_path))


def test_data_that_does_not_exist_is_refused_before_training(config, tmp_path):
    config.data.evaluate = "moton"
    assert "did you mean 'motion'" in refused(config, tmp_path)
    set_field(config, "data.evaluate", "folder:/no/such/folder")
    assert "/no/such/folder" in refused(config, tmp_path / "other")


def test_a_workdir_of_another_config_is_refused_with_the_fields_that_differ(config, tmp_path):
    saved = configuration.plain(configuration.resolved(config).to_dict())
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, {"parameters": jnp.zeros(2)}, {"total": 3}, saved)
    config.stage.blend.steps = 7
    config.model.adapter.mixer = "attention"
    config.log_every, config.data.workers, config.data.max_failed_share = 5, 1, 0.5  # free to differ
    config.data.prefetch_gigabytes = 1.0
    message = refused(config, tmp_path)
    assert message == (
        f"{tmp_path} holds a run of another config; use another --workdir, or set back: "
        "model.adapter.mixer: 'conv' → 'attention'; stage.blend.steps: 4 → 7"
    )


def test_a_workdir_from_before_a_field_was_there_goes_on_where_the_field_is_at_its_default(config, tmp_path):
    now = configuration.plain(configuration.resolved(config).to_dict())
    before = copy.deepcopy(now)
    del before["model"]["frame_pooling"], before["stage"]["blend"]["unused"], before["checkpoint"]["keep"]
    assert VLAB.from_fields(configuration.model_fields(before)) == VLAB.from_fields(configuration.model_fields(now))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, {"parameters": jnp.zeros(2)}, {"total": 3}, before)
        check_workdir(checkpoints, now)
        now["stage"]["blend"]["unused"] = "frozen"
        with pytest.raises(InputError, match=r"set back: stage\.blend\.unused: 'decay' → 'frozen'$"):
            check_workdir(checkpoints, now)


def test_a_workdir_that_is_missing_or_cannot_be_made_is_refused(config, tmp_path):
    assert refused(config, None) == "to train, say where checkpoints and the report go: --workdir=<directory>"
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        path = tmp_path / name
        assert re.fullmatch(rf"--workdir={re.escape(str(path))} cannot be created: [\w ]+", refused(config, path))


def test_an_evaluation_without_a_checkpoint_is_refused(tmp_path):
    made = configuration.evaluation_config()
    assert refused(made, None).startswith("to evaluate, say of which run: --checkpoint=")
    with pytest.raises(InputError, match=r"^no checkpoint at "):
        main.run(made, None, str(tmp_path))


def test_a_config_from_a_clip_takes_its_sizes_and_from_an_export_the_whole_model(tmp_path):
    from configs.captioning import get_config as captioning
    from configs.pretrain import get_config as pretrain

    _, parameters = save_clip(tmp_path / "clip")
    made = pretrain(f"pretrained={tmp_path / 'clip'}")
    assert (made.model.vision.width, made.model.adapter.width, made.model.pretrained) == (16, 8, str(tmp_path / "clip"))
    config_check.check(made)
    training = configuration.plain(made.to_dict())
    training["frames"], training["data"]["train"] = 5, ["motion/tiny"]
    training["model"]["decoder"]["blending"] = "parallel"
    (tmp_path / "vlab").mkdir()
    write_vlab(tmp_path / "vlab", parameters, {"training": training})
    for get_config in (captioning, pretrain):
        made = get_config(f"pretrained={tmp_path / 'vlab'}")
        config_check.check(made)
        assert (made.frames, made.data.train, made.model.decoder.blending) == (5, ("motion/tiny",), "parallel")
    assert captioning(f"pretrained={tmp_path / 'vlab'},data=folder:/x").data.evaluate == "folder:/x"
    kept = ("^(image_encoder)", "frozen")  # as pre-training kept it
    assert captioning(f"pretrained={tmp_path / 'vlab'}").stage.captioning.groups[0] == kept
    assert kept not in captioning(f"end_to_end,pretrained={tmp_path / 'vlab'}").stage.captioning.groups
    with pytest.raises(InputError, match=r"^configs/captioning\.py needs pretrained=<weights>"):
        captioning("data=folder:/x")


@pytest.mark.parametrize("tasks", [(), ("retrieving",)])
def test_an_unknown_task_is_refused(config, tasks):
    config.evaluation.tasks = tasks
    known = "retrieval, captioning, question_answering"
    assert re.fullmatch(rf"config\.evaluation\.tasks is .*; it must name one or more of {known}", refusal(config))
    config.evaluation.tasks = ("retrieval",)
    config.stage.blend.evaluate = ("retrieving",)
    assert re.fullmatch(rf"config\.stage\.blend\.evaluate is .*; it must name one or more of {known}", refusal(config))


def test_only_the_tiny_model_is_trained_long():
    from configs import pretrain

    with pytest.raises(InputError, match="`long` is for the tiny model"):
        pretrain.get_config("b16,long")
