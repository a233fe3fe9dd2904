"""Estimates how long a TPU takes for a compiled program, as the sum of its compiler's own estimates.

The text of a program has `estimated_cycles` for most instructions. Loops count as often as they run, and of a
conditional's branches the longest counts. An instruction without an estimate is charged by a rule:

- a kernel written by hand: `KERNEL_FACTOR` times the FLOPs of its `cost_estimate` at the chip's peak, or its operands
  and results at the memory's rate where that is longer (or where it has no `cost_estimate`: then it is a lower bound);
- a collective: the bytes that the device sends for it, in one ring in both directions; an asynchronous one (`-start`)
  counts as hidden behind computation;
- anything else (sorts, scatters): its operands and results at the memory's rate; asynchronous copies cost nothing.
"""

import collections
import dataclasses
import re
from typing import NamedTuple

from vlab_jax.compiling import hlo

# The simulated final schedules of attention kernels for v5e took 3.9 times the time of their FLOPs at peak forward, and
# 3.7 times backward: a head of 64 fills half of a matrix unit, and the softmax takes as long again.
KERNEL_FACTOR = 4.0
KERNEL_TARGET = "tpu_custom_call"
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_FLOPS = re.compile(r'"flops":"?(\d+)')
_NAME = re.compile(r'op_name="([^"]*)"')

# Parts of the model, and layers in them, by words in the names that JAX gives to instructions; the first match counts.
PARTS = (
    ("decoder", ("VLAB.decode", "decoder")),
    ("image stream", ("_image_stream", "image_encoder")),
    ("video stream", ("_video_stream", "vision")),
    ("text tower", ("encode_text",)),
    ("video stream", ("encode_visual",)),
)
LAYERS = (
    ("adapter", ("VideoAdapter",)),
    ("cross-attention", ("CrossAttention",)),
    ("attention", ("/attention/",)),
    ("MLP", ("/mlp/",)),
    ("norm", ("/ln_1/", "/ln_2/")),
)


class Rates(NamedTuple):
    """A chip's rates per second: cycles, FLOPs at peak, bytes of memory, and bytes sent in a ring."""

    clock: float
    peak: float
    memory: float
    ring: float


class ModelPlace(NamedTuple):
    """A part of the model, a layer of it, and whether it is computed `forward`, `recomputed` or `backward`."""

    part: str
    layer: str
    way: str


@dataclasses.dataclass
class TimeEstimate:
    """Estimated seconds by `ModelPlace`, and by their source: the `compiler`, or a rule (`kernels`, `collectives`,
    `bytes`); and the number of kernels without a `cost_estimate`, of which only the bytes are charged."""

    places: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    sources: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    kernels_without_cost: int = 0

    @property
    def seconds(self) -> float:
        """The total."""
        return sum(self.sources.values(), start=0.0)

    def add(self, other: "TimeEstimate", times: int = 1) -> None:
        """Adds the time of another computation, `times` over."""
        for mine, theirs in ((self.places, other.places), (self.sources, other.sources)):
            mine.update({name: times * seconds for name, seconds in theirs.items()})
        self.kernels_without_cost += other.kernels_without_cost


def estimate_time(text: str, rates: Rates) -> TimeEstimate:
    """The time of one run of a compiled program, from its text (`compiled.as_text()`); raises as `hlo.add_up`."""

    def count(total: TimeEstimate, instruction: hlo.Instruction) -> bool:
        if instruction.operation == "call":
            return False
        source, seconds = _charge(instruction, rates)
        if seconds:
            total.sources[source] += seconds
            total.places[model_place(instruction)] += seconds
        total.kernels_without_cost += source == "kernels" and not _FLOPS.search(instruction.rest)
        return True

    return hlo.add_up(text, TimeEstimate, count, lambda total: total.seconds)


def _charge(instruction: hlo.Instruction, rates: Rates) -> tuple[str, float]:
    """The source of an instruction's time, and the seconds."""
    if cycles := _CYCLES.search(instruction.rest):
        return "compiler", int(cycles[1]) / rates.clock
    if instruction.operation in hlo.COLLECTIVES:
        return "collectives", hlo.sent_bytes(instruction) / rates.ring
    if instruction.operation in _FREE or instruction.operation.endswith(("-start", "-done", "-update")):
        return "bytes", 0.0
    memory_seconds = instruction.bytes / rates.memory
    if instruction.operation != "custom-call":
        return "bytes", memory_seconds
    if KERNEL_TARGET not in instruction.rest:  # the compiler's own annotations, such as AllocateBuffer
        return "bytes", 0.0
    flops = _FLOPS.search(instruction.rest)
    return "kernels", max(memory_seconds, KERNEL_FACTOR * int(flops[1]) / rates.peak if flops else 0.0)


def model_place(instruction: hlo.Instruction) -> ModelPlace:
    """The place of an instruction in the model, by the name that JAX gave it."""
    match = _NAME.search(instruction.rest)
    name = match[1] if match else ""
    if instruction.operation in hlo.COLLECTIVES:
        return ModelPlace("collectives", instruction.operation, "")
    if "jit(" not in name:
        return ModelPlace("copies", "", "")  # of the compiler's own, whose names contain no function
    way = "recomputed" if "rematted_computation" in name else "backward" if "transpose(" in name else "forward"
    part = _first_match(PARTS, name)
    if not part:
        return ModelPlace("losses", "", way) if "jvp(" in name else ModelPlace("optimiser", "", "")
    return ModelPlace(part, _first_match(LAYERS, name) or "rest", way)


def _first_match(table: tuple[tuple[str, tuple[str, ...]], ...], name: str) -> str:
    return next((title for title, words in table if any(word in name for word in words)), "")
