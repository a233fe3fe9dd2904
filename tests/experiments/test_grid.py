"""The grid of runs: which remain, how they are distinguished, and that an interrupted grid goes on."""

import json
import sys
import threading

import pytest

from experiments import grid
from vlab_jax import config_check
from vlab_jax.errors import InputError


def recorded(arm: str, seed: int) -> grid.Record:
    return {"arm": arm, "seed": seed, "config": grid.config_hash(grid.config_of("adapting", arm, seed))}


EXPERIMENTS = ("adapting", "blending", "objectives")
ARMS = [(name, arm) for name in EXPERIMENTS for arm in grid.arms_of(name)]


@pytest.mark.parametrize(("experiment", "arm"), ARMS)
def test_every_arm_is_a_config_that_the_package_takes(experiment, arm):
    config_check.check(grid.config_of(experiment, arm, 3))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_what_an_experiment_compares_are_arms_of_its_own(experiment):
    module = grid.module_of(experiment)
    assert {arm for pair in module.COMPARED for arm in pair} <= set(module.ARMS)
    hashes = {grid.config_hash(grid.config_of(experiment, arm, 0)) for arm in module.ARMS}
    assert len(hashes) == len(module.ARMS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_run_is_recorded_under_the_config_that_its_arm_has_now(experiment):
    assert grid.pending(experiment, grid.read_records(experiment), grid.arms_of(experiment)) == []


def test_runs_at_a_time_share_the_cpus_evenly(monkeypatch):
    monkeypatch.setattr(grid.os, "sched_getaffinity", lambda _: {0, 2, 3, 5, 6}, raising=False)
    assert grid.cpu_shares(1) == [None]
    assert grid.cpu_shares(2) == [{0, 3, 6}, {2, 5}]
    assert grid.cpu_shares(6) == [None] * 6


def test_runs_at_a_time_are_all_recorded_and_a_failure_stops_what_has_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "HERE", tmp_path)
    for experiment in ("first", "second"):
        (tmp_path / experiment).mkdir()
    both = threading.Barrier(2, timeout=60)

    def start(run: grid.Run, cpus: set[int] | None) -> grid.Record:
        if run.arm == "good":
            both.wait()  # none goes on before two are under way
        if (run.arm, run.seed) == ("bad", 1):
            raise InputError("bad with seed 1 ended")
        return {"arm": run.arm, "seed": run.seed}

    good = [grid.Run(experiment, "good", seed) for experiment in ("first", "second") for seed in range(3)]
    grid.run_all(good, 2, start)
    for experiment in ("first", "second"):
        assert sorted(record["seed"] for record in grid.read_records(experiment)) == [0, 1, 2]
    with pytest.raises(InputError, match="bad with seed 1 ended"):
        grid.run_all([grid.Run("first", "bad", seed) for seed in range(50)], 2, start)
    recorded = [record["seed"] for record in grid.read_records("first") if record["arm"] == "bad"]
    assert 1 not in recorded and len(recorded) < 10


def test_arms_differ_in_their_hash_and_seeds_do_not():
    arms = grid.arms_of("adapting")
    hashes = {arm: grid.config_hash(grid.config_of("adapting", arm, 0)) for arm in arms}
    assert len(set(hashes.values())) == len(arms)
    elsewhere = grid.config_of("adapting", "conv", 4)
    elsewhere.data.workers, elsewhere.log_every = 1, 7  # how it runs, not what it computes
    assert grid.config_hash(elsewhere) == hashes["conv"]


def test_what_is_recorded_is_left_out_and_seeds_come_in_turns():
    arms = {"conv": 2, "none": 3}
    every = [run[1:] for run in grid.pending("adapting", [], arms)]
    assert every == [("conv", 0), ("none", 0), ("conv", 1), ("none", 1), ("none", 2)]
    left = [run[1:] for run in grid.pending("adapting", [recorded("none", 0), recorded("conv", 1)], arms)]
    assert left == [("conv", 0), ("none", 1), ("none", 2)]
    old = {**recorded("conv", 0), "config": "of another config"}
    assert grid.Run("adapting", "conv", 0) in grid.pending("adapting", [old], arms)


def test_unknown_names_are_one_line():
    with pytest.raises(InputError, match=r"^there is no experiment 'adaptin'; known: adapting, blending, objectives$"):
        grid.arms_of("adaptin")
    with pytest.raises(InputError, match="takes one of conv, none"):
        grid.config_of("adapting", "convv", 0)


def test_several_experiments_are_one_grid_and_arms_are_of_one(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(grid, "run_all", lambda todo, jobs, start: asked.extend(todo))
    monkeypatch.setattr(grid, "read_records", lambda experiment: [])
    monkeypatch.setattr(sys, "argv", ["grid", "objectives", "blending", "--workdir=nowhere", "--seeds=1"])
    grid.main()
    assert asked == [grid.Run(name, arm, 0) for name in ("objectives", "blending") for arm in grid.arms_of(name)]
    sys.argv.append("--arms=both")
    with pytest.raises(SystemExit):
        grid.main()
    assert capsys.readouterr().err == "error: --arms is of one experiment; leave it out, or name one experiment\n"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """An experiment of two arms that train for seconds."""
    folder = tmp_path / "experiments" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.py").write_text(
        "import tiny_run\n\nARMS = {'one': 2, 'two': 1}\n\n\ndef get_config(arm='one'):\n"
        "    config = tiny_run.get_config()\n    config.stages = ('adapt',)\n"
        "    config.image_frames = {'one': 1, 'two': 2}[arm]\n    return config\n"
    )
    tests = str(grid.ROOT / "tests")
    monkeypatch.setenv("PYTHONPATH", f"{grid.ROOT}:{tests}")
    monkeypatch.setattr(grid, "HERE", folder.parent)
    monkeypatch.setattr("experiments.__path__", [str(folder.parent)])
    yield folder
    sys.modules.pop("experiments.tiny.config", None)
    sys.modules.pop("experiments.tiny", None)


@pytest.mark.long
def test_a_grid_runs_records_and_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch, capsys):
    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["grid", "tiny", f"--workdir={tmp_path / 'runs'}", *arguments])
        grid.main()
        return capsys.readouterr().out

    assert call("--arms=one", "--seeds=1") == "run 1 of 1: tiny one, seed 0\n"
    assert call("--seeds=1") == "run 1 of 1: tiny two, seed 0\n"
    again = "nothing to run: all of it is recorded; to run it again, remove experiments/tiny/results.json\n"
    assert call("--seeds=1") == again
    first, second = json.loads((tiny / "results.json").read_text())["runs"]
    assert (first["arm"], second["arm"], first["seed"]) == ("one", "two", 0)
    assert "text_to_video/R@1" in first["rows"]["adapt (test)"] and first["config"] != second["config"]


def test_a_run_that_fails_is_one_line_that_names_its_log(tiny, tmp_path, monkeypatch, capsys):
    (tiny / "config.py").write_text(
        (tiny / "config.py")
        .read_text()
        .replace("    return", "    config.data.train = ('folder:/nowhere',)\n    return")
    )
    monkeypatch.setattr(sys, "argv", ["grid", "tiny", "--arms=two", f"--workdir={tmp_path / 'runs'}"])
    with pytest.raises(SystemExit) as stopped:
        grid.main()
    assert stopped.value.code == 2
    assert "error: two with seed 0 ended with status 2; see " in capsys.readouterr().err
    assert not (tiny / "results.json").exists()
