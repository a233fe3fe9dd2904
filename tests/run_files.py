"""Reads what a run leaves in its workdir, and makes the workdir of an interrupted run from that of a finished one."""

import json
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp

from vlab_jax.runtime.checkpoint import STATE, Checkpoints
from vlab_jax.runtime.metrics import read_metrics


def saved_state(workdir: pathlib.Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Every array of a checkpoint (by default the newest), by its path, on whatever devices it was saved."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        step = checkpoints.latest() if step is None else step
    path = workdir.absolute() / "checkpoints" / str(step) / STATE
    arrays = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), ocp.PyTreeCheckpointHandler().metadata(path).tree
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(path, restore_args=arrays)
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(restored)}


def assert_same_state(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """The same arrays, bit for bit."""
    assert one.keys() == other.keys() and len(one) > 50
    for name, array in one.items():
        assert array.dtype == other[name].dtype and array.tobytes() == other[name].tobytes(), name


def losses(workdir: pathlib.Path) -> list[tuple[int, str, float]]:
    """Global step, stage and loss of each recorded step."""
    records = read_metrics(workdir / "metrics.jsonl")
    return [(record["step"], record["stage"], record["loss"]) for record in records if "loss" in record]


def results_of(workdir: pathlib.Path) -> dict[str, dict[str, float]]:
    """The rows of a run's or an evaluation's results."""
    return json.loads((workdir / "results.json").read_text())


def assert_same_run(workdir: pathlib.Path, finished: pathlib.Path, steps: int) -> None:
    """After so many steps, a run has the losses and the bits of one that nothing interrupted."""
    assert losses(workdir) == losses(finished)[:steps]
    assert_same_state(saved_state(workdir, steps), saved_state(finished, steps))


def interrupted(finished: pathlib.Path, workdir: pathlib.Path, step: int, evaluated: bool = True) -> pathlib.Path:
    """A copy of a finished run's workdir, as a kill some steps after the checkpoint of `step` leaves it.

    Args:
      evaluated: whether the stage that ends at this step, if one does, was evaluated before the kill.
    """
    shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns("report", "texts", "tensorboard"))
    for checkpoint in (workdir / "checkpoints").iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    config = json.loads((workdir / "config.json").read_text())
    done, total = [], 0
    for stage in config["stages"]:
        total += config["stage"][stage]["steps"]
        if total < step or (total == step and evaluated):
            done.append(stage)
    results, selection, metrics = (workdir / name for name in ("results.json", "selection.json", "metrics.jsonl"))
    rows = json.loads(results.read_text())
    results.write_text(json.dumps({row: rows[row] for row in rows if row.removesuffix(" (validation)") in done}))
    selection.write_text(json.dumps({**json.loads(selection.read_text()), "selected": None}))
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if '"loss"' in line or json.loads(line)["stage"] in done))
    return workdir
