"""Parameter groups, the learning rate schedule, and what the optimiser leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FRAMES, QUICK, largest_difference, quick_jit, random_batch, random_parameters, tiny_vlab

from vlab_jax.errors import InputError
from vlab_jax.training import optim
from vlab_jax.training.objectives import Objective
from vlab_jax.training.optim import Group
from vlab_jax.training.step import init_state, make_train_step

RATE, DECAY = 0.1, 0.5


def tree(value: float = 1.0) -> dict:
    """A small tree with the kinds of parameters that a model has."""

    def dense():
        return {"kernel": jnp.full((2, 3), value), "bias": jnp.full(3, value)}

    return {
        "vision": {
            "mlp": {"input": dense()},
            "ln_1": {"norm": {"scale": jnp.full(2, value), "bias": jnp.full(2, value)}},
        },
        "video_adapter": {"down": dense(), "conv_kernel": jnp.full((3, 2), value), "conv_bias": jnp.full(2, value)},
        "text": {"token_embedding": jnp.full((4, 2), value), "position_embedding": jnp.full((3, 2), value)},
        "logit_scale": jnp.asarray(value),
    }


def after_steps(groups, gradients, *, steps: int = 3, clip_norm: float = 0.0, schedule=lambda step: 1.0):
    """The tree after some steps with the same gradients, and the optimiser's state."""
    parameters = tree()
    labels = optim.assign_groups(parameters, groups)
    optimizer = optim.make_optimizer(groups, labels, schedule, weight_decay=DECAY, clip_norm=clip_norm)

    @quick_jit
    def step(parameters, state):
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    state = quick_jit(optimizer.init)(parameters)
    for _ in range(steps):
        parameters, state = step(parameters, state)
    return parameters, state


def test_the_first_pattern_that_is_found_in_a_path_wins():
    groups = optim.parse_groups((("^vision/mlp", 1e-3), ("kernel$", 1e-4), ("vision", "frozen"), (".*", 1e-5)))
    numbers = optim.assign_groups(tree(), groups)
    assert numbers["vision"]["mlp"]["input"] == {"kernel": 0, "bias": 0}
    assert numbers["vision"]["ln_1"]["norm"] == {"scale": 2, "bias": 2}
    assert numbers["video_adapter"] == {"down": {"kernel": 1, "bias": 3}, "conv_kernel": 1, "conv_bias": 3}
    assert numbers["logit_scale"] == 3
    mask = optim.trainable_mask(tree(), groups)
    assert mask["vision"]["mlp"]["input"]["bias"] is True
    assert mask["vision"]["ln_1"]["norm"]["scale"] is False


def test_a_parameter_that_no_group_matches_is_named():
    groups = optim.parse_groups((("^vision/|^video_adapter/|^text/", 1e-3),))
    with pytest.raises(InputError, match="logit_scale") as error:
        optim.assign_groups(tree(), groups)
    assert "\n" not in str(error.value)


def test_a_frozen_pattern_that_matches_nothing_is_named():
    groups = optim.parse_groups((("^visual/", "frozen"), (".*", 1e-3)))
    with pytest.raises(InputError, match=r"\^visual/") as error:
        optim.assign_groups(tree(), groups)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rate", [1e-3, "frozen"])
def test_the_pattern_of_a_part_that_this_model_lacks_may_match_nothing(rate):
    """As where a config has no adapters, or shares its image encoder: the groups of the run with them serve it too."""
    groups = optim.parse_groups((("^image_encoder/", rate), (".*", 1e-4)))
    assert set(jax.tree.leaves(optim.assign_groups(tree(), groups))) == {1}


@pytest.mark.parametrize(
    "pair", [("vision", "slow"), ("vi(sion", 1e-3), ("vision",), ("vision", 1e-3, 2), 3, ("vision", None), (5, 1e-3)]
)
def test_a_pair_that_is_no_group_is_named(pair):
    with pytest.raises(InputError, match="parameter group") as error:
        optim.parse_groups((pair,))
    assert repr(pair) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_groups_described_hold_every_parameter_once():
    groups = optim.parse_groups((("^video_adapter/", 2e-3), ("token_embedding", 1e-4), (".*", "frozen")))
    lines = optim.describe_groups(tree(), groups).splitlines()
    counts = [int(line.split()[0].replace(",", "")) for line in lines]
    assert counts == [6 + 3 + 6 + 2, 8, 6 + 3 + 4 + 6 + 1]
    assert sum(counts) == sum(leaf.size for leaf in jax.tree.leaves(tree()))
    for line, parts in zip(lines, [("lr 0.002", "^video_adapter/"), ("lr 0.0001",), ("frozen", ".*")], strict=True):
        assert all(part in line for part in parts)


def test_frozen_parameters_stay_to_the_bit_under_weight_decay():
    groups = optim.parse_groups((("^vision/", "frozen"), (".*", RATE)))
    parameters, state = after_steps(groups, tree(0.3))
    jax.tree.map(np.testing.assert_array_equal, parameters["vision"], tree()["vision"])
    for part in ("video_adapter", "text", "logit_scale"):
        assert all(np.all(leaf < 1) for leaf in jax.tree.leaves(parameters[part]))
    moments = [leaf for leaf in jax.tree.leaves(state) if getattr(leaf, "ndim", 0) == 2]
    learning = [leaf for leaf in jax.tree.leaves([tree()["video_adapter"], tree()["text"]]) if leaf.ndim == 2]
    assert len(moments) == 2 * len(learning)  # Adam's two, and none for what is frozen


