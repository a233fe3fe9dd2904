"""The fields of a model that starts from a checkpoint."""

from typing import Any

from ml_collections import ConfigDict


def start_from(config: ConfigDict, name: str) -> None:
    """Makes `config` start from a checkpoint.

    Of an export it takes the whole model, the frames and the data sets; of a CLIP the sizes of the two towers.
    """
    from vlab_jax.pretrained.load import open_checkpoint  # here, because it takes seconds, and few configs need it
    from vlab_jax.pretrained.vlab import read_config

    pretrained = open_checkpoint(name)
    config.model.pretrained = name
    if not pretrained.whole:
        towers = pretrained.architecture
        config.model.update({"vision": dict(towers.vision), "text": dict(towers.text)})
        config.model.adapter.width = config.model.vision.width // 2
        config.model.adapter.heads = config.model.vision.heads
        return
    training = _tuples(read_config(pretrained.files, name)["training"])
    config.model.update({**training["model"], "pretrained": name})
    config.update({key: training[key] for key in ("frames", "image_frames", "dtype")})
    config.data.update({key: training["data"][key] for key in ("train", "evaluate", "short")})


def _tuples(value: Any) -> Any:
    """A config as it was before it became JSON, which has no tuples."""
    if isinstance(value, dict):
        return {key: _tuples(each) for key, each in value.items()}
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value
