"""What a run leaves in its workdir, read back."""

import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from vlab_jax.runtime.checkpoint import STATE, Checkpoints
from vlab_jax.runtime.metrics import read_metrics


def saved_state(workdir: pathlib.Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by its path."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        manager = checkpoints._manager
        step = manager.latest_step() if step is None else step
        restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))[STATE]
    leaves = jax.tree_util.tree_leaves_with_path(restored)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_state(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """The same arrays, bit for bit."""
    assert one.keys() == other.keys() and len(one) > 50
    for name, array in one.items():
        assert array.dtype == other[name].dtype and array.tobytes() == other[name].tobytes(), name


def losses(workdir: pathlib.Path) -> list[tuple[int, str, float]]:
    records = read_metrics(workdir / "metrics.jsonl")
    return [(record["step"], record["stage"], record["loss"]) for record in records if "loss" in record]
