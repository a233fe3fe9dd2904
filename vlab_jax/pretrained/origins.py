"""The table that says which parameters came from where."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from vlab_jax.pretrained.load import Origin


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
