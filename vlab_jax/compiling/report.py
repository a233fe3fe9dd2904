"""The results of compiling for a machine, as a table, as JSON, or as rows of Markdown."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vlab_jax.compiling.fitting import CompileResult
from vlab_jax.compiling.step_time import TimeEstimate

GIB, MIB = 2**30, 2**20
HELD = ("parameters", "optimiser", "average", "batch")
MAX_PLACES = 16  # places of a step in the table


@dataclasses.dataclass(frozen=True)
class ProgramRow:
    """One program on a machine."""

    name: str
    batch: int  # clips (or texts) of one run on all devices
    memory: CompileResult
    held: Mapping[str, int]  # bytes per device of its arguments, by the names in `HELD`
    flops: float | None  # model FLOPs per device; None: not counted
    at_peak: float | None  # the seconds that these FLOPs take at the chip's peak
    # By kind: their `count`, the bytes of their full arrays (`payload`), and the bytes that a device sends (`sent`).
    collectives: Mapping[str, Mapping[str, float]]
    sending: float | None  # the seconds of the collectives if no computation hides them; None: on GPUs
    time: TimeEstimate | None  # of a run; None: on GPUs, and for a program that does not fit
    compile_seconds: float  # of lowering and compiling on this machine

    @property
    def utilisation(self) -> float | None:
        """The estimated share of the chip's peak."""
        return self.at_peak / self.time.seconds if self.at_peak and self.time and self.time.seconds else None

    def as_json(self) -> dict[str, Any]:
        """Bytes and seconds as plain values."""
        fields = {**vars(self), **dataclasses.asdict(self.memory), "utilisation": self.utilisation}
        del fields["memory"], fields["text"]
        if self.time is not None:
            places = [{**at._asdict(), "seconds": spent} for at, spent in self.time.places.most_common()]
            fields["time"] = {"seconds": self.time.seconds, "by": self.time.sources, "places": places}
        return fields


def table(rows: Sequence[ProgramRow]) -> str:
    """A column for each program, then its collectives and the places of its estimated time."""
    sent = [sum(each["sent"] for each in row.collectives.values()) for row in rows]
    lines = [
        ("", [row.name for row in rows]),
        ("batch", [f"{row.batch}" for row in rows]),
        ("fits", ["yes" if row.memory.fits else "NO" for row in rows]),
        ("GiB per device", [_gib(row.memory.needed) for row in rows]),
        ("  of", [_gib(row.memory.available) for row in rows]),
        *((f"  {name}", [_gib(row.held[name]) for row in rows]) for name in HELD),
        ("  temporaries", [_gib(row.memory.temporaries) for row in rows]),
        ("model TFLOP per device", [_number(row.flops, 1e-12) for row in rows]),
        ("  at peak, ms", [_number(row.at_peak, 1e3) for row in rows]),
        ("sent, MiB per device", [_number(size, 1 / MIB) for size in sent]),
        ("estimated, ms", [_number(row.time and row.time.seconds, 1e3) for row in rows]),
        ("utilisation, %", [_number(row.utilisation, 1e2) for row in rows]),
        ("compiled in, s", [f"{row.compile_seconds:.0f}" for row in rows]),
    ]
    widths = [max(12, len(row.name)) for row in rows]
    text = [
        "  ".join([f"{title:22}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))])
        for title, cells in lines
    ]
    for row in rows:
        text += [*_collectives(row), *_places(row)]
    return "\n".join(text)


def _collectives(row: ProgramRow) -> list[str]:
    if not row.collectives:
        return []
    time = "" if row.sending is None else f"; {1e3 * row.sending:.1f} ms if no computation hides them"
    lines = ["", f"{row.name}: collectives{time}", f"{'':22}{'count':>10}{'of, MiB':>12}{'sent, MiB':>12}"]
    for kind, each in sorted(row.collectives.items(), key=lambda item: -item[1]["sent"]):
        lines.append(f"  {kind:20}{each['count']:>10.0f}{each['payload'] / MIB:>12.1f}{each['sent'] / MIB:>12.1f}")
    return lines


def _places(row: ProgramRow) -> list[str]:
    time = row.time
    if time is None:
        return []
    by = ", ".join(f"{name} {1e3 * spent:.1f}" for name, spent in time.sources.most_common() if spent)
    lines = ["", f"{row.name}: where the estimated time goes, ms (by {by})"]
    if time.kernels_without_cost:
        lines.append(f"  too little: {time.kernels_without_cost} kernels have no cost_estimate, only bytes are charged")
    for at, spent in time.places.most_common(MAX_PLACES):
        lines.append(f"{1e3 * spent:>10.1f}  {100 * spent / time.seconds:>4.0f} %  {', '.join(filter(None, at))}")
    return lines


def markdown(row: ProgramRow, config: str, topology: str, mesh: str, command: str) -> str:
    """A row of a table: config, program, machine, mesh, batch, GiB per device, ms at peak and estimated, command."""
    memory = f"{'' if row.memory.fits else '**no**: '}{_gib(row.memory.needed)} of {_gib(row.memory.available)}"
    times = f"{_number(row.at_peak, 1e3)} | {_number(row.time and row.time.seconds, 1e3)}"
    return f"| {config} | {row.name} | {topology} | {mesh} | {row.batch} | {memory} | {times} | `{command}` |"


def _gib(size: int | float) -> str:
    return f"{size / GIB:,.2f}"


def _number(value: float | None, factor: float) -> str:
    return "-" if value is None else f"{value * factor:,.1f}"
