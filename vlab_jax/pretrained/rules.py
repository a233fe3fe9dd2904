"""How a checkpoint's tensors become this package's parameters, and back: one rule for each parameter.

A rule names a parameter by its path (`text/transformer/blocks/mlp/input/kernel`) and the tensors that make it up. A
`{}` in a tensor's name stands for the number of a block: blocks are stacked here, along the first axis.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from vlab_jax.errors import InputError
from vlab_jax.pretrained.layouts import LINEAR, SAME, Layout

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
