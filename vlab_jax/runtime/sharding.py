"""The mesh of devices, and what lies where on it.

Axes: `data` (the batch is split, parameters are copied), `fsdp` (the batch and the parameters are split) and `tensor`
(the parameters are split along heads and MLP width).
"""

import contextlib
import hashlib
import os
import pathlib
import pickle
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlab_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# The first pattern that a parameter's path matches says how its last dimensions are split; those before (the stack
# of blocks) are not. A dimension that an axis does not divide is not split.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(query_key_value|query|key_value)/kernel$", ("fsdp", None, "tensor", None)),
    (r"(query_key_value|query|key_value)/bias$", ("tensor", None)),
    (r"(attention|attend\w*)/output/kernel$", ("tensor", None, "fsdp")),
    (r"mlp/(input|gate)/kernel$", ("fsdp", "tensor")),
    (r"mlp/(input|gate)/bias$", ("tensor",)),
    (r"mlp/output/kernel$", ("tensor", "fsdp")),
    (r"token_embedding$", ("tensor", "fsdp")),
    (r"up/kernel$", (None, "fsdp")),
    (r"(projection|patch_embedding|down)/kernel$", ("fsdp", None)),
    (r"", ()),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, or over those given; -1 for one axis means as many as are left.

    Raises:
      InputError: an axis is neither -1 nor positive, or the product of the axes is not the number of devices.
    """
    sizes = [data, fsdp, tensor]
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"mesh axes {dict(zip(AXES, sizes, strict=True))}: each must be -1 or at least 1")
    if sizes.count(-1) > 1:
        raise InputError(f"mesh axes {dict(zip(AXES, sizes, strict=True))}: only one of them can be -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(count // -int(np.prod(sizes)), 1)
    if int(np.prod(sizes)) != count:
        asked = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise InputError(f"the mesh {asked} does not fit {count} devices; its product must be {count}")
    local = count // len({device.process_index for device in devices})
    if local % sizes[2]:
        raise InputError(
            f"config.mesh.tensor={sizes[2]} would span processes, which read different clips; it must divide the "
            f"{local} devices of each"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def platform_of(mesh: Mesh) -> str:
    """What programs for the mesh's devices are lowered for: `cpu`, `cuda`, `rocm` or `tpu`."""
    device = mesh.devices.flat[0]
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as `a/b/c`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def partition(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How `RULES` split an array of this path and shape."""
    spec = next(spec for pattern, spec in RULES if re.search(pattern, path))
    if len(spec) > len(shape):
        return PartitionSpec()
    padded = (None,) * (len(shape) - len(spec)) + spec
    sizes = dict(mesh.shape)
    return PartitionSpec(
        *(
            axis if axis is not None and sizes[axis] > 1 and length % sizes[axis] == 0 else None
            for axis, length in zip(padded, shape, strict=True)
        )
    )


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for each array (or abstract array) of a tree, an optimiser's state included."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition(path_name(path), leaf.shape, mesh)), tree
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension split over the devices that share the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_divisor(mesh: Mesh) -> int:
    """What the global batch size must be a multiple of."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch to arrays that span all processes, split along the first dimension."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


# FOLDED vlab_jax/runtime/sharding.py: Runs of several processes: how they find each other, what they agree on, and
# which one speaks and writes.  All processes of a run execute the same program, see one mesh of all devices, and
# share the workdir. The first writes what is written once; checkpoints are written by all.

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
