"""Steps that are not finite change nothing, are named, and end a run where they go on; its batch can be replayed."""

import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import FRAMES, random_batch, random_parameters, tiny_vlab

from vlab_jax.errors import InputError, RunStopped
from vlab_jax.training import loop, optim, step
from vlab_jax.training.health import Anomalies, replay
from vlab_jax.training.loop import train
from vlab_jax.training.objectives import Objective


def watched(losses, most_skipped=2, stopped=lambda step: f"kept {step}"):
    anomalies = Anomalies("blend", most_skipped, stopped)
    for number, loss in enumerate(losses, 1):
        anomalies.watch(number, loss, math.isfinite(loss), [f"clip-{number}"])


def test_skipped_steps_are_named_and_too_many_in_a_row_stop(caplog):
    watched([1.0, math.nan, math.inf, 1.0, math.nan, math.nan, 1.0])
    named = [record.getMessage() for record in caplog.records]
    assert [message.split()[2] for message in named] == ["2", "3", "5", "6"] and "clip-2" in named[0]
    with pytest.raises(RunStopped, match="in 3 steps in a row, the last of them step 4 of stage 'blend'; kept 4"):
        watched([1.0, math.nan, math.nan, math.nan])


def test_a_loss_that_jumps_is_named_and_noise_is_not(caplog):
    rng = np.random.default_rng(0)
    falling = (10 / np.arange(1, 200) + 3 + rng.normal(0, 0.05, 199)).tolist()
    watched(falling)
    assert not caplog.records
    caplog.set_level(logging.WARNING)
    watched([*falling[:100], 9.0, *falling[101:]])
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
    learns = optim.trainable(parameters, groups)
    run = jax.jit(step.make_train_step(model, objective, optimizer, learns, seed=0, average_decay=0.9))
    before, metrics = run(step.init_state(parameters, optimizer, True), random_batch(4))
    assert metrics["skipped"] == 0
    broken = before.replace(parameters={**before.parameters, "logit_scale": jnp.asarray(jnp.nan)})
    after, metrics = run(broken, random_batch(4))
    assert metrics["skipped"] == 1 and after.step == before.step + 1
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(broken.replace(step=after.step)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_run_that_stops_keeps_its_batch_which_can_be_replayed(config, tmp_path, monkeypatch):
    config.stages, config.most_skipped = ("blend",), 0
    config.stage.blend.objectives.masked_lm = 0.0
    made = loop.stages.prepare

    def prepare(*arguments):
        stage = made(*arguments)

        def faulty(state, batch):
            new, metrics = stage.step(state, batch)
            return new, {**metrics, "loss": metrics["loss"] * jnp.where(new.step == 3, jnp.nan, 1.0)}

        return loop.dataclasses.replace(stage, step=faulty)

    monkeypatch.setattr(loop.stages, "prepare", prepare)
    with pytest.raises(RunStopped) as stopped:
        train(config, tmp_path)
    (kept,) = (tmp_path / "replay").iterdir()
    assert kept.name == "blend-3-process-0.npz" and str(kept) in str(stopped.value)
    assert "checkpoints/4" in str(stopped.value)
    table = replay(config, tmp_path, kept)
    assert table.startswith("step 3 of stage blend, with the parameters of checkpoint 4\nclips: train-")
    losses = {line.split()[0]: float(line.split()[1]) for line in table.splitlines() if "_loss" in line}
    assert set(losses) == {"contrastive_loss", "captioning_loss"} and all(map(math.isfinite, losses.values()))


def test_a_file_that_is_no_kept_batch_is_one_line(config, tmp_path):
    path = tmp_path / "batch.npz"
    path.write_bytes(b"no archive")
    with pytest.raises(InputError, match="is not a batch that a run has kept"):
        replay(config, tmp_path, path)
    np.savez(path, video=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(InputError, match="is not a batch that a run has kept"):
        replay(config, tmp_path, path)
