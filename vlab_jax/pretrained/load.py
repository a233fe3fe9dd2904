"""Loads pretrained weights: a checkpoint's tensors become this model's parameters, or an error says why not.

Nothing is guessed: every tensor of the checkpoint is used, and every parameter of the two towers is filled.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vlab_jax.errors import InputError
from vlab_jax.pretrained import eva_clip, export, hugging_face, open_clip
from vlab_jax.pretrained.convert import CLIP_DEFAULTS, Architecture, Rule, Shape, check, fit_frames, fit_positions
from vlab_jax.pretrained.files import Files, Tensors, check_preprocessing, locate

# A tensor that only one format has, and the function that reads the architecture in that format.
FORMATS: dict[str, Callable[[Tensors, Files, str], Architecture]] = {
    hugging_face.MARK: hugging_face.architecture,
    open_clip.MARK: open_clip.architecture,
    eva_clip.TIMM_MARK: eva_clip.architecture,
    eva_clip.AUTHORS_MARK: eva_clip.architecture,
    export.MARK: export.architecture,
}

# Fields in which a model may differ from its checkpoint: positions are made to fit.
ADAPTED = {("vision", "image_size"), ("text", "context_length")}
# Fields of the towers that matter only at initialisation.
INITIAL = {"token_deviation"}
FRAMES = "frame_position"  # the ending of the paths of frame positions
PARTS = ("vision", "text", "logit_scale")  # the parts of VLAB's parameters that a CLIP checkpoint holds


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """An opened checkpoint, of which only names, shapes and configs are read; `name` is the user's."""

    name: str
    files: Files
    tensors: Tensors
    architecture: Architecture

    @property
    def whole(self) -> bool:
        """Whether it holds a whole VLAB, not only a CLIP."""
        return self.architecture.format == export.FORMAT

    def licence(self) -> str:
        """The licence in the model card in its folder."""
        card = self.files.folder / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        named = re.match(r"---\n(?:.*\n)*?license: *(\S.*)\n(?:.*\n)*?---\n", text)
        return named[1].strip() if named else "not stated in its files"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a parameter comes from: the names of the tensors (`{}` for the block), and how it was changed."""

    target: str
    size: int
    sources: tuple[str, ...]
    change: str = ""


def open_checkpoint(name: str) -> Pretrained:
    """Finds a checkpoint by a name as `files.locate` has it, and reads its headers and configs.

    Raises:
      InputError: there is none, it is damaged, or it is of no known format.
    """
    files = locate(name)
    tensors = Tensors(files.weights)
    for mark, read in FORMATS.items():
        if mark in tensors:
            check_preprocessing(files)
            return Pretrained(name, files, tensors, read(tensors, files, name))
    names = ", ".join(list(tensors)[:3]) or "none"
    raise InputError(
        f"{name} holds neither a CLIP of Hugging Face, OpenCLIP or EVA-CLIP, nor a VLAB export; its tensors: {names}"
    )


def check_model(pretrained: Pretrained, model: Mapping[str, Any]) -> list[str]:
    """Compares a model with a checkpoint.

    Args:
      model: the groups of fields of `config.model`: `vision`, `text` and others.

    Returns:
      What is made to fit, and what the checkpoint does not show, one line each.

    Raises:
      InputError: they differ in a size; all differences are listed, the config's value first.
    """
    where, architecture = pretrained.name, pretrained.architecture
    notes, differences, settings = [], [], []
    groups = {"vision": {**CLIP_DEFAULTS, **architecture.vision}, "text": architecture.text, **architecture.others}
    for group, found in groups.items():
        for key, configured in model[group].items():
            name = f"model.{group}.{key}"
            # JSON has no tuples.
            ours, theirs = (list(each) if isinstance(each, tuple) else each for each in (configured, found.get(key)))
            if key in INITIAL or ours == theirs:
                continue
            if theirs is None:
                notes.append(f"{where} does not show {name}; the config's {ours} is used")
            elif (group, key) not in ADAPTED:
                differences.append(f"{name}: {ours} → {theirs}")
                settings.append(f"--config.{name}={theirs}")
            elif key == "context_length" and ours > theirs:
                raise InputError(f"{name} is {ours}; the checkpoint has {theirs} positions, so set it to {theirs}")
            else:
                how = "positions are interpolated" if group == "vision" else f"the first {ours} positions are used"
                notes.append(f"{name} is {ours} where the checkpoint has {theirs}: {how}")
    if differences:
        raise InputError(
            f"the config's model is not that of {where} (config → checkpoint): {'; '.join(differences)}; "
            f"name another checkpoint, or set {' '.join(settings)}"
        )
    return notes


def load_parameters(
    pretrained: Pretrained, shapes: Mapping[str, Any], shardings: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Origin]]:
    """The parameters of a checkpoint, in float32, and where each comes from.

    Each is placed on the devices as soon as it is read, largest first: for a moment a parameter is held twice, on the
    host and on the device, which needs no extra memory as long as smaller ones are still to come.

    Args:
      shapes: VLAB's parameter tree as shapes; `vision`, `text` and `logit_scale` of it are filled, or (from a VLAB
        export) everything.
      shardings: a tree of `NamedSharding` like `shapes`.

    Raises:
      InputError: a tensor is missing, misshapen or not used, or a parameter is not filled; then nothing is loaded.
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
        value, change = _fit(path, _read(rule, stored[path], pretrained.tensors), shape)
        filled[path] = _place(value, placement[path])
        origins[path] = Origin(path, math.prod(shape), rule.sources, change)
    return unflatten_dict(filled, sep="/"), [origins[path] for path in wanted]


