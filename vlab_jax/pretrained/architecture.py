"""What a checkpoint says of the model that it holds."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from vlab_jax.errors import InputError
from vlab_jax.pretrained.convert import Rule

Sizes = Mapping[str, tuple[int, ...]]  # names and shapes of tensors

# Fields in which a model may differ from its checkpoint: positions are made to fit.
ADAPTED = {("vision", "image_size"), ("text", "context_length")}
# Fields of the towers that say how parameters start, and nothing of what a checkpoint holds.
INITIAL = {"token_deviation"}

# Fields of the vision tower that are the same in every CLIP, as opposed to EVA-CLIP.
PLAIN = {
    "pre_norm": True,
    "patch_bias": False,
    "key_bias": True,
    "projection_bias": False,
    "gated_mlp": False,
    "inner_norms": False,
    "rotary_grid": 0,
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A checkpoint's format, the fields of the model that its files tell, and the rules for its tensors.

    `vision` and `text` are fields of `models.clip.VisionTower` and `TextTower`; one that the files do not tell is
    absent. `others` are further groups of fields of `config.model` (of a whole VLAB). `buffers` are the endings of
    names of tensors that hold no parameter.
    """

    format: str
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    rules: tuple[Rule, ...]
    buffers: tuple[str, ...] = ()
    others: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def depth(tensors: Mapping[str, Any], pattern: str) -> int:
    """The number of blocks among the tensors: one more than the highest number in place of the pattern's `{}`."""
    before, after = pattern.split("{}")
    found = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    numbers = [int(match[1]) for match in map(found.fullmatch, tensors) if match]
    return max(numbers, default=-1) + 1


def size_of(tensors: Mapping[str, tuple[int, ...]], name: str, axis: int, where: str) -> int:
    """The length of a tensor along an axis.

    Raises:
      InputError: there is no such tensor, or it has no such axis.
    """
    shape = tensors.get(name)
    if shape is None:
        raise InputError(f"{where} lacks the tensor {name}")
    if not -len(shape) <= axis < len(shape):
        raise InputError(f"{where}: {name} is {list(shape)}; it has too few dimensions")
    return shape[axis]


def image_size(positions: int, patch_size: int, where: str) -> int:
    """The side in pixels of the square images that so many positions (the class token's included) are for."""
    side = math.isqrt(positions - 1)
    if side * side != positions - 1:
        raise InputError(f"{where} has {positions - 1} positions of patches, which make no square")
    return side * patch_size


def compare(architecture: Architecture, model: Mapping[str, Mapping[str, Any]], where: str) -> list[str]:
    """Compares a model with a checkpoint.

    Args:
      model: the groups of fields of `config.model`: `vision`, `text` and others.

    Returns:
      What is made to fit, and what the checkpoint does not tell, one line each.

    Raises:
      InputError: they differ in a size; all differences are listed, the config's value first.
    """
    notes, differences, settings = [], [], []
    groups = {"vision": architecture.vision, "text": architecture.text, **architecture.others}
    fields = [(group, key, _plain(value)) for group in groups for key, value in model[group].items()]
    for group, key, asked in fields:
        told, name = _plain(groups[group].get(key)), f"model.{group}.{key}"
        if key in INITIAL or asked == told:
            continue
        if told is None:
            notes.append(f"{where} does not tell {name}; the config's {asked} is taken")
        elif (group, key) in ADAPTED:
            notes.append(_adapted(name, asked, told))
        else:
            differences.append(f"{name}: {asked} → {told}")
            settings.append(f"--config.{name}={told}")
    if differences:
        raise InputError(
            f"the config's model is not that of {where} (config → checkpoint): {'; '.join(differences)}; "
            f"name another checkpoint, or set {' '.join(settings)}"
        )
    return notes


def _plain(value: Any) -> Any:
    """A field as JSON has it: a list for a tuple."""
    return list(value) if isinstance(value, tuple) else value


def _adapted(name: str, asked: int, told: int) -> str:
    if name.endswith("context_length") and asked > told:
        raise InputError(f"{name} is {asked}; the checkpoint has {told} positions, so set it to {told}")
    how = "positions are interpolated" if name.endswith("image_size") else f"the first {asked} positions are taken"
    return f"{name} is {asked} where the checkpoint has {told}: {how}"
