"""Whether a program fits a machine that is not here, and the largest batch that does.

A TPU's compiler lays out its memory and refuses what does not fit. A GPU's compiles anything; there, what it is given,
its temporaries and its results (less those that take the place of what is given) must not be more than the share of the
device's memory that JAX takes (`topologies.FRACTION`).
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax

from vlab_jax.compiling.topologies import Topology

ATTEMPTS = 7  # compiles of a search
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")
_TOGETHER = re.compile(rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler said of a program.

    Attributes:
      fits: whether it can run.
      needed, available: bytes a device.
      temporaries: bytes of `needed` that are not of what it is given; of a program that was refused, what is left.
      text: the compiled program; empty: it was refused.
    """

    fits: bool
    needed: float
    available: float
    temporaries: float
    text: str = ""


def compiled(lowered: Any, topology: Topology, held: int) -> Compiled:
    """Compiles a lowered program.

    Args:
      held: bytes a device of what it is given.

    Raises:
      JaxRuntimeError: the compiler fails for another reason than memory.
    """
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed, available = refused(str(error))
        if not needed:
            raise
        return Compiled(False, needed, available, max(needed - held, 0.0))
    memory = program.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed = float(memory.argument_size_in_bytes + memory.temp_size_in_bytes + results)
    fits = topology.platform == "tpu" or needed <= topology.memory
    if topology.platform == "tpu":  # the compiler lets arrays take the place of others that are over
        needed = float(memory.peak_memory_in_bytes or needed)
    temporaries = max(needed - memory.argument_size_in_bytes, 0.0)
    return Compiled(fits, needed, topology.memory, temporaries, program.as_text())


def refused(message: str) -> tuple[float, float]:
    """The bytes that a TPU's compiler would need, and those that there are; zeros where it complains of something else.

    What it calls temporaries there has in it what the program is given (6 GiB of it and 12 GiB besides are 18).
    """
    found = _USED.search(message) or _TOGETHER.search(message)
    return (_bytes(*found.groups()[:2]), _bytes(*found.groups()[2:])) if found else (0.0, 0.0)


def _bytes(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit]


def largest(attempt: Callable[[int], Any], start: int, unit: int, held: Callable[[Any], float]) -> int:
    """The largest multiple of `unit` that fits, to a sixteenth of it; 0 where none does.

    Each attempt is a compile, so the next size is guessed from what the last one needed: memory grows with the batch
    about as a straight line.

    Args:
      attempt: compiles a batch of this size; returns something with `fits`, `needed` and `available`, as `Compiled`.
      start: the first size, a multiple of `unit`.
      held: of what that returns, the bytes a device that do not grow with the batch.
    """
    low, high = 0, 0
    size = max(start // unit, 1)
    for _ in range(ATTEMPTS):
        found = attempt(size * unit)
        if found.fits:
            low = size
        else:
            high = size
        if high and high - low <= max(1, low // 16):
            break
        fixed = held(found)
        each = max(found.needed - fixed, 1.0) / size
        size = max(int((found.available - fixed) / each), low + max(1, low // 16))
        if high and not low < size < high:
            size = (low + high) // 2
    return low * unit
