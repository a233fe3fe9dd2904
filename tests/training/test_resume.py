"""A run goes on where it stopped, as if it had not; and no run goes on with another's checkpoint."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from run_files import assert_same_state, losses, saved_state

from vlab_jax.errors import InputError
from vlab_jax.training.loop import train

ROOT = pathlib.Path(__file__).parents[2]
# The same number of devices as here: the split of a batch decides the order of its sums.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def command_of(workdir: pathlib.Path, data_dir: str, *options: str) -> list[str]:
    """The tiny run as a command."""
    given = (
        f"--config={ROOT / 'tests' / 'tiny_run.py'}",
        f"--workdir={workdir}",
        f"--config.data.directory={data_dir}",
    )
    return [sys.executable, "-m", "vlab_jax.main", *given, *options]


def wait_for(reached: Callable[[], object], process: subprocess.Popen, otherwise: str) -> None:
    """Until a running process has come so far; two minutes at most."""
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_resuming_equals_an_uninterrupted_run_bit_for_bit(config, finished, tmp_path, stop):
    """Interrupted within the first stage (2 of 4 steps), between the stages, and within the second."""
    config.stop_after = stop
    train(config, tmp_path)
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, stop + 1))
    config.stop_after = 0
    train(config, tmp_path)
    assert losses(tmp_path) == losses(finished)
    assert_same_state(saved_state(tmp_path), saved_state(finished))
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads((finished / "results.json").read_text())


def test_a_finished_run_started_again_trains_no_step_and_keeps_its_results(config, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "again")
    before, results = losses(workdir), json.loads((workdir / "results.json").read_text())
    assert train(config, workdir) == results
    assert losses(workdir) == before


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
    other = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert other.returncode == 2
    assert other.stderr.splitlines()[-1].startswith(f"error: another run is at work in {tmp_path}; wait until it ends")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 4, said
    assert said.splitlines()[-1].startswith("error: stopped by SIGTERM; what was trained is saved")
    done, *_ = losses(tmp_path)[-1]
    config.stage.adapt.steps = 100000
    config.stop_after = done + 1
    train(config, tmp_path)
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, done + 2))


def test_a_damaged_checkpoint_is_named_put_aside_and_the_one_before_goes_on(config, finished, tmp_path, caplog):
    config.stop_after = 4
    train(config, tmp_path)
    (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()  # what a kill leaves
    damaged = "state/manifest.ocdbt"
    file = tmp_path / "checkpoints" / "4" / damaged
    file.write_bytes(file.read_bytes()[:5])
    config.stop_after = 0
    train(config, tmp_path)
    (aside,) = (tmp_path / "damaged").iterdir()
    assert aside.name.startswith("4-") and (aside / damaged).is_file()
    named = [each.getMessage() for each in caplog.records if "cannot be read" in each.getMessage()]
    assert len(named) == 1 and str(tmp_path / "checkpoints" / "4") in named[0] and str(aside) in named[0]
    assert losses(tmp_path) == losses(finished)
    assert_same_state(saved_state(tmp_path), saved_state(finished))
