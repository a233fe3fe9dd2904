"""Runs of several processes: how they find each other, what they agree on, and which one speaks and writes.

All processes of a run execute the same program, see one mesh of all devices, and share the workdir. The first writes
what is written once; checkpoints are written by all.
"""

import contextlib
import hashlib
import os
import pathlib
import pickle
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlab_jax.errors import InputError
from vlab_jax.runtime.sharding import AXES, replicated, shardings

A = TypeVar("A")
B = TypeVar("B")

COORDINATOR, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_GATHERED_AT_ONCE = 2**26  # bytes of all processes together, which each device holds for a moment


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


def gathered(value: A) -> list[A]:
    """The value that each process gives, in every process, in their order; all have to call it.

    Values travel as bytes, so texts, arrays and numbers come as they are. What is received is trusted: it is of the
    same program.
    """
    count = jax.process_count()
    if count == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = _gathered(np.array([len(data)], np.int64).view(np.uint32)).view(np.int64)[:, 0]
    longest = int(lengths.max())
    # Few sizes: each is a program that is compiled.
    piece = min(1 << (longest - 1).bit_length(), max(1, _GATHERED_AT_ONCE // count))
    parts = []
    for first in range(0, longest, piece):
        part = data[first : first + piece]
        parts.append(_gathered(np.pad(part, (0, piece - len(part)))))
    rows = np.concatenate(parts, axis=1)
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def _gathered(array: np.ndarray) -> np.ndarray:
    """`[processes, ...]`."""
    return np.ascontiguousarray(multihost_utils.process_allgather(array), array.dtype)


def agreed(make: Callable[[], A]) -> A:
    """What the first process makes, in every process: made once, and the same to the bit where they decide by it."""
    return gathered(make() if is_primary() else None)[0]


def shared_map(function: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """`function` of each item, in their order, in every process; each computes its share of them."""
    count = jax.process_count()
    shares = gathered([function(item) for item in items[jax.process_index() :: count]])
    return [shares[place % count][place // count] for place in range(len(items))]


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


def own_mesh(mesh: Mesh) -> Mesh:
    """The mesh on which one process evaluates its share: of its own devices; the run's own where it is the only one."""
    if jax.process_count() == 1:
        return mesh
    devices = np.array(jax.local_devices()).reshape(1, -1, 1)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def on_own_mesh(parameters: Any, mesh: Mesh) -> Any:
    """Parameters that are spread over all processes, copied to each one's `own_mesh`.

    The copies go from device to device, one array after the other: the host's memory holds none of them, and a device
    holds one array whole at a time, beside its part of the others.
    """
    if jax.process_count() == 1:
        return parameters
    places = shardings(parameters, mesh)
    return jax.tree.map(lambda array, place: _on_own_devices(array, mesh, place), parameters, places)


def _on_own_devices(array: jax.Array, mesh: Mesh, place: NamedSharding) -> jax.Array:
    """An array that spans all processes, on this one's devices."""
    everywhere = array.sharding.update(spec=PartitionSpec())
    with jax.set_mesh(everywhere.mesh):
        whole = jax.jit(_same, out_shardings=everywhere)(array)
    copies = {copy.device: copy.data for copy in whole.addressable_shards}
    own = jax.make_array_from_single_device_arrays(
        array.shape, replicated(mesh), [copies[device] for device in mesh.devices.flat]
    )
    return jax.device_put(own, place)


def _same(array: jax.Array) -> jax.Array:
    return array


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
