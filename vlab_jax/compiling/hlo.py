"""What a compiled program does, read from XLA's text of it: FLOPs of matrix products, and what collectives send.

XLA's own count takes the body of a loop once. Here every computation counts as often as it runs: XLA says of a loop how
often (`known_trip_count`), or its condition compares with a constant; and of a condition's branches the dearer one
counts.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
BYTES |= {"f64": 8, "s64": 8, "u64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass
class ProgramCounts:
    """What one device does in one run of a program, or of a computation in it.

    Attributes:
      flops: of matrix products.
      count: collectives, by kind.
      payload: bytes of the full arrays that they reduce or gather, by kind.
      sent: bytes that the device sends for them in a ring, by kind.
    """

    flops: float = 0.0
    count: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    payload: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    sent: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "ProgramCounts", times: int = 1) -> None:
        """Adds what another computation does, `times` over."""
        self.flops += times * other.flops
        for mine, theirs in zip(self._counters(), other._counters(), strict=True):
            mine.update({kind: times * value for kind, value in theirs.items()})

    def _counters(self) -> tuple[collections.Counter, ...]:
        return self.count, self.payload, self.sent

    @property
    def total_sent(self) -> float:
        """Bytes that a device sends, of all kinds."""
        return sum(self.sent.values(), start=0.0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: what it returns, its operation, what follows the name of that, and its operands' shapes."""

    shape: str
    operation: str
    rest: str
    operands: tuple[str, ...]

    @property
    def called(self) -> list[str]:
        """The computations that it names: a loop's body and condition, what a fusion computes, branches."""
        branches = [name.strip().lstrip("%") for each in _BRANCHES.findall(self.rest) for name in each.split(",")]
        return _CALLED.findall(self.rest) + branches

    @property
    def bytes(self) -> int:
        """Of its operands and of what it returns."""
        return bytes_of(self.shape) + sum(map(bytes_of, self.operands))


Computations = Mapping[str, Sequence[Instruction]]


def work(text: str) -> ProgramCounts:
    """Counts what a compiled program does, from its text (`compiled.as_text()`)."""
    computations, entry = computations_of(text)
    done: dict[str, ProgramCounts] = {}

    def of(name: str) -> ProgramCounts:
        if name not in done:
            done[name] = ProgramCounts()
            for part in computations[name]:
                _count(done[name], part, of, computations)
        return done[name]

    return of(entry)


def computations_of(text: str) -> tuple[Computations, str]:
    """The instructions of each computation by its name, and which one the program starts with.

    Raises:
      ValueError: the text is not of a compiled program.
    """
    found: dict[str, list[str]] = {}
    entry = ""
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            lines = found[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.startswith(" ") and found:
            lines.append(line)
    if not entry:
        raise ValueError("the text is not of a compiled program: it has no ENTRY computation")
    return {name: list(_instructions(lines)) for name, lines in found.items()}, entry


def _instructions(lines: list[str]) -> Iterator[Instruction]:
    shapes: dict[str, str] = {}
    for line in lines:
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        name, shape, operation, rest = found.groups()
        shapes[name] = shape
        names = re.findall(r"%([\w.\-]+)", rest.split("),")[0])
        yield Instruction(shape, operation, rest, tuple(shapes[each] for each in names if each in shapes))


def trips(loop: Instruction, computations: Computations) -> int:
    """How often a loop's body runs: as XLA says, or up to the largest constant of its condition; 1 where there is none.

    A loop that may end before (a text is written) counts as if it did not.
    """
    known = _TRIPS.search(loop.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]
    lines = [part for name in (condition, *_reached(condition, computations)) for part in computations[name]]
    constants = [re.match(r"(\d+)\)", part.rest) for part in lines if part.operation == "constant"]
    return max([1, *(int(found[1]) for found in constants if found)])


def body(loop: Instruction) -> str:
    """The name of what a loop repeats."""
    return re.search(r"body=%?([\w.\-]+)", loop.rest)[1]


def _reached(name: str, computations: Computations) -> list[str]:
    called = [each for part in computations[name] for each in part.called]
    return called + [further for each in called for further in _reached(each, computations)]


def _count(
    total: ProgramCounts, part: Instruction, of: Callable[[str], ProgramCounts], computations: Computations
) -> None:
    kind = part.operation.removesuffix("-start")
    if kind in COLLECTIVES:
        total.count[kind] += 1
        total.payload[kind] += payload(part)
        total.sent[kind] += sent(part)
    elif part.operation == "dot":
        total.flops += _dot_flops(part)
    elif part.operation == "conditional":
        total.add(max(map(of, part.called), key=lambda work: (work.flops, work.total_sent)))
    elif part.operation == "while":
        total.add(of(body(part)), trips(part, computations))
    else:
        for name in part.called:
            total.add(of(name))


def payload(part: Instruction) -> int:
    """The bytes that a collective is of: the full array, before it is reduced or after it is gathered."""
    given, returned = sum(map(bytes_of, part.operands)), bytes_of(part.shape)
    if part.operation.endswith("-start"):  # which returns what it was given, too
        return max(given, returned - given) if part.operation == "all-gather-start" else given
    return max(given, returned)


def sent(part: Instruction) -> float:
    """The bytes that a device sends for a collective, in a ring."""
    kind, devices = part.operation.removesuffix("-start"), _group_size(part.rest)
    share = {"all-reduce": 2 * (devices - 1) / devices, "collective-permute": 1.0}.get(kind, (devices - 1) / devices)
    return payload(part) * share


def _group_size(rest: str) -> int:
    """How many devices take part in a collective together: XLA lists them, counts them, or names the mesh's axes."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return listed[1].count(",") + 1
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    if counted:
        return int(counted[1])
    named = re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", rest)
    if named is None:
        return 1
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    # A part of an axis is written as 'axis':(devices before it)its size.
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
    return math.prod(int(part or sizes[axis]) for axis, part in parts)


def bytes_of(shape: str) -> int:
    """Of an array, or of all arrays of a tuple."""
    return sum(BYTES.get(kind, 4) * math.prod(_sides(sides)) for kind, sides in _SHAPE.findall(shape))


def _dot_flops(part: Instruction) -> float:
    """A multiply-add as two."""
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", part.rest)
    left = _sides(_SHAPE.search(part.operands[0])[2])
    inner = math.prod(left[axis] for axis in _sides(contracted[1] if contracted else ""))
    return 2.0 * math.prod(_sides(_SHAPE.search(part.shape)[2])) * inner


def _sides(listed: str) -> list[int]:
    return [int(side) for side in listed.split(",") if side]
