"""Parameter groups, the learning rate schedule, and the optimiser.

Groups are an ordered list of (pattern, learning rate). A parameter belongs to the first group whose pattern is found in
its path, and every parameter must belong to one. The update of a frozen group is set to zero, not its learning rate:
with a learning rate of zero, weight decay would still change it.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

from vlab_jax.errors import InputError
from vlab_jax.models.vlab import OPTIONAL_PARTS
from vlab_jax.runtime.sharding import path_name

# Weights that decay; biases, norms, positions and the temperature do not.
DECAYED = re.compile(r"(kernel|token_embedding)$")


class Group(NamedTuple):
    """The pattern that a parameter's path must contain, and the peak learning rate; None: frozen."""

    pattern: str
    learning_rate: float | None


def parse_groups(pairs: Sequence[Any]) -> tuple[Group, ...]:
    """Reads a config's pairs of a pattern and a learning rate or 'frozen'; others raise `InputError`."""
    groups = []
    for pair in pairs:
        try:
            pattern, rate = pair
            re.compile(pattern)
            groups.append(Group(pattern, None if rate == "frozen" else float(rate)))
        except (TypeError, ValueError, re.error) as error:
            raise InputError(
                f"parameter group {pair!r} must be (pattern, learning rate or 'frozen'): {error}"
            ) from error
    return tuple(groups)


def assign_groups(parameters: Any, groups: Sequence[Group]) -> Any:
    """A tree like `parameters` with the number of each one's group. Raises `InputError` if no group matches a
    parameter, or a frozen pattern would match none even if the model had all of its parts."""
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(parameters)]
    possible = [*paths, *(f"{part}/" for part in OPTIONAL_PARTS)]
    for group in groups:
        if group.learning_rate is None and not any(re.search(group.pattern, path) for path in possible):
            raise InputError(f"the frozen pattern {group.pattern!r} matches no parameter")

    def number(path, _):
        name = path_name(path)
        for index, group in enumerate(groups):
            if re.search(group.pattern, name):
                return index
        raise InputError(f"no parameter group matches {name!r}; add a last group ('.*', learning rate or 'frozen')")

    return jax.tree_util.tree_map_with_path(number, parameters)


def describe_groups(parameters: Any, groups: Sequence[Group]) -> str:
    """A line for each group: its number of parameters, learning rate and pattern."""
    sizes = [0] * len(groups)
    for leaf, number in zip(*map(jax.tree.leaves, (parameters, assign_groups(parameters, groups))), strict=True):
        sizes[number] += math.prod(leaf.shape)
    rates = ["frozen" if group.learning_rate is None else f"lr {group.learning_rate:g}" for group in groups]
    rows = zip(sizes, rates, groups, strict=True)
    return "\n".join(f"{size:>13,} parameters  {rate:<10}  {group.pattern}" for size, rate, group in rows)


def trainable_mask(parameters: Any, groups: Sequence[Group]) -> Any:
    """A tree of bools like `parameters`: whether each one is trainable."""
    return jax.tree.map(lambda number: groups[number].learning_rate is not None, assign_groups(parameters, groups))


def warmup_cosine(steps: int, warmup_steps: int, end_share: float = 0.0) -> optax.Schedule:
    """A factor of the peak learning rate: linear warmup from 0 to 1, then a cosine down to `end_share`."""
    warmup_steps = min(warmup_steps, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps, max(steps, 1), end_share)


def make_optimizer(
    groups: Sequence[Group],
    labels: Any,
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    clip_norm: float,
    b1: float = 0.9,
    b2: float = 0.98,
) -> optax.GradientTransformation:
    """AdamW for each trainable group, after clipping the norm of all gradients together, if `clip_norm` is not 0.

    It takes trees like `labels`, which `assign_groups` returns, also with None in place of frozen leaves. `schedule`
    gives the factor of every group's learning rate at a step.
    """

    def decayed(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: DECAYED.search(path_name(path)) is not None, tree)

    def adamw(rate: float) -> optax.GradientTransformation:
        return optax.adamw(
            lambda step: rate * schedule(step), b1=b1, b2=b2, eps=1e-6, weight_decay=weight_decay, mask=decayed
        )

    rules = {
        index: optax.set_to_zero() if group.learning_rate is None else adamw(group.learning_rate)
        for index, group in enumerate(groups)
    }
    numbers = {path_name(path): number for path, number in jax.tree_util.tree_leaves_with_path(labels)}

    def labels_of(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: numbers[path_name(path)], tree)

    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    return optax.chain(clip, optax.multi_transform(rules, labels_of))
