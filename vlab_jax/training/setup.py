"""Turns a training config into plain values: the model and the settings of each stage. Nothing below takes a config.

It also compares the config with that of the run that a workdir holds.
"""

from collections.abc import Mapping
from typing import Any

from flax.core import freeze
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlab_jax import config as configuration
from vlab_jax.data.sampling import sample_image_frames
from vlab_jax.data.sources import parse_mixture
from vlab_jax.errors import InputError
from vlab_jax.models.vlab import VLAB
from vlab_jax.runtime import sharding
from vlab_jax.runtime.checkpoint import CONFIG, Checkpoints
from vlab_jax.training import optim
from vlab_jax.training.objectives import Objective
from vlab_jax.training.stage import StageSettings

# What may change between a checkpoint and the run that resumes from it: how it runs, not what it computes.
FREE_ON_RESUME = (
    "data.directory data.manual_dir data.workers data.prefetch_gigabytes data.max_failed_share data.limits "
    "data.retry_seconds checkpoint.every checkpoint.keep log_every most_skipped attention mesh stop_after report"
)


def make_model(config: ConfigDict, mesh: Mesh) -> VLAB:
    """The model of a config, as it is computed on the devices of a mesh."""
    fields = configuration.plain(config.to_dict())
    return VLAB.from_fields(configuration.model_fields(fields, sharding.platform_of(mesh)))


def read_stages(config: ConfigDict) -> tuple[StageSettings, ...]:
    """The settings of all stages of a config, in order; raises as `read_stage`."""
    return tuple(read_stage(config, name) for name in config.stages)


def read_stage(config: ConfigDict, name: str) -> StageSettings:
    """The settings of one stage; raises `InputError` for wrong parameter groups or a wrong mixture of data sets."""
    stage = config.stage[name]
    try:
        groups = optim.parse_groups(stage.groups)
    except InputError as error:
        raise InputError(f"config.stage.{name}.groups: {error}") from error
    frames = stage.frames or config.frames
    objective = Objective(
        freeze(dict(stage.objectives)),
        tuple(stage.streams),
        sample_image_frames(frames, min(frames, config.image_frames)),
        stage.label_smoothing,
        stage.masked_share,
        stage.contrastive_chunk,
    )
    same = (
        *("steps", "batch_size", "micro_batches", "warmup_steps", "end_learning_rate_share", "weight_decay"),
        *("clip_norm", "b1", "b2", "average_decay", "start_from_clip", "evaluate_every"),
    )
    return StageSettings(
        name=name,
        objective=objective,
        groups=groups,
        freeze_unused=stage.unused == "frozen",
        mixture=tuple(parse_mixture(stage.train or config.data.train)),
        tasks=tuple(stage.evaluate or config.evaluation.tasks),
        frames=frames,
        questions=stage.questions_per_clip if stage.objectives.question_answering else 0,
        seed=config.seed,
        **{field: stage[field] for field in same},
    )


def check_workdir(checkpoints: Checkpoints, config: Mapping[str, Any]) -> None:
    """Compares a config (plain, as from JSON) with that of the newest checkpoint; raises `InputError` with the fields
    in which they differ."""
    latest = checkpoints.latest()
    if latest is None:
        return
    saved = checkpoints.read_json(latest, CONFIG)
    defaults = configuration.training_config().to_dict()
    defaults["stage"] = {name: configuration.stage_config().to_dict() for name in saved["stage"]}
    # Fields that the package got later have their defaults.
    filled = flatten_dict(configuration.plain(defaults), sep=".") | flatten_dict(saved, sep=".")
    if changed := differences(filled, config):
        raise InputError(
            f"{checkpoints.directory.parent} holds a run of another config; use another --workdir, or set back: "
            + "; ".join(changed)
        )


def differences(saved: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """The fields in which two configs differ, as `name: saved → config`, without those that are free on resume."""
    old, new = flatten_dict(saved, sep="."), flatten_dict(config, sep=".")
    free = tuple(f"{name}." for name in FREE_ON_RESUME.split())
    names = [name for name in {**old, **new} if not f"{name}.".startswith(free)]
    return [f"{name}: {old.get(name)!r} → {new.get(name)!r}" for name in names if old.get(name) != new.get(name)]
