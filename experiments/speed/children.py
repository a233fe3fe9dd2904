"""Measurements in processes of their own: with another number of devices, or with nothing compiled yet."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# Machine code that is never run need not be fast: a third of the time. What is counted is settled before.
QUICK = "--xla_backend_optimization_level=0"


def answer(
    module: str,
    arguments: Sequence[str],
    *,
    flags: str = "",
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> Any:
    """The JSON that a module of `experiments` prints as its last line, run with these flags of XLA; on the CPU, unless
    the `environment` names other `JAX_PLATFORMS`.

    Raises:
      RuntimeError: it failed, with the last of what it said, or was not done after `timeout` seconds.
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
