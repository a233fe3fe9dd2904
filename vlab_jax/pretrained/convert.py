"""Rules between a checkpoint's tensors and this package's parameters, one for each parameter, in both directions.

A rule names a parameter by its path (`text/transformer/blocks/mlp/input/kernel`) and the tensors that make it up; a
`{}` in a tensor's name stands for the number of a block, and blocks are stacked along the first axis. A `Layout` is how
the parameter lies in a PyTorch checkpoint and here: linear layers are `[out, in]` there and `[in, out]` here, and
attention's projections carry their heads as axes here.

Dimensions: `D` width, `H` heads, `d` head width (`H·d = D`), `p` patch side.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vlab_jax.errors import InputError
from vlab_jax.models.layers import interpolate_positions
from vlab_jax.models.towers import VisionTower

Shape = tuple[int, ...]
Sizes = Mapping[str, Shape]  # names and shapes of tensors
# Fields of the vision tower that have the same values in every CLIP, as opposed to EVA-CLIP.
CLIP_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(VisionTower)
    if isinstance(field.default, bool | int) and field.name != "unroll"
}
_LISTED = 5  # names that a message lists


class Layout(NamedTuple):
    """`to_theirs(ours)` splits one parameter into the checkpoint's tensors; `to_ours(theirs, shape)` joins them.

    `to_theirs` uses only methods that NumPy's arrays and JAX's tracers share, so that `jax.eval_shape` can follow it.
    """

    to_theirs: Callable[[Any], list[Any]]
    to_ours: Callable[[Sequence[np.ndarray], Shape], np.ndarray]


def _flat_rows(kernel: Any) -> Any:
    """`[in, …]` to PyTorch's `[out, in]`."""
    return kernel.reshape(kernel.shape[0], -1).transpose()


def _patch_to_theirs(kernel: Any) -> list[Any]:
    side = math.isqrt(kernel.shape[0] // 3)
    return [kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)]


def _reshaped(theirs: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
    return theirs[0].reshape(shape)


def _transposed(theirs: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
    return theirs[0].T.reshape(shape)


# The same array.
SAME = Layout(lambda ours: [ours], _reshaped)
# A linear layer: `[in, out]` here. Or query, key and value in one tensor `[3·D, D]`; here `[D, 3, H, d]`.
LINEAR = Layout(lambda ours: [_flat_rows(ours)], _transposed)
# The bias of such a query, key and value: `[3·D]`; here `[3, H, d]`.
FUSED_BIAS = Layout(lambda ours: [ours.reshape(-1)], _reshaped)
# The same in one tensor for each of the three.
SEPARATE_HEADS = Layout(
    lambda ours: [_flat_rows(ours[:, part]) for part in range(ours.shape[1])],
    lambda theirs, shape: np.stack([part.T.reshape(shape[0], *shape[2:]) for part in theirs], axis=1),
)
SEPARATE_BIASES = Layout(
    lambda ours: [ours[part].reshape(-1) for part in range(ours.shape[0])],
    lambda theirs, shape: np.stack([part.reshape(shape[1:]) for part in theirs]),
)
# Attention's output projection `[D, D]`; here `[H, d, D]`.
OUTPUT = Layout(lambda ours: [ours.reshape(-1, ours.shape[-1]).transpose()], _transposed)
# The patch convolution `[D, 3, p, p]`; here `[p·p·3, D]`, its rows ordered (row, column, channel).
PATCHES = Layout(_patch_to_theirs, lambda theirs, shape: theirs[0].transpose(2, 3, 1, 0).reshape(shape))
# Arrays that have leading axes of length one in the checkpoint: `[1, P, D]` and `[1, 1, D]`.
ONE_AXIS_MORE = Layout(lambda ours: [ours[None]], _reshaped)
TWO_AXES_MORE = Layout(lambda ours: [ours[None, None]], _reshaped)


@dataclasses.dataclass(frozen=True)
class Rule:
    """`layout` makes `target` of `sources`, once or (if the sources' names hold `{}`) for each block."""

    target: str
    sources: tuple[str, ...]
    layout: Layout = SAME

    @property
    def stacked(self) -> bool:
        """Whether the parameter's first axis is the number of the block."""
        return "{}" in self.sources[0]

    def source_names(self, shape: Shape) -> list[list[str]]:
        """The names of the tensors of a parameter of this shape, one list for each block."""
        blocks = range(shape[0]) if self.stacked else [0]
        return [[source.format(block) for source in self.sources] for block in blocks]

    def source_shapes(self, shape: Shape) -> list[Shape]:
        """The shapes of the tensors of one block."""
        of_block = jax.ShapeDtypeStruct(shape[1:] if self.stacked else shape, jnp.float32)
        return [tuple(part.shape) for part in jax.eval_shape(self.layout.to_theirs, of_block)]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A checkpoint's format, the fields of its model, and the rules for its tensors.

    `vision` and `text` are fields of `models.towers.VisionTower` and `TextTower`; a field that the files do not show is
    absent. `others` are further groups of fields of `config.model` (of a whole VLAB). `buffers` are endings of names of
    tensors that hold no parameter.
    """

    format: str
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    rules: tuple[Rule, ...]
    buffers: tuple[str, ...] = ()
    others: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def tower_sizes(tensors: Sizes, rules: Iterable[Rule], where: str) -> tuple[dict[str, int], dict[str, int]]:
    """The sizes of the vision and the text tower, from the tensors of their parameters.

    Args:
      where: the name of the checkpoint in messages.

    Raises:
      InputError: a tensor is missing or has too few dimensions, or the positions do not form a square.
    """
    by_target = {rule.target: rule for rule in rules}

    def size(target: str, axis: int) -> int:
        name = by_target[target].sources[0].format(0)
        shape = tensors.get(name)
        if shape is None:
            raise InputError(f"{where} lacks the tensor {name}")
        if not -len(shape) <= axis < len(shape):
            raise InputError(f"{where}: {name} is {list(shape)}; it has too few dimensions")
        return shape[axis]

    def shared(tower: str) -> dict[str, int]:
        block, projection = f"{tower}/transformer/blocks/mlp/input/kernel", f"{tower}/projection/kernel"
        before, after = map(re.escape, by_target[block].sources[0].split("{}"))
        numbers = [match[1] for match in map(re.compile(rf"{before}(\d+){after}").fullmatch, tensors) if match]
        return {
            "depth": max(map(int, numbers), default=-1) + 1,
            "mlp_width": size(block, 0),
            "embed_width": size(projection, 1 if by_target[projection].layout is SAME else 0),
        }

    patch_size, positions = size("vision/patch_embedding/kernel", -1), size("vision/position_embedding", -2) - 1
    side = math.isqrt(max(positions, 0))
    if side * side != positions:
        raise InputError(f"{where} has {positions} positions of patches, which do not form a square")
    vision = {"image_size": side * patch_size, "patch_size": patch_size}
    vision["width"] = size("vision/patch_embedding/kernel", 0)
    text = {"vocab_size": size("text/token_embedding", 0), "context_length": size("text/position_embedding", 0)}
    text["width"] = size("text/token_embedding", 1)
    return vision | shared("vision"), text | shared("text")


def norm(target: str, source: str) -> list[Rule]:
    """The rules of a layer normalisation."""
    return [Rule(f"{target}/norm/scale", (f"{source}.weight",)), Rule(f"{target}/norm/bias", (f"{source}.bias",))]


def linear(target: str, source: str, layout: Layout = LINEAR) -> list[Rule]:
    """The rules of a linear layer with bias."""
    return [Rule(f"{target}/kernel", (f"{source}.weight",), layout), Rule(f"{target}/bias", (f"{source}.bias",))]


def check(rules: Iterable[Rule], targets: Sizes, sources: Sizes, buffers: Sequence[str], where: str) -> None:
    """Checks rules against both sides, before any tensor is read.

    Args:
      targets: paths and shapes of this model's parameters.
      sources: names and shapes of the checkpoint's tensors.
      buffers: name endings of tensors that hold no parameter.
      where: the name of the checkpoint in messages.

    Raises:
      InputError: a tensor is missing, has another shape, or is not used; or a parameter is not filled.
    """
    missing, misshapen, used, filled = [], [], set(), set()
    for rule in rules:
        if rule.target not in targets:
            missing.append(f"a place for {rule.sources[0]}")
            continue
        filled.add(rule.target)
        shape = targets[rule.target]
        expected = rule.source_shapes(shape)
        for names in rule.source_names(shape):
            for name, wanted in zip(names, expected, strict=True):
                used.add(name)
                if name not in sources:
                    missing.append(name)
                elif sources[name] != wanted:
                    misshapen.append(f"{name} is {list(sources[name])} and should be {list(wanted)}")
    unused = [name for name in sources if name not in used and not name.endswith(tuple(buffers))]
    problems = {
        "missing": missing,
        "of another shape": misshapen,
        "not used": unused,
        "not filled": [target for target in targets if target not in filled],
    }
    found = []
    for what, names in problems.items():
        rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        found += [f"{what}: {', '.join(names[:_LISTED])}{rest}"] if names else []
    if found:
        raise InputError(f"{where} does not hold this model; " + "; ".join(found))


def fit_positions(positions: Float[np.ndarray, "P D"], count: int) -> Float[np.ndarray, "Q D"]:
    """Learned positions for `count` tokens, the class token's first and unchanged.

    Those of patches are resized as an image, bicubic and antialiased (OpenCLIP, `model.py:resize_pos_embed`).
    """
    old, new = math.isqrt(len(positions) - 1), math.isqrt(count - 1)
    grid = positions[1:].reshape(old, old, -1)
    shape, exact = (new, new, grid.shape[-1]), jax.lax.Precision.HIGHEST
    resized = jax.image.resize(grid, shape, "cubic", antialias=True, precision=exact)
    return np.concatenate([positions[:1], np.asarray(resized).reshape(new * new, -1)])


def fit_frames(positions: Float[np.ndarray, "*blocks P D"], count: int) -> Float[np.ndarray, "*blocks Q D"]:
    """Learned positions for `count` frames, as the model itself interpolates them for a clip of so many."""
    blocks = positions.reshape(-1, *positions.shape[-2:])
    fitted = jax.vmap(lambda block: interpolate_positions(block, count))(blocks)
    return np.asarray(fitted).reshape(*positions.shape[:-2], count, -1)
