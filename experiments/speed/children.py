"""Measurements in separate processes: with another number of devices, or without compiled programs."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# Machine code that never runs need not be fast: a third of the time. The counted program is fixed before this step.
QUICK = "--xla_backend_optimization_level=0"


def answer(
    module: str,
    arguments: Sequence[str],
    *,
    flags: str = "",
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> Any:
    """Runs a module of `experiments` with these XLA flags, and returns the JSON in the last line that it prints.

    It runs on the CPU, unless the `environment` names other `JAX_PLATFORMS`.

    Raises:
      RuntimeError: it failed, with the end of its output, or did not end within `timeout` seconds.
    """
    given = {**os.environ, "JAX_PLATFORMS": "cpu", **(environment or {})}
    given["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=given, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{module} {' '.join(arguments)} was not done after {timeout:.0f} s") from error
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
