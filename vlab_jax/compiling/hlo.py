"""Reads from the text of a compiled program the FLOPs of its matrix products and the bytes that its collectives send.

XLA's own count takes the body of a loop once. Here every computation counts as often as it runs: from XLA's
`known_trip_count` of the loop, or from the constant in the loop's condition. Of a conditional's branches, the most
expensive one counts.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"[a-z]+(\d*)\w*\[([\d,]*)\]")  # bits of the type (`pred` has none, and takes a byte), and sides
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass
class ProgramCounts:
    """The work of one device in one run of a program or computation: the FLOPs of matrix products; and by kind of
    collective, their number, the bytes of the full arrays that they reduce or gather (`payload`), and the bytes that
    the device sends for them in a ring."""

    flops: float = 0.0
    count: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    payload: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    sent: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "ProgramCounts", times: int = 1) -> None:
        """Adds the counts of another computation, `times` over."""
        self.flops += times * other.flops
        for name in ("count", "payload", "sent"):
            getattr(self, name).update({kind: times * value for kind, value in getattr(other, name).items()})

    @property
    def total_sent(self) -> float:
        """Bytes that the device sends for all collectives."""
        return sum(self.sent.values(), start=0.0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: the result's shape, the operation, the rest of the line, and the operands' shapes."""

    shape: str
    operation: str
    rest: str
    operands: tuple[str, ...]

    @property
    def called(self) -> list[str]:
        """The computations that it names: a loop's body and condition, a fusion's computation, branches."""
        branches = [name.strip().lstrip("%") for each in _BRANCHES.findall(self.rest) for name in each.split(",")]
        return _CALLED.findall(self.rest) + branches

    @property
    def bytes(self) -> int:
        """Bytes of its operands and its result."""
        return bytes_of(self.shape) + sum(map(bytes_of, self.operands))


Computations = Mapping[str, Sequence[Instruction]]


def count_program(text: str) -> ProgramCounts:
    """Counts the work of a compiled program, from its text (`compiled.as_text()`); raises as `add_up`."""

    def count(total: ProgramCounts, instruction: Instruction) -> bool:
        kind = instruction.operation.removesuffix("-start")
        if kind in COLLECTIVES:
            total.count[kind] += 1
            total.payload[kind] += payload_bytes(instruction)
            total.sent[kind] += sent_bytes(instruction)
        elif kind == "dot":
            total.flops += _dot_flops(instruction)
        return kind in (*COLLECTIVES, "dot")

    return add_up(text, ProgramCounts, count, lambda total: (total.flops, total.total_sent))


def add_up(text: str, make: Callable[[], Any], count: Callable[[Any, Instruction], bool], key: Callable) -> Any:
    """Adds up the instructions of a compiled program, each as often as it runs; raises `ValueError` for another text.

    Args:
      make: makes a total, which has a method `add(other, times)`.
      count: adds an instruction to a total, and returns whether that is all; otherwise what it calls is added.
      key: of a conditional's branches, the one whose total has the largest key counts.
    """
    computations, entry = _parse_program(text)

    @functools.cache
    def total_of(name: str) -> Any:
        total = make()
        for each in computations[name]:
            if each.operation == "while":
                total.add(total_of(re.search(r"body=%?([\w.\-]+)", each.rest)[1]), _trip_count(each, computations))
            elif each.operation == "conditional":
                total.add(max(map(total_of, each.called), key=key))
            elif not count(total, each):
                for called in each.called:
                    total.add(total_of(called))
        return total

    return total_of(entry)


def _parse_program(text: str) -> tuple[Computations, str]:
    """The instructions of each computation by its name, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = {}
    shapes: dict[str, str] = {}  # of the results in a computation
    entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            instructions = computations[head[2]] = []
            shapes.clear()
            entry = head[2] if head[1] else entry
        elif computations and (match := _INSTRUCTION.match(line)):
            name, shape, operation, rest = match.groups()
            shapes[name] = shape
            names = re.findall(r"%([\w.\-]+)", rest.split("),")[0])
            operands = tuple(shapes[each] for each in names if each in shapes)
            instructions.append(Instruction(shape, operation, rest, operands))
    if not entry:
        raise ValueError("the text is not a compiled program: it has no ENTRY computation")
    return computations, entry


def _trip_count(loop: Instruction, computations: Computations) -> int:
    """How often a loop's body runs: XLA's own count, or else the largest constant in the loop's condition, or 1. A loop
    that may end earlier (text generation) counts as if it did not."""
    if known := _TRIP_COUNT.search(loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]
    instructions = [each for name in _reachable(condition, computations) for each in computations[name]]
    constants = [re.match(r"(\d+)\)", each.rest) for each in instructions if each.operation == "constant"]
    return max([1, *(int(match[1]) for match in constants if match)])


def _reachable(name: str, computations: Computations) -> list[str]:
    called = [each for instruction in computations[name] for each in instruction.called]
    return [name, *(further for each in called for further in _reachable(each, computations))]


def payload_bytes(collective: Instruction) -> int:
    """Bytes of the full array of a collective, before it is reduced or after it is gathered."""
    operands, result = sum(map(bytes_of, collective.operands)), bytes_of(collective.shape)
    if collective.operation.endswith("-start"):  # its result contains its operands
        return max(operands, result - operands) if collective.operation == "all-gather-start" else operands
    return max(operands, result)


def sent_bytes(collective: Instruction) -> float:
    """Bytes that a device sends for a collective, in a ring."""
    kind, devices = collective.operation.removesuffix("-start"), _group_size(collective.rest)
    share = {"all-reduce": 2 * (devices - 1) / devices, "collective-permute": 1.0}.get(kind, (devices - 1) / devices)
    return payload_bytes(collective) * share


def _group_size(rest: str) -> int:
    """The number of devices in a group of a collective: XLA lists them, counts them, or names the mesh's axes."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(counted[1])
    named = re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", rest)
    if named is None:
        return 1
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    # A part of an axis is written as 'axis':(devices before it)its size.
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)


def bytes_of(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple."""
    return sum(max(int(bits or 8) // 8, 1) * math.prod(_sides(sides)) for bits, sides in _SHAPE.findall(shape))


def _dot_flops(dot: Instruction) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.rest)
    left = _sides(_SHAPE.search(dot.operands[0])[2])
    inner = math.prod(left[axis] for axis in _sides(contracted[1] if contracted else ""))
    return 2.0 * math.prod(_sides(_SHAPE.search(dot.shape)[2])) * inner


def _sides(listed: str) -> list[int]:
    return [int(side) for side in listed.split(",") if side]
