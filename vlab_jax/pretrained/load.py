"""Pretrained weights in: a checkpoint's tensors become this model's parameters, or a refusal says why not.

Nothing is guessed: every tensor of the checkpoint is used, and every parameter of the two towers is filled.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vlab_jax.errors import InputError
from vlab_jax.pretrained import eva_clip, hugging_face, open_clip, vlab
from vlab_jax.pretrained.architecture import Architecture, compare
from vlab_jax.pretrained.convert import Rule, Shape, check, fit_frames, fit_positions
from vlab_jax.pretrained.files import Files, Tensors, check_preprocessing, locate

# A tensor that only one format has, and the function that reads that format's architecture.
FORMATS: tuple[tuple[str, Callable[[Tensors, Files, str], Architecture]], ...] = (
    (hugging_face.MARK, hugging_face.architecture),
    (open_clip.MARK, open_clip.architecture),
    (eva_clip.TIMM_MARK, eva_clip.architecture),
    (eva_clip.AUTHORS_MARK, eva_clip.architecture),
    (vlab.MARK, vlab.architecture),
)

FRAMES = "frame_position"  # what the paths of positions of frames end in

PARTS = ("vision", "text", "logit_scale")  # of VLAB's parameters, what a CLIP checkpoint holds


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A checkpoint that was opened: nothing but names, shapes and configs is read yet.

    `name` is what the user calls it.
    """

    name: str
    files: Files
    tensors: Tensors
    architecture: Architecture

    @property
    def whole(self) -> bool:
        """Whether it holds a whole VLAB, and not a CLIP alone."""
        return self.architecture.format == vlab.FORMAT

    def licence(self) -> str:
        """The licence that the model card in its folder names."""
        card = self.files.folder / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        named = re.match(r"---\n(?:.*\n)*?license: *(\S.*)\n(?:.*\n)*?---\n", text)
        return named[1].strip() if named else "not stated in its files"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a parameter came from: the tensor names (`{}` for the block) and their files, and what was done to it."""

    target: str
    size: int
    sources: tuple[str, ...]
    change: str = ""


def open_checkpoint(name: str) -> Pretrained:
    """Finds a checkpoint and reads what its headers and configs say.

    Args:
      name: a `.safetensors` file, the index of a sharded checkpoint, a directory, or a model on the hub.

    Raises:
      InputError: there is none, it is damaged, or it is of no known format.
    """
    files = locate(name)
    tensors = Tensors(files.weights)
    for mark, read in FORMATS:
        if mark in tensors:
            check_preprocessing(files)
            return Pretrained(name, files, tensors, read(tensors, files, name))
    names = ", ".join(list(tensors)[:3]) or "none"
    raise InputError(
        f"{name} holds neither a CLIP of Hugging Face, OpenCLIP or EVA-CLIP, nor a VLAB export; its tensors: {names}"
    )


def check_model(pretrained: Pretrained, model: Mapping[str, Any]) -> list[str]:
    """Compares the fields of a model (`config.model`) with a checkpoint's.

    Returns:
      What is made to fit, and what the checkpoint does not tell, one line each.

    Raises:
      InputError: they differ in a size; all differences are listed.
    """
    return compare(pretrained.architecture, model, pretrained.name)


def load_parameters(
    pretrained: Pretrained, shapes: Mapping[str, Any], shardings: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Origin]]:
    """The parameters that a checkpoint holds, in float32, each placed as soon as it is read.

    Largest first: what is held twice, on the host and on the device, is then small beside what is still to come.

    Args:
      shapes: VLAB's parameter tree as shapes; of it, `vision`, `text` and `logit_scale` are filled, or (where the
        checkpoint is a VLAB export) everything.
      shardings: a tree of `NamedSharding` like `shapes`.

    Returns:
      The tree of what was filled, and where each parameter came from.

    Raises:
      InputError: a tensor is missing, misshapen or not used, or a parameter is not filled; nothing is loaded then.
    """
    parts = shapes if pretrained.whole else {part: shapes[part] for part in PARTS}
    wanted = {path: leaf.shape for path, leaf in flatten_dict(parts, sep="/").items()}
    placement = flatten_dict({part: shardings[part] for part in parts}, sep="/")
    stored = _stored_shapes(pretrained, wanted)
    rules = pretrained.architecture.rules
    check(rules, stored, pretrained.tensors, pretrained.architecture.buffers, pretrained.name)
    filled, origins = {}, {}
    for rule in sorted(rules, key=lambda rule: -math.prod(wanted[rule.target])):
        path, shape = rule.target, wanted[rule.target]
        value, change = _fitted(path, _read(rule, stored[path], pretrained.tensors), shape)
        filled[path] = _placed(value, placement[path])
        origins[path] = Origin(path, math.prod(shape), rule.sources, change)
    return unflatten_dict(filled, sep="/"), [origins[path] for path in wanted]


def _stored_shapes(pretrained: Pretrained, wanted: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of the parameters as the checkpoint has them: with its own number of positions."""
    vision, text = pretrained.architecture.vision, pretrained.architecture.text
    rows = {
        "vision/position_embedding": (vision["image_size"] // vision["patch_size"]) ** 2 + 1,
        "text/position_embedding": text["context_length"],
    }
    stored = {**wanted, **{path: (count, *wanted[path][1:]) for path, count in rows.items()}}
    told = {path: pretrained.tensors[path] for path in wanted if path.endswith(FRAMES) and path in pretrained.tensors}
    return {**stored, **{path: shape for path, shape in told.items() if len(shape) == len(wanted[path])}}


def _read(rule: Rule, shape: Shape, tensors: Tensors) -> np.ndarray:
    """A parameter on the host, in float32, block by block."""
    value = np.empty(shape, np.float32)
    blocks = value if rule.stacked else value[None]
    for block, names in enumerate(rule.source_names(shape)):
        blocks[block] = rule.layout.to_ours(tensors.read(names), blocks.shape[1:])
    return value


def _fitted(path: str, value: np.ndarray, shape: Shape) -> tuple[np.ndarray, str]:
    """Positions in the number that the model has, and what was done to them."""
    if value.shape == shape:
        return value, ""
    if path.endswith(FRAMES):
        return fit_frames(value, shape[-2]), f"interpolated from {value.shape[-2]} to {shape[-2]} frames"
    if path.startswith("text/"):
        return value[: shape[0]], f"the first {shape[0]} of {len(value)} positions"
    old, new = math.isqrt(len(value) - 1), math.isqrt(shape[0] - 1)
    return fit_positions(value, shape[0]), f"interpolated from {old} x {old} to {new} x {new} patches"


def _placed(value: np.ndarray, sharding: Any) -> jax.Array:
    # Waited for: copies still under way would keep what was read alive on the host, one parameter after another.
    return jax.block_until_ready(jax.make_array_from_callback(value.shape, sharding, lambda index: value[index]))


# FOLDED vlab_jax/pretrained/load.py: The table that says which parameters came from where.


def format_origins(origins: Iterable[Origin], others: Mapping[str, tuple[int, str]]) -> str:
    """A table of parameters, their number, and where they came from.

    Args:
      origins: of the parameters that a checkpoint filled; those of one submodule from one source are one line.
      others: path → (number of parameters, where they came from), of the rest.
    """
    lines = [("parameters", "number", "from")]
    for target, group in groupby(origins, key=lambda origin: (_submodule(origin.target), origin.change)):
        members = list(group)
        tensors = ", ".join(dict.fromkeys(_stem(name) for member in members for name in member.sources))
        change = f" ({target[1]})" if target[1] else ""
        lines.append((target[0], f"{sum(member.size for member in members):,}", tensors + change))
    lines += [(path, f"{size:,}", source) for path, (size, source) in others.items()]
    return _aligned(lines)


def _submodule(path: str) -> str:
    """`…/mlp/input/kernel` and `…/mlp/input/bias` are one module."""
    return re.sub(r"/(norm/)?(kernel|bias|scale)$", "", path)


def _stem(name: str) -> str:
    return re.sub(r"\.(weight|bias)$", "", name).replace("{}", "*")


def _aligned(lines: Sequence[tuple[str, str, str]]) -> str:
    first, second = (max(len(line[column]) for line in lines) for column in (0, 1))
    return "\n".join(f"{path:<{first}}  {number:>{second}}  {source}" for path, number, source in lines)
