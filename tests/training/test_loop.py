"""Runs of seconds: they leave what they should, stop where they should, and their checkpoints can be evaluated."""

import json
import math
import re

import numpy as np
import pytest
from run_files import losses, results_of, saved_state
from tiny_run import evaluation_of

from vlab_jax.config import evaluation_config
from vlab_jax.errors import InputError, RunStopped
from vlab_jax.evaluation.checkpoint import evaluate
from vlab_jax.runtime.checkpoint import Checkpoints
from vlab_jax.training.health import replay
from vlab_jax.training.loop import train


def test_the_last_table_row_is_the_test_split_and_stages_are_evaluated_on_validation(finished):
    results = results_of(finished)
    assert list(results) == ["adapt (validation)", "blend (validation)", "blend (test)"]
    assert all("twin_accuracy" in row and "text_to_video/R@1" in row for row in results.values())


def test_a_run_leaves_metrics_events_plots_and_a_contact_sheet(finished):
    assert list((finished / "tensorboard").glob("events*"))
    report = finished / "report"
    for name in ("index.html", "results.json", "results.md", "training.png", "results.png", "retrieval.png"):
        assert (report / name).stat().st_size > 100, name


def test_evaluating_the_checkpoint_gives_the_figures_of_the_run(config, finished, tmp_path, capsys):
    (row,) = evaluate(evaluation_of(config), finished, tmp_path).values()
    assert row == pytest.approx(results_of(finished)["blend (test)"])
    assert "text to video" in capsys.readouterr().out
    assert (tmp_path / "report" / "index.html").is_file()


def test_an_earlier_checkpoint_can_be_evaluated_by_its_path(config, finished):
    made = evaluation_of(config)
    made.split = "validation"
    (name,) = evaluate(made, finished / "checkpoints" / "6", None)
    assert name == "blend, step 6 (motion/tiny validation)"


def test_a_path_without_checkpoint_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"^no checkpoint at [^\n]*; name a run's workdir"):
        evaluate(evaluation_config(), tmp_path, None)


def test_gradients_that_are_not_finite_stop_the_run_which_keeps_a_checkpoint_and_the_batch_to_replay(
    config, finished, tmp_path
):
    config.stages = ("blend",)
    config.stage.blend.update({"groups": ((".*", 1e30),), "warmup_steps": 3, "clip_norm": 0.0})  # the first rate is 0
    config.stage.blend.objectives.masked_lm = 0.0
    config.most_skipped = 0
    with pytest.raises(RunStopped) as raised:
        train(config, tmp_path)
    message = str(raised.value)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        latest = checkpoints.latest()
        assert f"the training before it in {checkpoints.directory / str(latest)};" in message
    assert all(np.isfinite(array).all() for array in saved_state(tmp_path, latest).values())
    (step,) = re.findall(r"the last of them step (\d) of stage 'blend'", message)
    (kept,) = (tmp_path / "replay").iterdir()
    assert kept.name == f"blend-{step}-process-0.npz" and str(kept) in message and "\n" not in message
    table = replay(config, finished, kept)  # with the parameters of a run that is well
    assert table.startswith(f"step {step} of stage blend, with the parameters of checkpoint 8\nclips: train-")
    replayed = {line.split()[0]: float(line.split()[1]) for line in table.splitlines() if "_loss" in line}
    assert set(replayed) == {"contrastive_loss", "captioning_loss"} and all(map(math.isfinite, replayed.values()))


def test_a_moving_average_is_kept_and_evaluated_and_parameters_stay_float32_where_products_are_bfloat16(
    config, tmp_path
):
    config.stages, config.dtype = ("blend",), "bfloat16"
    config.stage.blend.update({"average_decay": 0.5, "steps": 2})
    results = train(config, tmp_path)
    assert all(math.isfinite(loss) for *_, loss in losses(tmp_path))
    state = saved_state(tmp_path)
    parameters = {name: array for name, array in state.items() if name.startswith("['parameters']")}
    assert {str(array.dtype) for array in parameters.values()} == {"float32"}
    averages = [name for name in state if name.startswith("['average']")]
    assert averages
    assert [n for n in averages if not np.array_equal(state[n], state[n.replace("average", "parameters")])]
    (row,) = evaluate(evaluation_of(config), tmp_path, None).values()
    assert row == pytest.approx(results["blend (test)"])


def test_a_run_without_adapters_trains_and_cannot_tell_twins_apart(config, tmp_path):
    config.model.adapter.blocks = "none"
    config.stages, config.stage.blend.steps = ("blend",), 1
    results = train(config, tmp_path)
    assert not any("video_adapter" in name for name in saved_state(tmp_path))
    # At most one of two twins is right: they look the same, and ties count as wrong.
    assert results["blend (test)"]["twin_accuracy"] <= 50.0


@pytest.mark.long
def test_training_on_real_clips_of_a_folder_lowers_the_loss(assets, config, tmp_path):
    """120 surveillance clips, captioned by their two labels: 50 steps, and an evaluation."""
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
    config.stage.blend.update({"steps": 50, "groups": ((".*", 3e-3),), "warmup_steps": 5})
    config.checkpoint.every = 50
    results = train(config, tmp_path / "workdir")
    curve = [loss for *_, loss in losses(tmp_path / "workdir")]
    assert len(curve) == 50
    assert np.mean(curve[-10:]) < 0.8 * np.mean(curve[:5])
    assert "text_to_video/R@1" in results["blend (test)"]
