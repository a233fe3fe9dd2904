"""Helpers for all timings: alternating runs, medians, and the commit of a record."""

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
    log: Callable[[str], object] = lambda line: None,
) -> dict[str, float]:
    """Seconds of each run: medians over `repeats` rounds in which the runs alternate.

    Args:
      clock: wall time, or (`time.process_time`) processor time of this process.
      log: is called with a line for each run.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = clock()
            run()
            times[name].append(clock() - started)
            log(f"{name}: {times[name][-1]:.2f} s")
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def add_record(path: pathlib.Path, name: str, record: Mapping[str, Any]) -> None:
    """Writes a record into a JSON file of records by name, replacing the one of that name, and prints it."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    write_json(path, {**known, name: record})
    print(json.dumps({name: record}, indent=2))


def made_with() -> dict[str, str]:
    """The commit, the versions of Python and JAX, and the kind of device of a measurement."""
    import jax  # imported here: a grid leaves the accelerator to its runs

    versions = {"python": platform.python_version(), "jax": jax.__version__}
    return {"commit": commit(), **versions, "device": jax.devices()[0].device_kind}


def commit() -> str:
    """The commit of the working tree; empty outside a repository."""
    run = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return run.stdout.strip()
