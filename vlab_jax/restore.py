"""The model of a run, as one of its checkpoints holds it: for evaluation, export and use."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from vlab_jax.config import model_fields
from vlab_jax.models.attention_check import attention_shapes, with_sound_kernels
from vlab_jax.models.vlab import STREAMS, VLAB, parameter_shapes
from vlab_jax.runtime import sharding
from vlab_jax.runtime.checkpoint import CONFIG, PROGRESS, Checkpoints, find_checkpoint


@dataclasses.dataclass(frozen=True)
class Restored:
    """A run's workdir and config, the step of one of its checkpoints and the stage that it is of, and the model."""

    home: pathlib.Path
    step: int
    config: dict[str, Any]
    stage: str
    model: VLAB
    parameters: dict[str, Any]


def model_for(config: Mapping[str, Any], mesh: Mesh) -> VLAB:
    """The model of a run's config, to be used on the devices of a mesh."""
    model = VLAB.from_fields(model_fields(config, sharding.platform_of(mesh)))
    shapes = attention_shapes(model, config["frames"], config["image_frames"], STREAMS, texts=1, masked=False)
    return with_sound_kernels(model, shapes)


def restore(checkpoint: pathlib.Path, mesh: Mesh) -> Restored:
    """A checkpoint's model; its parameters' moving average where the run kept one, placed on the mesh.

    Args:
      checkpoint: a run's workdir (the checkpoint it was tested with, or its newest) or its `checkpoints/<step>`.

    Raises:
      InputError: there is no checkpoint, or it cannot be read.
    """
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
