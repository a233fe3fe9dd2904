"""The processes of a run count those beside them, on the same machine and on the same cores."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from vlab_jax.runtime import sharding
from vlab_jax.runtime.sharding import Neighbours, neighbours

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import os, sys
if sys.argv[1]:
    os.sched_setaffinity(0, {int(sys.argv[1])})
from vlab_jax.runtime import processes
processes.connect()
print(tuple(processes.neighbours()))
"""


def counted(cores: list[str]) -> list[str]:
    """What each of so many processes counts; bound to a core where one is given."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    names = (sharding.COORDINATOR, sharding.COUNT, sharding.NUMBER)
    running = []
    for number, core in enumerate(cores):
        given = dict(zip(names, (f"127.0.0.1:{port}", str(len(cores)), str(number)), strict=True))
        environment = {**os.environ, **given, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", PROGRAM, core]
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120)[0].splitlines() for process in running]
    assert [process.returncode for process in running] == [0] * len(cores)
    return [lines[-1] for lines in said]


@pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="processes are bound to cores as Linux does"
)
def test_processes_count_those_on_their_machine_and_those_on_their_cores():
    core = str(min(os.sched_getaffinity(0)))
    assert counted(["", "", core]) == ["(3, 2)", "(3, 2)", "(3, 1)"]


def test_a_process_that_is_alone_has_no_other_beside_it():
    assert neighbours() == Neighbours(host=1, cores=1)
