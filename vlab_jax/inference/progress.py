"""A progress bar over what is computed clip by clip, on standard error."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

R = TypeVar("R")


def counted(results: Iterable[R], total: int | None, shown: bool, unit: str = " clips") -> Iterator[R]:
    """The results, counted on the bar as they come, if it is to be shown."""
    yield from _bar(total, shown, iterable=results, unit=unit)


def filled(shares: Iterable[float], total: int, shown: bool, unit: str) -> Iterator[float]:
    """Shares of so many things, added up on the bar as they are done, if it is to be shown."""
    looks = f"{{percentage:3.0f}}%|{{bar}}| {{n:.1f}}/{{total}} {unit} [{{elapsed}}<{{remaining}}]"
    with _bar(total, shown, bar_format=looks) as bar:
        for share in shares:
            bar.update(share)
            yield share


def _bar(total: int | None, shown: bool, **looks: Any) -> tqdm:
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, disable=not shown, file=sys.stderr, mininterval=interval, **looks)


def print_beside(line: str, stream: Any) -> None:
    """Prints a line on a line of its own, where a bar may be in its way."""
    if stream is sys.stderr or (sys.stderr.isatty() and stream.isatty()):
        tqdm.write(line, file=stream)
    else:
        print(line, file=stream, flush=True)
