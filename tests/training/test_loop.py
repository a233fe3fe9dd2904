"""Runs of seconds: they leave what they should, stop where they should, and their checkpoints can be evaluated."""

import json

import numpy as np
import pytest
from run_files import losses, saved_state

from vlab_jax import config as configuration
from vlab_jax.errors import InputError, RunStopped
from vlab_jax.evaluation.checkpoint import evaluate
from vlab_jax.runtime.checkpoint import Checkpoints
from vlab_jax.training.loop import train


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
    made.data.directory, made.data.workers, made.batch_size = data_dir, 0, 8
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


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_checkpoint(config, tmp_path):
    config.stage.adapt.groups = (("^video_adapter/|^decoder/", 1e30), (".*", "frozen"))
    config.stage.adapt.warmup_steps = 3  # the first step's learning rate is 0
    config.stage.adapt.clip_norm = 0.0
    config.checkpoint.every = 1
    config.most_skipped = 0
    with pytest.raises(RunStopped) as raised:
        train(config, tmp_path)
    message = str(raised.value)
    assert "of stage 'adapt'" in message and "\n" not in message
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        latest = checkpoints.latest()
        assert f"what was learned before in {checkpoints.directory / str(latest)};" in message
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
    made.batch_size = config.evaluation.batch_size  # another one rounds otherwise, and ranks hang on that
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
    config.stage.blend.update({"steps": 50, "batch_size": 8, "groups": ((".*", 3e-3),), "warmup_steps": 5})
    config.checkpoint.every = 50
    results = train(config, tmp_path / "workdir")
    course = [loss for *_, loss in losses(tmp_path / "workdir")]
    assert len(course) == 50
    assert np.mean(course[-10:]) < 0.8 * np.mean(course[:5])
    assert "text_to_video/R@1" in results["blend (test)"]
