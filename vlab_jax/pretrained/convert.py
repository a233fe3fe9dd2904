"""How a checkpoint's tensors become this package's parameters, and back: one rule for each parameter.

A rule names a parameter by its path (`text/transformer/blocks/mlp/input/kernel`) and the tensors that make it up. A
`{}` in a tensor's name stands for the number of a block: blocks are stacked here, along the first axis.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vlab_jax.errors import InputError
from vlab_jax.models.layers import interpolate_positions

# FOLDED vlab_jax/pretrained/convert.py: Learned positions of patches and of frames, made to fit another
# resolution and another number of frames.


def fit_positions(positions: Float[np.ndarray, "P D"], count: int) -> Float[np.ndarray, "Q D"]:
    """Positions for `count` tokens, the class token's first and unchanged.

    Those of the patches are resized as an image, bicubic and antialiased (OpenCLIP, `model.py:resize_pos_embed`).
    """
    if len(positions) == count:
        return positions
    old, new = math.isqrt(len(positions) - 1), math.isqrt(count - 1)
    grid = positions[1:].reshape(old, old, -1)
    resized = jax.image.resize(
        grid, (new, new, grid.shape[-1]), "cubic", antialias=True, precision=jax.lax.Precision.HIGHEST
    )
    return np.concatenate([positions[:1], np.asarray(resized).reshape(new * new, -1)])


def fit_frames(positions: Float[np.ndarray, "*blocks P D"], count: int) -> Float[np.ndarray, "*blocks Q D"]:
    """Positions for `count` frames: for as many, the model makes the same of them itself."""
    blocks = positions.reshape(-1, *positions.shape[-2:])
    fitted = jax.vmap(lambda block: interpolate_positions(block, count))(blocks)
    return np.asarray(fitted).reshape(*positions.shape[:-2], count, -1)


# FOLDED vlab_jax/pretrained/convert.py: How a parameter lies in a PyTorch checkpoint and how it lies here: one pure
# function for each way.  Dimensions: `D` width, `H` heads, `d` head width (`H·d = D`), `p` patch side. PyTorch's
# linear layers are `[out, in]`, Flax's are `[in, out]`; attention's projections carry their heads as axes here.
# The functions use nothing but methods that NumPy's arrays and JAX's tracers share, so that shapes can be had from
# `jax.eval_shape`.


class Layout(NamedTuple):
    """`to_theirs(ours)` gives the source tensors of one parameter; `to_ours(theirs, shape)` puts them together."""

    to_theirs: Callable[[Any], list[Any]]
    to_ours: Callable[[Sequence[np.ndarray], tuple[int, ...]], np.ndarray]

    def source_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes of the source tensors of a parameter of the given shape."""
        parts = jax.eval_shape(self.to_theirs, jax.ShapeDtypeStruct(shape, jnp.float32))
        return [tuple(part.shape) for part in parts]


def _flat_rows(kernel: Any) -> Any:
    """`[in, …]` to PyTorch's `[out, in]`."""
    return kernel.reshape(kernel.shape[0], -1).transpose()


def _patch_to_theirs(kernel: Any) -> list[Any]:
    side = math.isqrt(kernel.shape[0] // 3)
    return [kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)]


# The same array.
SAME = Layout(lambda ours: [ours], lambda theirs, shape: theirs[0])
# A linear layer: `[in, out]` here.
LINEAR = Layout(lambda ours: [_flat_rows(ours)], lambda theirs, shape: theirs[0].T)
# A query, key and value projection in one tensor `[3·D, D]`; here `[D, 3, H, d]`. Its bias: `[3·D]`; here `[3, H, d]`.
FUSED_HEADS = Layout(lambda ours: [_flat_rows(ours)], lambda theirs, shape: theirs[0].T.reshape(shape))
FUSED_BIAS = Layout(lambda ours: [ours.reshape(-1)], lambda theirs, shape: theirs[0].reshape(shape))
# The same in one tensor for each of its parts.
SEPARATE_HEADS = Layout(
    lambda ours: [_flat_rows(ours[:, part]) for part in range(ours.shape[1])],
    lambda theirs, shape: np.stack([part.T.reshape(shape[0], *shape[2:]) for part in theirs], axis=1),
)
SEPARATE_BIASES = Layout(
    lambda ours: [ours[part].reshape(-1) for part in range(ours.shape[0])],
    lambda theirs, shape: np.stack([part.reshape(shape[1:]) for part in theirs]),
)
# Attention's output projection `[D, D]`; here `[H, d, D]`.
OUTPUT = Layout(
    lambda ours: [ours.reshape(-1, ours.shape[-1]).transpose()],
    lambda theirs, shape: theirs[0].T.reshape(shape),
)
# The patch convolution `[D, 3, p, p]`; here `[p·p·3, D]`, its rows ordered (row, column, channel).
PATCHES = Layout(
    _patch_to_theirs,
    lambda theirs, shape: theirs[0].transpose(2, 3, 1, 0).reshape(shape),
)
# An array with leading axes of length one: `[1, P, D]` and `[1, 1, D]`.
ONE_AXIS_MORE = Layout(lambda ours: [ours[None]], lambda theirs, shape: theirs[0].reshape(shape))
TWO_AXES_MORE = Layout(lambda ours: [ours[None, None]], lambda theirs, shape: theirs[0].reshape(shape))


Shape = tuple[int, ...]
NAMED = 5  # how many names a message lists


@dataclasses.dataclass(frozen=True)
class Rule:
    """`target` is made of `sources` by `layout`, once or (where the sources' names hold `{}`) for each block."""

    target: str
    sources: tuple[str, ...]
    layout: Layout = SAME

    @property
    def stacked(self) -> bool:
        """Whether the parameter's first axis is the number of the block."""
        return "{}" in self.sources[0]

    def source_names(self, shape: Shape) -> list[list[str]]:
        """The names of the tensors, one list for each block, of a parameter of the given shape."""
        blocks = range(shape[0]) if self.stacked else [0]
        return [[source.format(block) for source in self.sources] for block in blocks]

    def source_shapes(self, shape: Shape) -> list[Shape]:
        """The shapes of the tensors of one block."""
        return self.layout.source_shapes(shape[1:] if self.stacked else shape)


def norm(target: str, source: str) -> list[Rule]:
    """The rules of a layer normalisation."""
    return [Rule(f"{target}/norm/scale", (f"{source}.weight",)), Rule(f"{target}/norm/bias", (f"{source}.bias",))]


def linear(target: str, source: str, layout: Layout = LINEAR) -> list[Rule]:
    """The rules of a linear layer with bias."""
    return [Rule(f"{target}/kernel", (f"{source}.weight",), layout), Rule(f"{target}/bias", (f"{source}.bias",))]


def check(
    rules: Iterable[Rule],
    targets: Mapping[str, Shape],
    sources: Mapping[str, Shape],
    buffers: Sequence[str],
    where: str,
) -> None:
    """Compares rules with what there is on both sides, before any tensor is read.

    Args:
      targets: paths and shapes of this model's parameters.
      sources: names and shapes of the checkpoint's tensors.
      buffers: name endings of tensors that hold no parameter and are left out.
      where: what the message calls the checkpoint.

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
    found = [f"{what}: {_some(names)}" for what, names in problems.items() if names]
    if found:
        raise InputError(f"{where} does not hold this model; " + "; ".join(found))


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest
