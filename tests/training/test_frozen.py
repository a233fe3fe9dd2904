"""Parameters that a stage does not use, and parts that pre-training froze: they are not trained and do not decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import FRAMES, largest_difference, quick_jit, random_batch, random_parameters, tiny_vlab

from vlab_jax.config import stage_config, training_config
from vlab_jax.models.vlab import parameter_shapes
from vlab_jax.training import optim, setup
from vlab_jax.training import stage as stages
from vlab_jax.training.frozen import freeze_unused, frozen_clip_parts
from vlab_jax.training.objectives import Objective
from vlab_jax.training.step import init_state, make_train_step

BOTH, VIDEO = ("video", "image"), ("video",)
RETRIEVAL, CAPTIONING = {"contrastive": 1.0}, {"captioning": 1.0}
ALL = {**RETRIEVAL, **CAPTIONING, "masked_lm": 1.0}
EVERYTHING = optim.parse_groups(((".*", 1e-2),))


def trained(model, weights, streams) -> dict[str, bool]:
    """By path, whether a parameter is trainable where only unused ones are frozen."""
    shapes = parameter_shapes(model, FRAMES)
    groups = freeze_unused(shapes, EVERYTHING, model, weights, streams)
    return flatten_dict(optim.trainable_mask(shapes, groups), sep="/")


@pytest.mark.parametrize(
    ("weights", "streams", "changes"),
    [
        (RETRIEVAL, BOTH, {"image_encoder": "separate", "embedding_blend": 0.0}),
        (CAPTIONING, BOTH, {"image_encoder": "separate", "decoder": {"blending": "stacked"}}),
        (CAPTIONING, VIDEO, {"image_encoder": "separate", "decoder": {"blending": "parallel"}}),
        (ALL, BOTH, {"decoder": {"blending": "image_only"}}),
    ],
)
def test_unused_parameters_are_those_without_a_gradient(weights, streams, changes):
    model = tiny_vlab(**changes)
    objective = Objective(weights, streams, (0, 2))
    batch, rng = random_batch(4), jax.random.key(0)
    loss = quick_jit(jax.grad(lambda parameters: objective(model, parameters, batch, rng)[0]))
    gradients = flatten_dict(loss(random_parameters(model)), sep="/")
    found = {path: bool(np.any(np.asarray(gradient) != 0)) for path, gradient in gradients.items()}
    assert trained(model, weights, streams) == found


def test_a_stage_that_uses_everything_freezes_nothing():
    model = tiny_vlab(image_encoder="separate")
    shapes = parameter_shapes(model, FRAMES)
    assert freeze_unused(shapes, EVERYTHING, model, ALL, BOTH) == EVERYTHING


def settings_of(stage) -> stages.StageSettings:
    """The settings of one stage of a run."""
    config = training_config()
    config.frames, config.image_frames, config.stage.blend = FRAMES, 2, stage
    return setup.read_stage(config, "blend")


@pytest.mark.parametrize("kind", ["frozen", "decay"])
def test_a_step_of_captioning_leaves_the_text_tower_alone_only_if_unused_parameters_are_frozen(kind):
    model = tiny_vlab()
    parameters, batch = random_parameters(model), random_batch(2)
    objectives = {"contrastive": 0.0, "captioning": 1.0, "masked_lm": 0.0}
    stage = stage_config(groups=((".*", 0.1),), objectives=objectives, unused=kind)
    groups = stages.all_groups(model, settings_of(stage))
    labels = optim.assign_groups(parameters, groups)
    optimizer = optim.make_optimizer(groups, labels, optim.warmup_cosine(10, 0), weight_decay=0.5, clip_norm=1.0)
    objective = Objective(CAPTIONING, BOTH, (0, 2))
    mask = optim.trainable_mask(parameters, groups)
    step = make_train_step(model, objective, optimizer, mask, seed=0)
    state = init_state(parameters, optimizer, False, mask)
    after = quick_jit(step)(state, batch)[0].parameters
    text = max(jax.tree.leaves(jax.tree.map(largest_difference, after["text"], parameters["text"])))
    projection = largest_difference(
        after["vision"]["projection"]["kernel"], parameters["vision"]["projection"]["kernel"]
    )
    assert (text == projection == 0) if kind == "frozen" else (text > 0.01 and projection > 0.01)
    assert largest_difference(after["logit_scale"], parameters["logit_scale"]) == 0
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if jnp.ndim(leaf))
    every = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    idle = sum(leaf.size for leaf in jax.tree.leaves(parameters["text"]))
    assert moments < 2 * (every - idle) if kind == "frozen" else moments > 2 * (every - idle)


def test_the_frozen_group_is_described_beside_the_others():
    model = tiny_vlab()
    stage = stage_config(objectives={"captioning": 0.0, "masked_lm": 0.0}, unused="frozen")
    shapes = parameter_shapes(model, FRAMES)
    first, second = optim.describe_groups(shapes, stages.all_groups(model, settings_of(stage))).splitlines()
    assert first.endswith("frozen      ^(decoder/)") and second.endswith("lr 0.0001   .*")
    decoder = sum(leaf.size for leaf in jax.tree.leaves(shapes["decoder"]))
    assert int(first.split()[0].replace(",", "")) == decoder


def test_frozen_clip_parts_are_those_that_a_stage_uses_and_freezes_as_a_whole():
    model = tiny_vlab(image_encoder="separate")
    shapes = parameter_shapes(model, FRAMES)

    def frozen(*groups, weights=ALL, streams=BOTH):
        return frozen_clip_parts(shapes, optim.parse_groups(groups), model, weights, streams)

    rest = (".*", 1e-3)
    assert frozen(rest) == ()
    assert frozen(("^image_encoder/", "frozen"), rest) == ("image_encoder",)
    assert frozen(("^(vision|text)/", "frozen"), rest) == ("vision", "text")
    assert frozen(("^vision/patch", "frozen"), rest) == ()  # its other parameters are trained
    assert frozen(("^(decoder|video_adapter)/", "frozen"), rest) == ()  # not parts of CLIP
    assert frozen(("^image_encoder/", "frozen"), rest, streams=VIDEO) == ()  # not used
    assert frozen(("^(text/|logit_scale$)", "frozen"), rest, weights=CAPTIONING) == ()