def test_kernels_and_token_embeddings_decay_and_nothing_else():
    parameters, _ = after_steps(optim.parse_groups(((".*", RATE),)), tree(0.0), steps=1)
    expected = tree()
    shrunk = 1 - RATE * DECAY
    expected["vision"]["mlp"]["input"]["kernel"] *= shrunk
    expected["video_adapter"]["down"]["kernel"] *= shrunk
    expected["video_adapter"]["conv_kernel"] *= shrunk
    expected["text"]["token_embedding"] *= shrunk
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), parameters, expected)
    assert float(parameters["vision"]["mlp"]["input"]["bias"][0]) == 1.0


def test_each_group_learns_at_its_own_rate_times_the_schedule():
    """Adam's first step is the learning rate, whatever the gradient."""
    groups = (Group("^vision/", 0.1), Group("", 0.01))
    parameters, _ = after_steps(groups, tree(0.3), steps=1, schedule=lambda step: 0.5)
    assert float(parameters["vision"]["mlp"]["input"]["bias"][0]) == pytest.approx(1 - 0.05, rel=1e-4)
    assert float(parameters["logit_scale"]) == pytest.approx(1 - 0.005, rel=1e-4)


def norm_of(leaves) -> float:
    """The Euclidean norm of a tree."""
    return float(np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(leaves))))


@pytest.mark.parametrize(("clip_norm", "expected"), [(2.0, 2.0), (0.0, None), (1e6, None)])
def test_the_norm_of_all_gradients_together_is_clipped(clip_norm, expected):
    gradients = tree(7.0)
    norm = norm_of(gradients)
    _, state = after_steps(optim.parse_groups(((".*", RATE),)), gradients, steps=1, clip_norm=clip_norm)
    assert norm_of(optax.tree.get(state, "mu")) / (1 - 0.9) == pytest.approx(
        norm if expected is None else expected, rel=1e-4
    )


def test_the_schedule_warms_up_and_ends_at_its_share():
    schedule = optim.warmup_cosine(100, 10, 0.2)
    factors = np.array([float(schedule(step)) for step in range(101)])
    assert factors[0] == 0.0
    assert factors[5] == pytest.approx(0.5)
    assert factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.6)  # half of the cosine: midway between 1 and 0.2
    assert factors[100] == pytest.approx(0.2)
    assert np.all(np.diff(factors[:11]) > 0)
    assert np.all(np.diff(factors[10:]) < 0)


@given(st.integers(1, 60), st.integers(0, 80), st.floats(0.0, 1.0))
@settings(max_examples=25, deadline=None)
def test_any_schedule_stays_between_0_and_1_and_ends_at_its_share(steps, warmup, share):
    schedule = optim.warmup_cosine(steps, warmup, share)
    factors = np.array([float(schedule(step)) for step in range(0, steps + 1, 3)])
    assert np.all((factors >= 0) & (factors <= 1 + 1e-6))
    assert float(schedule(steps)) == pytest.approx(share, abs=1e-6)


def contrastive_step(model, parameters, pairs):
    """The contrastive step with these groups, lowered, and its function (parameters) → state."""
    groups = optim.parse_groups(pairs)
    labels = optim.assign_groups(parameters, groups)
    optimizer = optim.make_optimizer(groups, labels, optim.warmup_cosine(10, 0), weight_decay=DECAY, clip_norm=1.0)
    objective = Objective({"contrastive": 1.0}, ("video",), tuple(range(FRAMES)))
    mask = optim.trainable_mask(parameters, groups)
    step = make_train_step(model, objective, optimizer, mask, seed=0)

    def initial(parameters):
        return init_state(parameters, optimizer, False, mask)

    return jax.jit(step).lower(jax.eval_shape(initial, parameters), random_batch(2)), quick_jit(initial)


def test_a_step_with_clip_frozen_changes_not_a_bit_of_it_and_computes_no_gradient_for_it():
    model = tiny_vlab(decoder={"blending": "none"})
    parameters = {**random_parameters(model), "logit_scale": jnp.asarray(5.0)}
    adapting = (("^(vision|text)/", "frozen"), ("logit_scale", 1e-6), (".*", RATE))
    lowered, initial = contrastive_step(model, parameters, adapting)
    end_to_end, _ = contrastive_step(model, parameters, ((".*", RATE),))
    assert lowered.cost_analysis()["flops"] < 0.8 * end_to_end.cost_analysis()["flops"]
    step = lowered.compile(compiler_options=QUICK)
    limit = np.float32(np.log(100))
    after, _ = step(initial(parameters), random_batch(2))
    assert after.parameters["logit_scale"] == limit  # a temperature that learns is clamped,
    after, metrics = step(after, random_batch(2))
    assert limit - 1e-5 < after.parameters["logit_scale"] < limit  # and finds its way back
    assert int(after.step) == 2
    assert metrics["gradient_norm"] > 0
    for part in ("vision", "text"):
        jax.tree.map(np.testing.assert_array_equal, after.parameters[part], parameters[part])
    moved = jax.tree.map(largest_difference, after.parameters["video_adapter"], parameters["video_adapter"])
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_a_frozen_temperature_is_left_alone_past_its_limit():
    model = tiny_vlab(decoder={"blending": "none"})
    parameters = {**random_parameters(model), "logit_scale": jnp.asarray(5.0)}
    lowered, initial = contrastive_step(model, parameters, ((".*", "frozen"),))
    after, metrics = lowered.compile(compiler_options=QUICK)(initial(parameters), random_batch(2))
    jax.tree.map(np.testing.assert_array_equal, after.parameters, parameters)
    assert metrics["gradient_norm"] == 0
