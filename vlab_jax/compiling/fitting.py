"""Whether a program fits a machine that is not here, and the largest batch that fits.

A TPU's compiler plans the memory and refuses a program that does not fit. A GPU's compiler accepts any program: there,
arguments, temporaries and results (less the results that reuse the memory of arguments) must fit the share of the
device's memory that JAX allocates (`topologies.FRACTION`).
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax

from vlab_jax.compiling.topologies import Topology

MAX_COMPILES = 7  # of a search
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
_OUT_OF_MEMORY = (
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
    re.compile(rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)


@dataclasses.dataclass(frozen=True)
class CompileResult:
    """The memory that a compiled program needs and can have, in bytes per device.

    `temporaries` is the part of `needed` that is not for arguments; `text` is the program, empty where the compiler
    refused it.
    """

    fits: bool
    needed: float
    available: float
    temporaries: float
    text: str = ""


def compile_program(lowered: Any, topology: Topology, arguments: int) -> CompileResult:
    """Compiles a lowered program, whose arguments have so many bytes per device; raises the compiler's error, unless it
    is lack of memory."""
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed, available = parse_out_of_memory(str(error))
        if not needed:
            raise
        return CompileResult(False, needed, available, max(needed - arguments, 0.0))
    memory = program.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed = float(memory.argument_size_in_bytes + memory.temp_size_in_bytes + results)
    fits = topology.platform == "tpu" or needed <= topology.memory
    if topology.platform == "tpu":  # its compiler reuses the memory of arrays that are no longer needed
        needed = float(memory.peak_memory_in_bytes or needed)
    temporaries = max(needed - memory.argument_size_in_bytes, 0.0)
    return CompileResult(fits, needed, topology.memory, temporaries, program.as_text())


def parse_out_of_memory(message: str) -> tuple[float, float]:
    """The bytes needed and available by an error message of a TPU's compiler (what that calls temporaries includes the
    arguments); zeros: it is another error."""
    for pattern in _OUT_OF_MEMORY:
        if match := pattern.search(message):
            needed, unit, available, available_unit = match.groups()
            return float(needed) * _UNITS[unit], float(available) * _UNITS[available_unit]
    return 0.0, 0.0


def largest_batch(attempt: Callable[[int], CompileResult], start: int, unit: int, fixed: int) -> int:
    """The largest multiple of `unit` that fits, to a sixteenth, tried from `start` on; 0: none fits.

    Memory grows almost linearly with the batch, except for the `fixed` bytes per device that do not depend on it. So
    each size to try is extrapolated from the last compile.
    """
    low, high, size = 0, 0, max(start // unit, 1)
    for _ in range(MAX_COMPILES):
        result = attempt(size * unit)
        low, high = (size, high) if result.fits else (low, size)
        if high and high - low <= max(1, low // 16):
            break
        per_unit = max(result.needed - fixed, 1.0) / size
        size = max(int((result.available - fixed) / per_unit), low + max(1, low // 16))
        if high and not low < size < high:
            size = (low + high) // 2
    return low * unit
