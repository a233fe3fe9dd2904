"""The processes of a run count those that share their machine and their cores."""

import os
import pathlib
import subprocess
import sys

import pytest
from several_processes import free_port

from vlab_jax.runtime import sharding
from vlab_jax.runtime.sharding import Neighbours, neighbours

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import os, sys
if sys.argv[1]:
    os.sched_setaffinity(0, {int(sys.argv[1])})
from vlab_jax.runtime import sharding
sharding.connect()
print(tuple(sharding.neighbours()))
"""


def counted(cores: list[str]) -> list[str]:
    """What each process counts; one for each item, bound to this core if it is not empty."""
    port = free_port()
    names = (sharding.COORDINATOR, sharding.COUNT, sharding.NUMBER)
    running = []
    for number, core in enumerate(cores):
        values = dict(zip(names, (f"127.0.0.1:{port}", str(len(cores)), str(number)), strict=True))
        environment = {**os.environ, **values, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", PROGRAM, core]
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
    printed = [process.communicate(timeout=120)[0].splitlines() for process in running]
    assert [process.returncode for process in running] == [0] * len(cores)
    return [lines[-1] for lines in printed]


@pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="processes are bound to cores as Linux does"
)
def test_processes_count_those_on_their_machine_and_those_on_their_cores():
    core = str(min(os.sched_getaffinity(0)))
    assert counted(["", "", core]) == ["(3, 2)", "(3, 2)", "(3, 1)"]


def test_a_single_process_counts_itself():
    assert neighbours() == Neighbours(host=1, cores=1)
