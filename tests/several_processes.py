"""Starts the processes of one run together on this machine, each with a device of its own.

As a program it is one of these processes. The command starts it with `--multihost`; once joined, it carries out a list
of jobs, one after the other, in place of the command's own, so that the processes start only once.

    python tests/several_processes.py <file of jobs> --multihost --config=... --workdir=...
"""

import ast
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
    stderr: str


class Job(NamedTuple):
    """A config file with some fields set, the folders that it is run with, and a file for the clips that it reads.

    `fails`: the process that fails, and the batch at which it does.
    """

    config: str
    fields: dict
    workdir: str
    checkpoint: str | None = None
    notes: str = ""
    fails: tuple[int, int] | None = None


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def together(commands: list[list[str]]) -> list[Ended]:
    """Runs a command for each process, all at once."""
    port, running = free_port(), []
    flags = re.sub(r"(host_platform_device_count=)\d+", r"\g<1>1", os.environ["XLA_FLAGS"])
    for number, command in enumerate(commands):
        values = dict(zip(VARIABLES, (f"127.0.0.1:{port}", str(len(commands)), str(number)), strict=True))
        environment = {**os.environ, **values, "XLA_FLAGS": flags, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=500)[1] for process in running]
    return [Ended(process.returncode, text) for process, text in zip(running, errors, strict=True)]


def run_jobs(jobs: list[Job], folder: pathlib.Path, processes: int) -> list[Ended]:
    """Carries out jobs in so many processes."""
    file = folder / "jobs"
    file.write_text(repr([tuple(job) for job in jobs]))
    command = [sys.executable, str(ROOT / "tests" / "several_processes.py"), str(file), "--multihost"]
    command += [f"--config={ROOT / 'tests' / 'tiny_run.py'}", f"--workdir={folder}"]
    return together([command] * processes)


def _main() -> None:
    jobs = [Job(*values) for values in ast.literal_eval(pathlib.Path(sys.argv[1]).read_text())]
    from vlab_jax import config_file, main
    from vlab_jax.data.batches import ClipReader
    from vlab_jax.errors import CannotRead
    from vlab_jax.training.loop import Run

    number, current, batches = int(os.environ["JAX_PROCESS_ID"]), [], []
    read, next_batch, train = ClipReader.read, Run._next_batch, main._train

    def noted(self, source, index, rng):
        if notes := current[-1].notes:
            with open(f"{notes}-{number}", "a") as file:
                file.write(f"{index}\n")
        return read(self, source, index, rng)

    def failing(self, *arguments):
        batches.append(arguments)
        if current[-1].fails == (number, len(batches)):
            raise CannotRead(OUTAGE)
        return next_batch(self, *arguments)

    def carry_out(*_: object) -> None:
        main._train = train
        for job in jobs:
            current.append(job)
            batches.clear()
            config = config_file.load(job.config)
            config.update_from_flattened_dict(job.fields)
            main.run(config, job.workdir, job.checkpoint)

    ClipReader.read, Run._next_batch, main._train = noted, failing, carry_out
    del sys.argv[1]
    sys.exit(main.main(sys.argv))


if __name__ == "__main__":
    _main()
