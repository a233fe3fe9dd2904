"""What compiling for a machine has told, as a table, as JSON, or as rows of Markdown."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vlab_jax.compiling.step_time import Time

GIB, MIB = 2**30, 2**20
HELD = ("parameters", "optimiser", "average", "batch")
SHOWN = 16  # places of a step that the table shows


@dataclasses.dataclass(frozen=True)
class ProgramRow:
    """One program on a machine.

    Attributes:
      name, batch: of the program, and what one run of it takes on all devices together.
      fits, needed, available, temporaries: see `fitting.Compiled`; bytes a device.
      held: bytes a device of what it is given.
      flops: model FLOPs a device; at_peak: the seconds that they take at the chip's peak. None: they are not counted.
      collectives: by kind, how many run, the bytes they are of, and the bytes that a device sends.
      sending: the seconds that these take where nothing hides them; None: on GPUs.
      time: the estimate of a run; None: on GPUs, and of a program that does not fit.
      compile_seconds: how long lowering and compiling took here.
    """

    name: str
    batch: int
    fits: bool
    needed: float
    available: float
    temporaries: float
    held: Mapping[str, int]
    flops: float | None
    at_peak: float | None
    collectives: Mapping[str, Mapping[str, float]]
    sending: float | None
    time: Time | None
    compile_seconds: float

    @property
    def utilisation(self) -> float | None:
        """Of the peak, by the estimate."""
        if self.time is None or not self.at_peak or not self.time.seconds:
            return None
        return self.at_peak / self.time.seconds

    def as_json(self) -> dict[str, Any]:
        """Bytes and seconds, in plain values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {"held": dict(self.held), "collectives": {k: dict(v) for k, v in self.collectives.items()}}
        if self.time is not None:
            places = [dataclasses.asdict(at) | {"seconds": spent} for at, spent in self.time.places.most_common()]
            fields["time"] = {"seconds": self.time.seconds, "by": dict(self.time.sources), "places": places}
        return fields | {"utilisation": self.utilisation}


def table(rows: Sequence[ProgramRow]) -> str:
    """A column for each program; then what its devices send each other, and where its time goes."""
    lines = [
        ("batch", [f"{row.batch}" for row in rows]),
        ("fits", ["yes" if row.fits else "NO" for row in rows]),
        ("GiB a device", [_gib(row.needed) for row in rows]),
        ("  of", [_gib(row.available) for row in rows]),
        *((f"  {name}", [_gib(row.held[name]) for row in rows]) for name in HELD),
        ("  temporaries", [_gib(row.temporaries) for row in rows]),
        ("model TFLOP a device", [_number(row.flops, 1e-12) for row in rows]),
        ("  at peak, ms", [_number(row.at_peak, 1e3) for row in rows]),
        (
            "sent, MiB a device",
            [_number(sum(each["sent"] for each in row.collectives.values()), 1 / MIB) for row in rows],
        ),
        ("estimated, ms", [_number(row.time and row.time.seconds, 1e3) for row in rows]),
        ("utilisation, %", [_number(row.utilisation, 1e2) for row in rows]),
        ("compiled in, s", [f"{row.compile_seconds:.0f}" for row in rows]),
    ]
    widths = [max(12, len(row.name)) for row in rows]
    shown = ["  ".join([f"{'':22}", *(f"{row.name:>{width}}" for row, width in zip(rows, widths, strict=True))])]
    for title, cells in lines:
        shown.append(
            "  ".join([f"{title:22}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))])
        )
    for row in rows:
        shown += [*_collectives(row), *_places(row)]
    return "\n".join(shown)


def _collectives(row: ProgramRow) -> list[str]:
    if not row.collectives:
        return []
    hidden = "" if row.sending is None else f"; {1e3 * row.sending:.1f} ms where nothing hides them"
    lines = ["", f"{row.name}: collectives{hidden}", f"{'':22}{'count':>10}{'of, MiB':>12}{'sent, MiB':>12}"]
    for kind, each in sorted(row.collectives.items(), key=lambda item: -item[1]["sent"]):
        lines.append(f"  {kind:20}{each['count']:>10.0f}{each['payload'] / MIB:>12.1f}{each['sent'] / MIB:>12.1f}")
    return lines


def _places(row: ProgramRow) -> list[str]:
    if row.time is None:
        return []
    by = ", ".join(f"{name} {1e3 * spent:.1f}" for name, spent in row.time.sources.most_common() if spent)
    lines = ["", f"{row.name}: where the estimated time goes, ms (by {by})"]
    if row.time.unsaid:
        lines.append(f"  {row.time.unsaid} kernels have no cost_estimate: their bytes alone are charged, too little")
    for at, spent in row.time.places.most_common(SHOWN):
        lines.append(f"{1e3 * spent:>10.1f}  {100 * spent / row.time.seconds:>4.0f} %  {_place(at)}")
    return lines


def _place(at: Any) -> str:
    return ", ".join(filter(None, (at.part, at.layer, at.way)))


def markdown(row: ProgramRow, what: str, topology: str, mesh: str, command: str) -> str:
    """A row of a table: config, program, machine, mesh, batch, GiB a device, ms at peak and estimated, command."""
    fits = (
        f"{_gib(row.needed)} of {_gib(row.available)}"
        if row.fits
        else f"**no**: {_gib(row.needed)} of {_gib(row.available)}"
    )
    times = f"{_number(row.at_peak, 1e3)} | {_number(row.time and row.time.seconds, 1e3)}"
    return f"| {what} | {row.name} | {topology} | {mesh} | {row.batch} | {fits} | {times} | `{command}` |"


def _gib(size: int | float) -> str:
    return f"{size / GIB:,.2f}"


def _number(value: float | None, factor: float) -> str:
    return "-" if value is None else f"{value * factor:,.1f}"
