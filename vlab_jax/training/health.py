"""Steps that go wrong: gradients that are not finite, losses that jump; and the replay of the batch of such a step."""

import collections
import logging
import math
import pathlib
import statistics
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from vlab_jax import config as configuration
from vlab_jax.errors import InputError, RunStopped
from vlab_jax.models.vlab import parameter_shapes
from vlab_jax.runtime import sharding
from vlab_jax.runtime.checkpoint import Checkpoints
from vlab_jax.runtime.disk import writing
from vlab_jax.training import setup

FOLDER = "replay"
_STAGE, _STEP, _IDS = "_stage", "_step", "_ids"
_NAMED = 8  # clips in a message


class StepMonitor:
    """Checks the steps of a stage, in order.

    A step whose gradients are not finite changed nothing (`step.make_train_step`): it is logged with the ids of its
    clips, and too many in a row end the run. A loss far above the 50 before it is logged with its clips, too.

    Args:
      max_skipped: steps in a row that may be skipped; one more ends the run.
      on_stop: called with the step that ends the run, to keep its batch; returns a line about what is kept.
    """

    def __init__(self, stage: str, max_skipped: int, on_stop: Callable[[int], str]) -> None:
        self._stage, self._max_skipped, self._on_stop = stage, max_skipped, on_stop
        self._skipped = 0
        self._losses: collections.deque[float] = collections.deque(maxlen=50)

    def check(self, step: int, loss: float, finite: bool, ids: Sequence[str]) -> None:
        """Checks the next step of the stage; raises `RunStopped` if too many in a row were skipped."""
        where = f"step {step} of stage {self._stage!r}"
        if finite and math.isfinite(loss):
            self._check_spike(loss, where, ids)
            self._losses.append(loss)
            self._skipped = 0
            return
        self._skipped += 1
        logging.warning("skipped %s: loss %s, gradients not finite; its clips: %s", where, loss, listed(ids))
        if self._skipped > self._max_skipped:
            raise RunStopped(
                f"gradients are not finite in {self._skipped} steps in a row, the last of them {where}; "
                f"{self._on_stop(step)}; lower the learning rate or clip_norm, or look at the clips"
            )

    def _check_spike(self, loss: float, where: str, ids: Sequence[str]) -> None:
        """Logs a loss above the median by more than 8 median absolute deviations, and by more than a fifth of it."""
        if len(self._losses) >= 20:
            usual = statistics.median(self._losses)
            spread = statistics.median(abs(other - usual) for other in self._losses)
            if loss - usual > max(8 * spread, 0.2 * abs(usual)):
                logging.warning("the loss is %.4g at %s, usually %.4g; its clips: %s", loss, where, usual, listed(ids))


def listed(ids: Sequence[str]) -> str:
    """The first ids, and how many more there are."""
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return ", ".join(map(str, ids[:_NAMED])) + more


def keep_batch(workdir: pathlib.Path, stage: str, step: int, ids: Any, batch: Mapping[str, np.ndarray]) -> pathlib.Path:
    """Writes this process's part of a batch to a file in `<workdir>/replay`, and returns its path."""
    path = workdir / FOLDER / f"{stage}-{step}-process-{jax.process_index()}.npz"
    about = {_STAGE: np.array(stage), _STEP: np.array(step), _IDS: np.array(ids, str)}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **batch, **about)
    return path


def replay(config: ConfigDict, workdir: pathlib.Path, path: pathlib.Path) -> str:
    """Computes the losses and gradients of a kept batch with the run's newest parameters, without a step; returns a
    table of each loss, and of the norm of the gradient of each part of the parameters. Raises `InputError` if the file
    is no kept batch, or the run has no checkpoint."""
    config = configuration.resolved(config)
    try:
        with np.load(path, allow_pickle=False) as file:
            batch = dict(file)
        name, step, ids = str(batch.pop(_STAGE)), int(batch.pop(_STEP)), batch.pop(_IDS).tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is not a batch that a run has kept: {error}") from error
    if name not in config.stages:
        raise InputError(f"{path} is of stage {name!r}, which is not one of this config: {', '.join(config.stages)}")
    mesh = sharding.make_mesh()
    model, stage = setup.make_model(config, mesh), setup.read_stage(config, name)
    shapes = parameter_shapes(model, model.frames)
    with Checkpoints(workdir / "checkpoints") as saved:
        latest = saved.latest()
        if latest is None:
            raise InputError(f"{workdir} holds no checkpoint to replay with")
        parameters = saved.restore_parameters(latest, shapes, sharding.shardings(shapes, mesh), averaged=False)
    rng = jax.random.fold_in(jax.random.key(stage.seed), step - 1)  # as in the step

    def loss(parameters):
        return stage.objective(model, parameters, jax.tree.map(jnp.asarray, batch), rng)

    with jax.default_matmul_precision(config.matmul_precision):
        gradient, metrics = jax.jit(jax.grad(loss, has_aux=True))(parameters)
    norms = {part: optax.global_norm(leaves) for part, leaves in gradient.items()}
    lines = [f"step {step} of stage {name}, with the parameters of checkpoint {latest}", f"clips: {listed(ids)}"]
    lines += [f"{metric:<24}{float(value):12.5g}" for metric, value in metrics.items()]
    lines += [f"gradient of {part:<12}{float(norm):12.5g}" for part, norm in norms.items()]
    return "\n".join(lines)
