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
    module: str, arguments: Sequence[str], *, flags: str = "", environment: Mapping[str, str] | None = None
) -> Any:
    """The JSON that a module of `experiments` prints as its last line, run on the CPU with these flags of XLA.

    Raises:
      RuntimeError: it failed; the last of what it said.
    """
    given = {**os.environ, **(environment or {}), "JAX_PLATFORMS": "cpu"}
    given["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, env=given)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
