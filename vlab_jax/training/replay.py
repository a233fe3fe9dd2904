"""A batch that a run stopped at: kept, and computed again by itself."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from vlab_jax import config as configuration
from vlab_jax.errors import InputError
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.runtime import sharding
from vlab_jax.runtime.checkpoint import Checkpoints
from vlab_jax.runtime.writing import writing
from vlab_jax.training.anomalies import named
from vlab_jax.training.stage import objective_of

FOLDER = "replay"
_STAGE, _STEP, _IDS = "_stage", "_step", "_ids"


def keep_batch(workdir: pathlib.Path, stage: str, step: int, ids: Any, batch: Mapping[str, np.ndarray]) -> pathlib.Path:
    """Writes this process's part of a batch to `<workdir>/replay`; the file."""
    path = workdir / FOLDER / f"{stage}-{step}-process-{jax.process_index()}.npz"
    about = {_STAGE: np.array(stage), _STEP: np.array(step), _IDS: np.array(ids, str)}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **batch, **about)
    return path


def replay(config: ConfigDict, workdir: pathlib.Path, path: pathlib.Path) -> str:
    """Computes a kept batch with the parameters of the run's newest checkpoint, without a step.

    Returns:
      A table: each objective's loss, and the norm of the gradient of each part of the parameters.

    Raises:
      InputError: the file is no kept batch, or the run has no checkpoint.
    """
    config = configuration.resolved(config)
    stage, step, ids, batch = _read(path)
    if stage not in config.stages:
        raise InputError(f"{path} is of stage {stage!r}, which this config has not; its are {', '.join(config.stages)}")
    mesh = sharding.make_mesh()
    fields = configuration.model_fields(configuration.plain(config.to_dict()), sharding.platform_of(mesh))
    model = VLAB.from_fields(fields)
    shapes = parameter_shapes(model, config.frames)
    with Checkpoints(workdir / "checkpoints") as saved:
        latest = saved.latest()
        if latest is None:
            raise InputError(f"{workdir} holds no checkpoint to replay with")
        parameters = saved.restore_parameters(latest, shapes, sharding.shardings(shapes, mesh), averaged=False)
    objective = objective_of(config.stage[stage], config)
    rng = jax.random.fold_in(jax.random.key(config.seed), step - 1)  # as in the step

    def loss(parameters):
        return objective(model, parameters, batch, rng)

    with jax.default_matmul_precision(config.matmul_precision):
        gradient, metrics = jax.jit(jax.grad(loss, has_aux=True))(parameters)
    norms = {part: optax.global_norm(leaves) for part, leaves in gradient.items()}
    lines = [f"step {step} of stage {stage}, with the parameters of checkpoint {latest}", f"clips: {named(ids)}"]
    lines += [f"{name:<24}{float(value):12.5g}" for name, value in metrics.items()]
    lines += [f"gradient of {part:<12}{float(norm):12.5g}" for part, norm in norms.items()]
    return "\n".join(lines)


def _read(path: pathlib.Path) -> tuple[str, int, list[str], dict[str, jax.Array]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            held = dict(file)
            stage, step, ids = str(held.pop(_STAGE)), int(held.pop(_STEP)), held.pop(_IDS).tolist()
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(f"{path} is not a batch that a run has kept: {error}") from error
    return stage, step, ids, {name: jnp.asarray(value) for name, value in held.items()}
