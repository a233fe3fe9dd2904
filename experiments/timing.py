"""What the timings of all experiments have in common: runs taken in turns, medians, and the commit they are of."""

import json
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

from vlab_jax.runtime.disk import write_json


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


def add_record(path: pathlib.Path, name: str, record: Mapping[str, Any]) -> None:
    """Puts a record into a JSON file of records by name, in place of the one of that name, and prints it."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    write_json(path, {**known, name: record})
    print(json.dumps({name: record}, indent=2))


def made_with() -> dict[str, str]:
    """What a measurement is of: the commit, the versions of Python and JAX, and the kind of device."""
    import jax  # here: grids of runs measure nothing, and leave the accelerator to their runs

    versions = {"python": platform.python_version(), "jax": jax.__version__}
    return {"commit": commit(), **versions, "device": jax.devices()[0].device_kind}


def commit() -> str:
    """The commit of the working tree; empty outside of a repository."""
    run = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return run.stdout.strip()
