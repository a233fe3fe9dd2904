"""Steps that go wrong: gradients that are not finite, and losses that jump."""

import collections
import logging
import math
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from vlab_jax import config as configuration
from vlab_jax.errors import InputError, RunStopped
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.runtime import sharding
from vlab_jax.runtime.checkpoint import Checkpoints
from vlab_jax.runtime.disk import writing
from vlab_jax.training.stage import objective_of

_NAMED = 8  # clips that a message names


class Anomalies:
    """Watches the steps of a stage, in order.

    A step whose gradients are not finite changed nothing (`step.make_train_step`): it is logged with the ids of its
    clips. So many in a row end the run. A loss that is far above those before it is logged with its clips, too.

    Args:
      stage: its name.
      most_skipped: steps in a row that may be skipped; one more stops.
      stopped: called with the step that the run stops at, so that what led there is kept; says what was.
      window: losses that a loss is compared with.
    """

    def __init__(self, stage: str, most_skipped: int, stopped: Callable[[int], str], window: int = 50) -> None:
        self._stage, self._most, self._stopped = stage, most_skipped, stopped
        self._skipped = 0
        self._losses: collections.deque[float] = collections.deque(maxlen=window)

    def watch(self, step: int, loss: float, finite: bool, ids: Sequence[str]) -> None:
        """Takes a step of the stage.

        Raises:
          RunStopped: too many steps in a row were skipped.
        """
        where = f"step {step} of stage {self._stage!r}"
        if finite and math.isfinite(loss):
            if self._is_spike(loss):
                usual = statistics.median(self._losses)
                logging.warning("the loss is %.4g at %s, usually %.4g; its clips: %s", loss, where, usual, named(ids))
            self._losses.append(loss)
            self._skipped = 0
            return
        self._skipped += 1
        logging.warning("skipped %s: loss %s, gradients not finite; its clips: %s", where, loss, named(ids))
        if self._skipped > self._most:
            raise RunStopped(
                f"gradients are not finite in {self._skipped} steps in a row, the last of them {where}; "
                f"{self._stopped(step)}; lower the learning rate or clip_norm, or look at the clips"
            )

    def _is_spike(self, loss: float) -> bool:
        """Further above the median than eight times the usual distance from it, and by a fifth at least."""
        if len(self._losses) < 20:
            return False
        median = statistics.median(self._losses)
        spread = statistics.median(abs(each - median) for each in self._losses)
        return loss - median > max(8 * spread, 0.2 * abs(median))


def named(ids: Sequence[str]) -> str:
    """The first ids, and how many more there are."""
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return ", ".join(map(str, ids[:_NAMED])) + more


# FOLDED vlab_jax/training/health.py: A batch that a run stopped at: kept, and computed again by itself.

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
