"""Restores the model of a run from one of its checkpoints, for evaluation, export and use."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from vlab_jax.config import model_fields
from vlab_jax.models.attention_check import attention_shapes, with_checked_kernels
from vlab_jax.models.vlab import STREAMS, VLAB, parameter_shapes
from vlab_jax.runtime import sharding
from vlab_jax.runtime.checkpoint import CONFIG, PROGRESS, Checkpoints, find_checkpoint


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint of a run: the run's workdir, the checkpoint's step and stage, the run's config, and the model."""

    home: pathlib.Path
    step: int
    config: dict[str, Any]
    stage: str
    model: VLAB
    parameters: dict[str, Any]


def model_for(config: Mapping[str, Any], mesh: Mesh) -> VLAB:
    """The model of a run's config, as it is used on the devices of a mesh."""
    model = VLAB.from_fields(model_fields(config, sharding.platform_of(mesh)))
    shapes = attention_shapes(model, config["frames"], config["image_frames"], STREAMS, texts=1, masked=False)
    return with_checked_kernels(model, shapes)


def restore(checkpoint: pathlib.Path, mesh: Mesh) -> Restored:
    """Restores the model of a checkpoint on the mesh, with the parameters' moving average if the run kept one. Path and
    errors are those of `runtime.checkpoint.find_checkpoint` and `Checkpoints`."""
    home, step = find_checkpoint(checkpoint)
    with jax.set_mesh(mesh), Checkpoints(home / "checkpoints") as checkpoints:
        config = checkpoints.read_json(step, CONFIG)
        stage = config["stages"][checkpoints.read_json(step, PROGRESS)["stage"]]
        model = model_for(config, mesh)
        shapes = parameter_shapes(model, config["frames"])
        placement = sharding.shardings(shapes, mesh)
        averaged = bool(config["stage"][stage]["average_decay"])
        parameters = checkpoints.restore_parameters(step, shapes, placement, averaged=averaged)
    return Restored(home, step, config, stage, model, parameters)
