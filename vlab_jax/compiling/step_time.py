"""How long a TPU would take over a compiled program: an estimate, summed from its compiler's own.

The compiler's text of a program has `estimated_cycles` for most instructions; loops count as often as they run, and of
a condition's branches the longer one. What it gives no estimate of is charged by a rule, never as nothing:

- a kernel written by hand: `KERNEL` times its `cost_estimate`'s FLOPs at the chip's peak, or its operands and results
  at the memory's rate where that is longer (or where it has no `cost_estimate`: then it is a lower bound);
- a collective: what the device sends for it, in one ring that sends both ways; one that is started and awaited later
  (`-start`) counts as hidden behind what is computed meanwhile;
- anything else (sorts, scatters): its operands and results at the memory's rate; copies that run beside: nothing.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence

from vlab_jax.compiling import hlo

# A kernel's time over that of its FLOPs at peak. Kernels of attention for v5e whose final schedules were simulated took
# 3.9 times it forward and 3.7 backward: a head of 64 fills half of a matrix unit, and the softmax takes as long again.
KERNEL = 4.0
KERNEL_TARGET = "tpu_custom_call"
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_FLOPS = re.compile(r'"flops":"?(\d+)')
_NAME = re.compile(r'op_name="([^"]*)"')

PARTS = (
    ("decoder", ("VLAB.decode", "decoder")),
    ("image stream", ("_image_stream", "image_encoder")),
    ("video stream", ("_video_stream", "encode_frames", "vision")),
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


@dataclasses.dataclass(frozen=True)
class Rates:
    """Of a chip, a second: cycles, FLOPs at peak, bytes of its memory, and bytes that it sends in a ring."""

    clock: float
    peak: float
    memory: float
    ring: float


@dataclasses.dataclass(frozen=True)
class ModelPlace:
    """Where time goes: a part of the model, a layer of it, and whether it is computed `forward`, `recomputed` or
    `backward`."""

    part: str
    layer: str
    way: str


@dataclasses.dataclass
class Time:
    """Seconds, by where they go, and by who says so: the `compiler`, or a rule (`kernels`, `collectives`, `bytes`).

    Attributes:
      unsaid: kernels without a `cost_estimate`, of which only the bytes are charged.
    """

    places: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    sources: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unsaid: int = 0

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.sources.values(), start=0.0)

    def add(self, other: "Time", times: int) -> None:
        """Adds what another computation takes, so many times."""
        for mine, theirs in ((self.places, other.places), (self.sources, other.sources)):
            mine.update({name: times * value for name, value in theirs.items()})
        self.unsaid += other.unsaid


def estimate(text: str, rates: Rates) -> Time:
    """The time of one run of a compiled program, from its text (`compiled.as_text()`).

    Raises:
      ValueError: the text is not of a compiled program.
    """
    computations, entry = hlo.computations_of(text)
    done: dict[str, Time] = {}

    def of(name: str) -> Time:
        if name not in done:
            done[name] = _computation(computations[name])
        return done[name]

    def _computation(parts: Sequence[hlo.Instruction]) -> Time:
        total = Time()
        for part in parts:
            if part.operation == "while":
                total.add(of(hlo.body(part)), hlo.trips(part, computations))
            elif part.operation == "conditional":
                total.add(max(map(of, part.called), key=lambda time: time.seconds), 1)
            elif part.operation == "call":
                for name in part.called:
                    total.add(of(name), 1)
            else:
                source, seconds = _charge(part, rates)
                if seconds:
                    total.sources[source] += seconds
                    total.places[place(part)] += seconds
                total.unsaid += source == "kernels" and not _FLOPS.search(part.rest)
        return total

    return of(entry)


def _charge(part: hlo.Instruction, rates: Rates) -> tuple[str, float]:
    """Who says how long an instruction takes, and the seconds."""
    cycles = _CYCLES.search(part.rest)
    if cycles:
        return "compiler", int(cycles[1]) / rates.clock
    if part.operation in hlo.COLLECTIVES:
        return "collectives", hlo.sent(part) / rates.ring
    if part.operation in _FREE or part.operation.endswith(("-start", "-done", "-update")):
        return "bytes", 0.0
    moved = part.bytes / rates.memory
    if part.operation != "custom-call":
        return "bytes", moved
    if KERNEL_TARGET not in part.rest:  # the compiler's own marks: a buffer is set aside, indices are in bounds
        return "bytes", 0.0
    flops = _FLOPS.search(part.rest)
    return "kernels", max(moved, KERNEL * int(flops[1]) / rates.peak if flops else 0.0)


def place(part: hlo.Instruction) -> ModelPlace:
    """Where an instruction belongs, by the name that JAX gave it."""
    named = _NAME.search(part.rest)
    name = named[1] if named else ""
    if part.operation in hlo.COLLECTIVES:
        return ModelPlace("collectives", part.operation, "")
    if "jit(" not in name:
        return ModelPlace("copies", "", "")  # of the compiler, in whose names there is no function
    way = "recomputed" if "rematted_computation" in name else "backward" if "transpose(" in name else "forward"
    model = _first(PARTS, name)
    if not model:
        return ModelPlace("losses", "", way) if "jvp(" in name else ModelPlace("optimiser", "", "")
    return ModelPlace(model, _first(LAYERS, name) or "rest", way)


def _first(known: tuple[tuple[str, tuple[str, ...]], ...], name: str) -> str:
    return next((title for title, words in known if any(word in name for word in words)), "")
