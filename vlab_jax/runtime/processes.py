"""Runs of several processes: how they find each other, what they agree on, and which one speaks and writes.

All processes of a run execute the same program, see one mesh of all devices, and share the workdir. The first writes
what is written once; checkpoints are written by all.
"""

import contextlib
import hashlib
import os
import pathlib
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from vlab_jax.errors import InputError
from vlab_jax.runtime.sharding import AXES, shardings

COORDINATOR, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def connect() -> None:
    """Joins the processes of a run; to be called before anything else of JAX.

    On TPU pods and under Slurm, Open MPI and the like, JAX finds the others by itself. Elsewhere three environment
    variables say where they are: `JAX_COORDINATOR_ADDRESS` (host:port of the first process), `JAX_NUM_PROCESSES`
    and `JAX_PROCESS_ID` (from 0).

    Raises:
      InputError: the variables make no sense, or the processes do not find each other.
    """
    given = {name: os.environ[name] for name in (COORDINATOR, COUNT, NUMBER) if os.environ.get(name)}
    if given and len(given) < 3:
        missing = next(name for name in (COORDINATOR, COUNT, NUMBER) if name not in given)
        raise InputError(f"--multihost: {', '.join(given)} is set, but {missing} is not; set all three, or none")
    options: dict[str, Any] = {}
    if given:
        count, number = (given[name] for name in (COUNT, NUMBER))
        if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
            raise InputError(f"--multihost: {NUMBER}={number} must be a number from 0 to {COUNT}={count} less 1")
        options = {"coordinator_address": given[COORDINATOR], "num_processes": int(count), "process_id": int(number)}
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"--multihost: the processes do not find each other ({reason}); set {COORDINATOR}, {COUNT} and {NUMBER}"
        ) from error


def is_primary() -> bool:
    """Whether this process writes what is written once: the first, or the only one."""
    return jax.process_index() == 0


@contextlib.contextmanager
def primary_first(name: str) -> Iterator[None]:
    """The first process goes through the block before the others enter it: to write what they then read."""
    if jax.process_count() > 1 and not is_primary():
        multihost_utils.sync_global_devices(name)
    yield
    if jax.process_count() > 1 and is_primary():
        multihost_utils.sync_global_devices(name)


class Neighbours(NamedTuple):
    """How many processes of a run, this one included, share its machine, and the cores that it may use."""

    host: int = 1
    cores: int = 1


def neighbours() -> Neighbours:
    """The processes of this run beside this one; all processes must call it."""
    if jax.process_count() == 1:
        return Neighbours()
    host = _machine()
    # Processes that are bound to different cores of one machine have no core in common.
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    own = np.stack([_digest(host), _digest(f"{host} {cores}")])
    every = np.asarray(multihost_utils.process_allgather(own))  # [processes, 2, 2]
    return Neighbours(*(every == own).all(-1).sum(0).tolist())


def _machine() -> str:
    """What tells a machine from others; containers have names of their own, and names repeat."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return socket.gethostname()


def _digest(text: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.uint32)


def agreed(figures: Mapping[str, float]) -> dict[str, float]:
    """The first process's figures, in every process: what they decide by must be the same to the bit."""
    if jax.process_count() == 1 or not figures:
        return dict(figures)
    values = multihost_utils.broadcast_one_to_all(np.array(list(figures.values()), np.float64).view(np.uint32))
    return dict(zip(figures, np.asarray(values, np.uint32).view(np.float64).tolist(), strict=True))


def own_mesh(mesh: Mesh) -> Mesh:
    """The mesh on which one process evaluates by itself: of its own devices; the run's own where it is the only one."""
    if jax.process_count() == 1:
        return mesh
    devices = np.array(jax.local_devices()).reshape(1, -1, 1)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def on_own_mesh(parameters: Any, mesh: Mesh) -> Any:
    """Parameters that are spread over all processes, copied whole to each one's `own_mesh`."""
    if jax.process_count() == 1:
        return parameters
    whole = multihost_utils.process_allgather(parameters, tiled=True)
    return jax.device_put(whole, shardings(whole, mesh))


class _Nowhere:
    """A stream that shows nothing."""

    def write(self, text: str, /) -> None:
        pass

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def display() -> Any:
    """Where progress is shown: on standard error by the first process, by the others nowhere."""
    return sys.stderr if is_primary() else _Nowhere()