def _stored_shapes(pretrained: Pretrained, wanted: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of the parameters with the checkpoint's own number of positions."""
    vision, text = pretrained.architecture.vision, pretrained.architecture.text
    rows = {
        "vision/position_embedding": (vision["image_size"] // vision["patch_size"]) ** 2 + 1,
        "text/position_embedding": text["context_length"],
    }
    stored = {**wanted, **{path: (count, *wanted[path][1:]) for path, count in rows.items()}}
    for path in wanted:
        shape = pretrained.tensors.get(path, ())
        if path.endswith(FRAMES) and len(shape) == len(wanted[path]):
            stored[path] = shape
    return stored


def _read(rule: Rule, shape: Shape, tensors: Tensors) -> np.ndarray:
    value = np.empty(shape, np.float32)
    blocks = value if rule.stacked else value[None]
    for block, names in enumerate(rule.source_names(shape)):
        blocks[block] = rule.layout.to_ours(tensors.read(names), blocks.shape[1:])
    return value


def _fit(path: str, value: np.ndarray, shape: Shape) -> tuple[np.ndarray, str]:
    """A parameter with the model's number of positions, and how it was changed."""
    if value.shape == shape:
        return value, ""
    if path.endswith(FRAMES):
        return fit_frames(value, shape[-2]), f"interpolated from {value.shape[-2]} to {shape[-2]} frames"
    if path.startswith("text/"):
        return value[: shape[0]], f"the first {shape[0]} of {len(value)} positions"
    old, new = math.isqrt(len(value) - 1), math.isqrt(shape[0] - 1)
    return fit_positions(value, shape[0]), f"interpolated from {old} x {old} to {new} x {new} patches"


def _place(value: np.ndarray, sharding: Any) -> jax.Array:
    # Waits, because pending copies would keep one parameter after another alive on the host.
    return jax.block_until_ready(jax.make_array_from_callback(value.shape, sharding, lambda index: value[index]))


def format_origins(origins: Iterable[Origin], others: Mapping[str, tuple[int, str]]) -> str:
    """A table of parameters, their number, and where they come from.

    Args:
      origins: of the parameters from a checkpoint; those of one submodule are one line.
      others: path → (number of parameters, where they come from), of the rest.
    """

    def submodule(origin: Origin) -> tuple[str, str]:
        return re.sub(r"/(norm/)?(kernel|bias|scale)$", "", origin.target), origin.change

    lines = [("parameters", "number", "from")]
    for (path, change), group in groupby(origins, key=submodule):
        members = list(group)
        names = (re.sub(r"\.(weight|bias)$", "", name) for member in members for name in member.sources)
        tensors = ", ".join(dict.fromkeys(names)).replace("{}", "*") + (f" ({change})" if change else "")
        lines.append((path, f"{sum(member.size for member in members):,}", tensors))
    lines += [(path, f"{size:,}", source) for path, (size, source) in others.items()]
    first, second = (max(map(len, column)) for column in list(zip(*lines, strict=True))[:2])
    return "\n".join(f"{path:<{first}}  {number:>{second}}  {source}" for path, number, source in lines)
