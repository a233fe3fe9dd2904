"""What the timings of all experiments have in common: runs taken in turns, medians, and the commit they are of."""

import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any


def medians(
    runs: dict[str, Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    told: Callable[[str], object] = lambda line: None,
) -> dict[str, float]:
    """Seconds of each run, the median of `repeats` taken in turns.

    Args:
      clock: whose seconds: of the wall, or (`time.process_time`) of this process's processors.
      told: gets a line for each run.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = clock()
            run()
            times[name].append(clock() - started)
            told(f"{name}: {times[name][-1]:.2f} s")
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def commit() -> str:
    """The commit of the working tree; empty outside of a repository."""
    run = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return run.stdout.strip()
