"""A tiny CLIP of random parameters, saved as Hugging Face has it; no PyTorch is needed."""

import pathlib
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from tiny_models import TEXT, VISION, random_parameters, tiny_vlab

from vlab_jax.models.towers import TextTower, VisionTower
from vlab_jax.models.vlab import VLAB
from vlab_jax.pretrained.export import write_hugging_face

FILE = "model.safetensors"


def full_fields(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every field of the two towers of the tiny model, those with their defaults too."""
    groups = {}
    for group, tower, fields in (("vision", VisionTower, VISION), ("text", TextTower, TEXT)):
        skipped = {"remat", "unroll", "dtype", "kernels", "name", "parent"}
        defaults = {k: f.default for k, f in tower.__dataclass_fields__.items() if k not in skipped}
        groups[group] = {**defaults, **fields, **changes.get(group, {})}
    return groups


def save_clip(folder: pathlib.Path, seed: int = 0, **changes: dict[str, Any]) -> tuple[VLAB, Any]:
    """Saves the CLIP of a tiny VLAB with random parameters; returns the model and all of its parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = full_fields(**changes)
    model = tiny_vlab(**fields)
    parameters = random_parameters(model, seed)
    last = fields["text"]["vocab_size"] - 1
    write_hugging_face(folder, parameters, fields["vision"], fields["text"], last - 1, last)
    return model, parameters


def rewrite(folder: pathlib.Path, change: Any) -> None:
    """Replaces the tensors of a saved checkpoint by `change(tensors)`."""
    save_file(change(load_file(folder / FILE)), folder / FILE)


def flat(tree: Any) -> dict[str, np.ndarray]:
    """A tree's arrays by their paths."""
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}


def on_one_device(shapes: Any) -> Any:
    """A tree of shardings that place everything on the first device."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: place, shapes)
