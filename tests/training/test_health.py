"""Steps that are not finite change nothing and are named; losses that jump are named; a kept batch is checked."""

import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import FRAMES, quick_jit, random_batch, random_parameters, tiny_vlab

from vlab_jax.errors import InputError, RunStopped
from vlab_jax.training import optim, step
from vlab_jax.training.health import StepMonitor, replay
from vlab_jax.training.objectives import Objective


def check(losses):
    monitor = StepMonitor("blend", 2, lambda step: f"kept {step}")
    for number, loss in enumerate(losses, 1):
        monitor.check(number, loss, math.isfinite(loss), [f"clip-{number}"])


def test_skipped_steps_are_named_and_too_many_in_a_row_stop(caplog):
    check([1.0, math.nan, math.inf, 1.0, math.nan, math.nan, 1.0])
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split()[2] for message in messages] == ["2", "3", "5", "6"] and "clip-2" in messages[0]
    with pytest.raises(RunStopped, match="in 3 steps in a row, the last of them step 4 of stage 'blend'; kept 4"):
        check([1.0, math.nan, math.nan, math.nan])


def test_a_loss_that_jumps_is_named_and_noise_is_not(caplog):
    rng = np.random.default_rng(0)
    falling = (10 / np.arange(1, 200) + 3 + rng.normal(0, 0.05, 199)).tolist()
    check(falling)
    assert not caplog.records
    caplog.set_level(logging.WARNING)
    check([*falling[:100], 9.0, *falling[101:]])
    (record,) = caplog.records
    assert "the loss is 9 at step 101" in record.getMessage() and "clip-101" in record.getMessage()


def test_a_step_that_is_not_finite_leaves_parameters_and_optimiser_as_they_were():
    model = tiny_vlab()
    parameters = random_parameters(model)
    groups = optim.parse_groups(((".*", 1e-2),))
    labels = optim.assign_groups(parameters, groups)
    schedule = optim.warmup_cosine(10, 1)
    optimizer = optim.make_optimizer(groups, labels, schedule, weight_decay=0.1, clip_norm=1.0)
    objective = Objective({"contrastive": 1.0}, ("video",), tuple(range(FRAMES)))
    mask = optim.trainable_mask(parameters, groups)
    run = quick_jit(step.make_train_step(model, objective, optimizer, mask, seed=0, average_decay=0.9))
    before, metrics = run(step.init_state(parameters, optimizer, True, mask), random_batch(4))
    assert metrics["skipped"] == 0
    broken = before.replace(parameters={**before.parameters, "logit_scale": jnp.asarray(jnp.nan)})
    after, metrics = run(broken, random_batch(4))
    assert metrics["skipped"] == 1 and after.step == before.step + 1
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(broken.replace(step=after.step)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_file_that_is_no_kept_batch_is_one_line(config, tmp_path):
    path = tmp_path / "batch.npz"
    for content in (b"no archive", b"PK\3\4 and no archive"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is not a batch that a run has kept"):
            replay(config, tmp_path, path)
    np.savez(path, video=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(InputError, match="is not a batch that a run has kept"):
        replay(config, tmp_path, path)
