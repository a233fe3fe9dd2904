"""This package's own exports: a whole VLAB in safetensors, its tensors named and shaped as the parameters are."""

from collections.abc import Mapping
from typing import Any

from vlab_jax.errors import InputError
from vlab_jax.pretrained.architecture import Architecture, Sizes
from vlab_jax.pretrained.convert import Rule
from vlab_jax.pretrained.files import Files

FORMAT = "VLAB"
MARK = "vision/class_embedding"
CONFIG = "config.json"
MODEL_TYPE = "vlab"  # what `model_type` is in the config of an export


def architecture(tensors: Sizes, files: Files, where: str) -> Architecture:
    """The architecture of an export.

    Raises:
      InputError: its config is missing, or is none of an export.
    """
    config = read_config(files, where)
    groups: Mapping[str, Any] = config["training"]["model"]
    others = {group: groups[group] for group in ("adapter", "decoder")}
    rules = tuple(Rule(name, (name,)) for name in tensors)
    return Architecture(FORMAT, groups["vision"], groups["text"], rules, others=others)


def read_config(files: Files, where: str) -> dict[str, Any]:
    """The config of an export: `training` is that of the run, beside what the model card says."""
    config = files.json(CONFIG)
    if config is None or config.get("model_type") != MODEL_TYPE or "training" not in config:
        raise InputError(f"{where} lacks the {CONFIG} of a VLAB export; without it the tensors cannot be used")
    return config
