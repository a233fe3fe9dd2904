"""Runs of seconds: they resume, refuse, stop and evaluate as they should."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny_run
from ml_collections import ConfigDict

from vlab_jax import config as configuration
from vlab_jax.data import builders
from vlab_jax.errors import InputError, RunStopped
from vlab_jax.evaluation.checkpoint import evaluate
from vlab_jax.runtime.checkpoint import STATE, Checkpoints
from vlab_jax.runtime.meters import read_metrics
from vlab_jax.training.loop import train

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    """`motion/tiny`, built once."""
    folder = str(tmp_path_factory.mktemp("data"))
    builders.prepare("motion/tiny", folder)
    return folder


@pytest.fixture
def config(data_dir) -> ConfigDict:
    made = tiny_run.get_config()
    made.data.directory = data_dir
    return made


@pytest.fixture(scope="session")
def finished(data_dir, tmp_path_factory) -> pathlib.Path:
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("finished")
    made = tiny_run.get_config()
    made.data.directory = data_dir
    train(made, workdir)
    return workdir


def saved_state(workdir: pathlib.Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by its path."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        manager = checkpoints._manager
        step = manager.latest_step() if step is None else step
        import orbax.checkpoint as ocp

        restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))[STATE]
    leaves = jax.tree_util.tree_leaves_with_path(restored)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_state(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys() and len(one) > 50
    for name, array in one.items():
        assert array.dtype == other[name].dtype and array.tobytes() == other[name].tobytes(), name


def losses(workdir: pathlib.Path) -> list[tuple[int, str, float]]:
    records = read_metrics(workdir / "metrics.jsonl")
    return [(record["step"], record["stage"], record["loss"]) for record in records if "loss" in record]


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


def test_a_killed_run_ends_bit_identical_to_an_uninterrupted_one(finished, data_dir, tmp_path):
    """SIGKILL during `adapt`, after its first checkpoint; then the same command again."""
    command = [
        sys.executable,
        "-m",
        "vlab_jax.main",
        f"--config={ROOT / 'tests' / 'tiny_run.py'}",
        f"--workdir={tmp_path}",
        f"--config.data.directory={data_dir}",
        "--config.data.workers=1",
    ]
    # The same number of devices as here: the split of a batch decides the order of its sums.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoints" / "2").is_dir():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no checkpoint within two minutes"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert losses(tmp_path)[-1][1] == "adapt" and not (tmp_path / "results.json").exists()

    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert "resuming from" in again.stderr
    assert losses(tmp_path) == losses(finished)
    assert_same_state(saved_state(tmp_path), saved_state(finished))


def test_a_finished_run_started_again_trains_no_step_and_keeps_its_results(config, finished):
    before, results = losses(finished), json.loads((finished / "results.json").read_text())
    assert train(config, finished) == results
    assert losses(finished) == before


def test_the_last_table_row_is_the_test_split_and_stages_are_evaluated_on_validation(finished):
    results = json.loads((finished / "results.json").read_text())
    assert list(results) == ["adapt (validation)", "blend (validation)", "blend (test)"]
    assert all("twin_accuracy" in row and "text_to_video/R@1" in row for row in results.values())


def test_a_run_leaves_metrics_events_plots_and_a_contact_sheet(finished):
    assert list((finished / "tensorboard").glob("events*"))
    report = finished / "report"
    for name in ("index.html", "results.json", "results.md", "training.png", "results.png", "retrieval.png"):
        assert (report / name).stat().st_size > 100, name


def test_evaluating_the_checkpoint_gives_the_figures_of_the_run(finished, data_dir, tmp_path, capsys):
    made = configuration.evaluation_config()
    made.data.directory, made.data.workers, made.batch_size = data_dir, 0, 16
    (row,) = evaluate(made, finished, tmp_path).values()
    own = json.loads((finished / "results.json").read_text())["blend (test)"]
    assert row == pytest.approx(own)
    assert "text to video" in capsys.readouterr().out
    assert (tmp_path / "report" / "index.html").is_file()


def test_an_earlier_checkpoint_can_be_evaluated_by_its_path(finished, data_dir):
    made = configuration.evaluation_config()
    made.data.directory, made.data.workers = data_dir, 0
    made.split = "validation"
    (name,) = evaluate(made, finished / "checkpoints" / "6", None)
    assert name == "blend, step 6 (motion/tiny validation)"


def test_a_path_without_checkpoint_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"^no checkpoint at [^\n]*; name a run's workdir"):
        evaluate(configuration.evaluation_config(), tmp_path, None)


def test_the_workdir_of_another_config_is_refused_and_the_differences_are_listed(config, finished):
    config.stage.blend.steps = 7
    config.model.adapter.mixer = "attention"
    config.log_every = 5  # free to differ
    with pytest.raises(InputError) as raised:
        train(config, finished)
    message = str(raised.value)
    assert "stage.blend.steps: 4 → 7" in message and "model.adapter.mixer: 'conv' → 'attention'" in message
    assert "log_every" not in message and "\n" not in message


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_checkpoint(config, tmp_path):
    config.stage.adapt.groups = (("^video_adapter/|^decoder/", 1e30), (".*", "frozen"))
    config.stage.adapt.warmup_steps = 3  # the first step's learning rate is 0
    config.stage.adapt.clip_norm = 0.0
    config.checkpoint.every = 1
    with pytest.raises(RunStopped) as raised:
        train(config, tmp_path)
    message = str(raised.value)
    assert "of stage 'adapt'" in message and "\n" not in message
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        latest = checkpoints.latest()
        assert f"the last good checkpoint is {checkpoints.directory / str(latest)}" in message
    assert all(np.isfinite(array).all() for array in saved_state(tmp_path, latest).values())


def test_a_moving_average_is_kept_and_evaluated_and_restored(config, tmp_path):
    config.stages = ("blend",)
    config.stage.blend.average_decay = 0.5
    results = train(config, tmp_path)
    state = saved_state(tmp_path)
    averages = [name for name in state if name.startswith("['average']")]
    assert averages
    differ = [n for n in averages if not np.array_equal(state[n], state[n.replace("average", "parameters")])]
    assert differ
    made = configuration.evaluation_config()
    made.data.directory, made.data.workers = config.data.directory, 0
    (row,) = evaluate(made, tmp_path, None).values()
    assert row == pytest.approx(results["blend (test)"])


def test_bfloat16_compute_trains_with_float32_parameters(config, tmp_path):
    config.dtype = "bfloat16"
    config.stages = ("blend",)
    config.stage.blend.steps = 2
    train(config, tmp_path)
    assert all(np.isfinite(loss) for *_, loss in losses(tmp_path))
    parameters = {n: a for n, a in saved_state(tmp_path).items() if n.startswith("['parameters']")}
    assert {str(array.dtype) for array in parameters.values()} == {"float32"}


def test_a_stage_without_adapters_leaves_the_others_as_they_are(config, tmp_path):
    config.model.adapter.blocks = "none"
    config.stage.adapt.steps = config.stage.blend.steps = 1
    results = train(config, tmp_path)
    assert not any("video_adapter" in name for name in saved_state(tmp_path))
    # Of a pair of twins one is right at most: they look the same, and ties count as wrong.
    assert results["blend (test)"]["twin_accuracy"] <= 50.0


def test_training_on_real_clips_of_a_folder_lowers_the_loss(assets, config, tmp_path):
    """The 120 surveillance clips, captioned by their two labels: 50 steps, then an evaluation."""
    captions = {
        "fight": ["people are fighting", "a fight in front of a camera", "someone hits another person"],
        "noFight": ["people are walking by", "nothing happens in front of a camera", "a calm scene"],
    }
    clips = sorted(path for path in (assets / "videos" / "fight").rglob("*.mp4"))
    assert len(clips) == 120
    folder = tmp_path / "clips"
    folder.mkdir()
    with (folder / "annotations.jsonl").open("w") as file:
        for clip in clips:
            (folder / clip.name).symlink_to(clip)
            file.write(json.dumps({"video": clip.name, "captions": captions[clip.parent.name]}) + "\n")
    config.data.train, config.data.evaluate = (f"folder:{folder}",), f"folder:{folder}"
    config.data.directory = str(tmp_path / "data")
    config.data.workers = 2
    config.stages = ("blend",)
    config.stage.blend.update({"steps": 50, "batch_size": 16, "groups": ((".*", 3e-3),), "warmup_steps": 5})
    config.checkpoint.every = 50
    results = train(config, tmp_path / "workdir")
    course = [loss for *_, loss in losses(tmp_path / "workdir")]
    assert len(course) == 50
    assert np.mean(course[-10:]) < 0.8 * np.mean(course[:5])
    assert "text_to_video/R@1" in results["blend (test)"]
