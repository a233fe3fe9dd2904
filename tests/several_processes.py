"""Processes of one run, started together on this machine, each with its share of the devices.

As a program it is one of them: it notes the clips that it reads, and one of them may fail.

    python tests/several_processes.py <file for its notes> <process that fails> <batch at which it does> --config=...
"""

import os
import pathlib
import re
import socket
import subprocess
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
OUTAGE = "the data was out of reach, for a test"


class Ended(NamedTuple):
    """The exit status of a process and what it wrote to standard error."""

    status: int
    said: str


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def together(commands: list[list[str]], devices: int = 4) -> list[Ended]:
    """Runs a command for each process, all at once."""
    port, running = free_port(), []
    flags = re.sub(r"(host_platform_device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])
    for number, command in enumerate(commands):
        given = dict(zip(VARIABLES, (f"127.0.0.1:{port}", str(len(commands)), str(number)), strict=True))
        environment = {**os.environ, **given, "XLA_FLAGS": flags, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=500)[1] for process in running]
    return [Ended(process.returncode, each) for process, each in zip(running, said, strict=True)]


def _main() -> None:
    notes, failing, last = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    from vlab_jax import main
    from vlab_jax.data.batches import ClipReader
    from vlab_jax.errors import CannotRead
    from vlab_jax.training.loop import Run

    read, next_batch, asked = ClipReader.read, Run._next, []

    def noted(self, number, index, rng):
        with notes.open("a") as file:
            file.write(f"{index}\n")
        return read(self, number, index, rng)

    def failed(self, *given):
        asked.append(given)
        if os.environ["JAX_PROCESS_ID"] == failing and len(asked) == last:
            raise CannotRead(OUTAGE)
        return next_batch(self, *given)

    ClipReader.read, Run._next = noted, failed
    sys.argv[1:4] = []
    main.main()


if __name__ == "__main__":
    _main()
