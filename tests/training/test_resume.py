"""A run goes on where it stopped, as if it had not; and no run goes on with another's checkpoint."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from run_files import assert_same_run, interrupted, losses, results_of

from vlab_jax.errors import InputError
from vlab_jax.training.loop import train

ROOT = pathlib.Path(__file__).parents[2]
# The same number of devices as here: the split of a batch decides the order of its sums.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def command_of(workdir: pathlib.Path, data_dir: str, *options: str) -> list[str]:
    """The tiny run as a command."""
    arguments = (
        f"--config={ROOT / 'tests' / 'tiny_run.py'}",
        f"--workdir={workdir}",
        f"--config.data.directory={data_dir}",
    )
    return [sys.executable, "-m", "vlab_jax.main", *arguments, *options]


def wait_for(reached: Callable[[], object], process: subprocess.Popen, otherwise: str) -> None:
    """Until a running process has come so far; two minutes at most."""
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


def test_a_run_stops_after_the_configured_steps_and_has_saved_them(config, finished, tmp_path):
    config.stop_after = 2
    train(config, tmp_path)
    assert_same_run(tmp_path, finished, 2)


def test_resuming_within_a_stage_and_between_stages_equals_an_uninterrupted_run_bit_for_bit(config, finished, tmp_path):
    """From within the first stage to its end, on through its evaluation, and to the end of the run."""
    for step in (2, 4):
        workdir = interrupted(finished, tmp_path / str(step), step, evaluated=False)
        config.stop_after = step + 2
        train(config, workdir)
        assert_same_run(workdir, finished, step + 2)
    assert results_of(workdir) == {"adapt (validation)": results_of(finished)["adapt (validation)"]}
    workdir = interrupted(finished, tmp_path / "6", 6)
    config.stop_after = 0
    train(config, workdir)
    assert_same_run(workdir, finished, 8)
    assert results_of(workdir) == results_of(finished)


def test_the_workdir_of_another_config_is_refused_and_the_differences_are_listed(config, finished):
    config.stage.blend.steps = 7
    config.model.adapter.mixer = "attention"
    config.log_every = 5  # free to differ
    with pytest.raises(InputError) as raised:
        train(config, finished)
    message = str(raised.value)
    assert "stage.blend.steps: 4 → 7" in message and "model.adapter.mixer: 'conv' → 'attention'" in message
    assert "log_every" not in message and "\n" not in message


def test_sigterm_saves_and_ends_with_its_own_status_and_a_second_run_beside_it_is_refused(config, data_dir, tmp_path):
    long = (
        "--config.stage.adapt.steps=100000",
        "--config.checkpoint.every=100000",
    )  # so that it is the signal that saves
    command = command_of(tmp_path, data_dir, *long)
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    recorded = tmp_path / "metrics.jsonl"
    wait_for(lambda: recorded.exists() and losses(tmp_path), process, "no step within two minutes")
    config.stage.adapt.steps = 100000
    with pytest.raises(InputError, match=rf"^another run is at work in {tmp_path}; wait until it ends"):
        train(config, tmp_path)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 4, errors
    assert errors.splitlines()[-1].startswith("error: stopped by SIGTERM; the training so far is saved")
    done, *_ = losses(tmp_path)[-1]
    config.stop_after = done + 1
    train(config, tmp_path)
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, done + 2))


def test_a_damaged_checkpoint_is_named_and_moved_and_the_run_goes_on_from_the_one_before(
    config, finished, tmp_path, caplog
):
    workdir = interrupted(finished, tmp_path / "run", 4, evaluated=False)
    damaged = "state/manifest.ocdbt"
    file = workdir / "checkpoints" / "4" / damaged
    file.write_bytes(file.read_bytes()[:5])
    config.stop_after = 4
    train(config, workdir)
    (aside,) = (workdir / "damaged").iterdir()
    assert aside.name.startswith("4-") and (aside / damaged).is_file()
    messages = [each.getMessage() for each in caplog.records if "cannot be read" in each.getMessage()]
    assert len(messages) == 1 and str(workdir / "checkpoints" / "4") in messages[0] and str(aside) in messages[0]
    assert_same_run(workdir, finished, 4)
