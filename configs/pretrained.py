"""Sets the fields of a config that starts from a checkpoint."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vlab_jax.config import model_fields


def start_from(config: ConfigDict, name: str) -> tuple[str, ...]:
    """Makes `config` start from a checkpoint.

    From an export it takes the whole model, the frames and the data sets; from a CLIP, the sizes of the two towers.

    Returns:
      The parts of CLIP that stayed frozen in the last stage of the export's training; for a CLIP, none.
    """
    from vlab_jax.pretrained.export import read_config
    from vlab_jax.pretrained.load import open_checkpoint  # imported here: it takes seconds, and few configs need it

    pretrained = open_checkpoint(name)
    config.model.pretrained = name
    if not pretrained.whole:
        towers = pretrained.architecture
        config.model.update({"vision": dict(towers.vision), "text": dict(towers.text)})
        config.model.adapter.width = config.model.vision.width // 2
        config.model.adapter.heads = config.model.vision.heads
        return ()
    training = _tuples(read_config(pretrained.files, name)["training"])
    config.model.update({**training["model"], "pretrained": name})
    config.update({key: training[key] for key in ("frames", "image_frames", "dtype")})
    config.data.update({key: training["data"][key] for key in ("train", "evaluate", "short")})
    return _kept(training)


def _kept(training: Mapping[str, Any]) -> tuple[str, ...]:
    from vlab_jax.models.vlab import VLAB, parameter_shapes
    from vlab_jax.training.frozen import frozen_clip_parts
    from vlab_jax.training.optim import parse_groups

    stage, model = training["stage"][training["stages"][-1]], VLAB.from_fields(model_fields(training))
    groups, shapes = parse_groups(stage["groups"]), parameter_shapes(model, training["frames"])
    return frozen_clip_parts(shapes, groups, model, stage["objectives"], stage["streams"])


def _tuples(value: Any) -> Any:
    """Restores the tuples of a config that was saved as JSON."""
    if isinstance(value, dict):
        return {key: _tuples(each) for key, each in value.items()}
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value
