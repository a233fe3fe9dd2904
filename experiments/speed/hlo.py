"""What a compiled program does, read from XLA's text of it: FLOPs of matrix products, and what collectives send.

XLA's own count takes the body of a loop once. Here every computation counts as often as it runs: loops over blocks say
how often (`known_trip_count`), and of a condition's branches the dearer one counts.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator

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
class Work:
    """Of one device in one run: FLOPs of matrix products; by kind of collective, how many there are (`count`), the
    bytes that they are of (`payload`: the full array, before it is reduced or after it is gathered), and the bytes that
    a device sends for it in a ring (`sent`)."""

    flops: float = 0.0
    count: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    payload: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    sent: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "Work", times: int = 1) -> None:
        """Adds another computation's work, so many times."""
        self.flops += times * other.flops
        for mine, theirs in zip(self._counters(), other._counters(), strict=True):
            mine.update({kind: times * value for kind, value in theirs.items()})

    def _counters(self) -> tuple[collections.Counter, ...]:
        return self.count, self.payload, self.sent

    @property
    def total_sent(self) -> float:
        """Bytes that a device sends, of all kinds."""
        return sum(self.sent.values())


def work(text: str) -> Work:
    """The work of a compiled program, from its text (`compiled.as_text()`)."""
    computations, entry = _computations(text)
    done: dict[str, Work] = {}

    def of(name: str) -> Work:
        if name not in done:
            done[name] = Work()
            for part in _instructions(computations[name]):
                _count(done[name], part, of)
        return done[name]

    return of(entry)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and which one the program starts with."""
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
    return found, entry


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: what it returns, its operation, what follows the name of that, and its operands' shapes."""

    shape: str
    operation: str
    rest: str
    operands: tuple[str, ...]


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


def _count(total: Work, part: Instruction, of: Callable[[str], Work]) -> None:
    if part.operation in COLLECTIVES:
        _count_collective(total, part)
    elif part.operation == "dot":
        total.flops += _dot_flops(part)
    elif part.operation == "conditional":
        branches = _CALLED.findall(part.rest) + [
            name.strip().lstrip("%") for each in _BRANCHES.findall(part.rest) for name in each.split(",")
        ]
        total.add(max(map(of, branches), key=lambda work: (work.flops, work.total_sent)))
    else:
        trips = _TRIPS.search(part.rest) if part.operation == "while" else None
        for name in _CALLED.findall(part.rest):
            total.add(of(name), int(trips[1]) if trips else 1)


def _count_collective(total: Work, part: Instruction) -> None:
    kind, devices = part.operation, _group_size(part.rest)
    payload = max(_bytes(part.shape), sum(map(_bytes, part.operands)))
    share = {"all-reduce": 2 * (devices - 1) / devices, "collective-permute": 1.0}.get(kind, (devices - 1) / devices)
    total.count[kind] += 1
    total.payload[kind] += payload
    total.sent[kind] += payload * share


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


def _bytes(shape: str) -> int:
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
