"""The mesh of devices, the placement and constraints of arrays on it, and the processes of a run.

Axes of the mesh: `data` (splits the batch; parameters are copied), `fsdp` (splits the batch and the parameters) and
`tensor` (splits the parameters along heads and MLP width).

All processes of a run execute the same program on one mesh of all devices, and share the workdir. The first one writes
what is written once; checkpoints are written by all.
"""

import contextlib
import math
import os
import pathlib
import pickle
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from vlab_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # that split a batch

# How the last dimensions of a parameter are split, by the first pattern that its path matches; the dimensions before
# (the stack of blocks) are not split, nor is one that its axis does not divide.
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
    """A mesh over `devices` (by default all); -1 for one axis means all that the other axes leave. Raises `InputError`
    if the axes do not fit the devices."""
    sizes = [data, fsdp, tensor]
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        axes = dict(zip(AXES, sizes, strict=True))
        raise InputError(f"mesh axes {axes}: each must be at least 1, and only one of them can be -1 instead")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(count // -math.prod(sizes), 1)
    if math.prod(sizes) != count:
        axes = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise InputError(f"the mesh {axes} does not fit {count} devices; its product must be {count}")
    local = count // len({device.process_index for device in devices})
    if local % sizes[2]:
        raise InputError(
            f"config.mesh.tensor={sizes[2]} would span processes, which read different clips; it must divide the "
            f"{local} devices of each"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def platform_of(mesh: Mesh) -> str:
    """The platform that programs for the mesh's devices are lowered for: `cpu`, `cuda`, `rocm` or `tpu`."""
    device = mesh.devices.flat[0]
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as `a/b/c`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def partition(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The split of an array of this path and shape by `RULES`."""
    spec = next(spec for pattern, spec in RULES if re.search(pattern, path))
    if len(spec) > len(shape):
        return PartitionSpec()
    padded = (None,) * (len(shape) - len(spec)) + spec
    sizes = {**mesh.shape, None: 1}
    pairs = zip(padded, shape, strict=True)
    return PartitionSpec(*(axis if sizes[axis] > 1 and length % sizes[axis] == 0 else None for axis, length in pairs))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for each array (or abstract array) of a tree, an optimiser's state included."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition(path_name(path), leaf.shape, mesh)), tree
    )


def with_shardings(shapes: Any, placement: Any) -> Any:
    """Shapes and dtypes with their shardings, which `placement` has in a tree of the same structure."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, placement
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension split over the devices that share the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_divisor(mesh: Mesh) -> int:
    """What the global batch size must be a multiple of."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Turns this process's part of a batch into arrays that span all processes, split along the first dimension."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


def batch_devices() -> int:
    """The number of devices that share a batch on the mesh that is set; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in BATCH_AXES)


def split_by_batch(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """`x`, constrained to stay split by rows where a mesh is set.

    Without the constraint, devices that hold a part of each kernel multiply all rows by their part and add up the
    results of all rows. Kernels are smaller than a batch's activations, so it is better to send kernels.
    """
    devices = batch_devices()
    if devices == 1 or x.shape[0] % devices:
        return x
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *rest))


def gather_kernel(kernel: Float[Array, "..."], tensor_axis: int | None = None) -> Float[Array, "..."]:
    """A kernel that `fsdp` splits, gathered on each device where a mesh is set. Cast it to the compute type before.

    Without it, XLA turns each product along the split dimension into a ring of small products (on TPUs).

    Args:
      tensor_axis: the dimension that stays split by `tensor`, if any.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    if sizes.get("fsdp", 1) == 1:
        return kernel
    spec = [None] * kernel.ndim
    if tensor_axis is not None and kernel.shape[tensor_axis] % sizes["tensor"] == 0:
        spec[tensor_axis] = "tensor"
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec(*spec))


def gathered_dot_general(tensor_axis: int | None = None) -> Callable[..., jax.Array]:
    """`lax.dot_general` with `gather_kernel`, for Flax's Dense layers, which cast the kernel before."""

    def dot_general(x: jax.Array, kernel: jax.Array, *dimensions: Any, **options: Any) -> jax.Array:
        return jax.lax.dot_general(x, gather_kernel(kernel, tensor_axis), *dimensions, **options)

    return dot_general


A = TypeVar("A")
B = TypeVar("B")

COORDINATOR, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_GATHER_BYTES = 2**26  # of all processes together, in one collective


def connect() -> None:
    """Joins the processes of a run; to be called before anything else of JAX.

    On TPU pods and under Slurm, Open MPI and the like, JAX finds the others by itself. Elsewhere three environment
    variables must be set (the flag `--multihost` explains them). Raises `InputError` if they make no sense, or the
    processes do not find each other.
    """
    values = {name: os.environ[name] for name in (COORDINATOR, COUNT, NUMBER) if os.environ.get(name)}
    missing = [name for name in (COORDINATOR, COUNT, NUMBER) if name not in values]
    if values and missing:
        raise InputError(f"--multihost: {', '.join(values)} is set, but {missing[0]} is not; set all three, or none")
    arguments = ()
    if values:
        coordinator, count, number = values.values()
        if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
            raise InputError(f"--multihost: {NUMBER}={number} must be a number from 0 to {COUNT}={count} less 1")
        arguments = coordinator, int(count), int(number)
    try:
        jax.distributed.initialize(*arguments)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"--multihost: the processes do not find each other ({reason}); set {COORDINATOR}, {COUNT} and {NUMBER}"
        ) from error


def is_primary() -> bool:
    """Whether this is the first process, or the only one: it logs, and writes what is written once."""
    return jax.process_index() == 0


@contextlib.contextmanager
def primary_first(name: str) -> Iterator[None]:
    """Lets the first process go through the block before the others enter it, to write what they then read."""
    if not is_primary():
        multihost_utils.sync_global_devices(name)
    yield
    if is_primary():
        multihost_utils.sync_global_devices(name)


def all_gather(value: A) -> list[A]:
    """The values of all processes, in their order; all processes must call it.

    Values are pickled, so they may be texts, arrays or numbers. They come from the same program, and are trusted.
    """
    count = jax.process_count()
    if count == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = _gather_array(np.array([len(data)], np.int64).view(np.uint32)).view(np.int64)[:, 0]
    longest = int(lengths.max())
    # A power of two: every other size is another program to compile.
    piece = min(1 << (longest - 1).bit_length(), max(1, _GATHER_BYTES // count))
    parts = [data[first : first + piece] for first in range(0, longest, piece)]
    rows = np.concatenate([_gather_array(np.pad(part, (0, piece - len(part)))) for part in parts], axis=1)
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def _gather_array(array: np.ndarray) -> np.ndarray:
    """`[processes, ...]`."""
    return np.ascontiguousarray(multihost_utils.process_allgather(array), array.dtype)


def from_primary(make: Callable[[], A]) -> A:
    """The value that the first process makes, in all processes: made once, and the same to the bit."""
    return all_gather(make() if is_primary() else None)[0]


def distributed_map(function: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """`function` of each item, in their order, in all processes; each process computes its share."""
    count = jax.process_count()
    shares = all_gather([function(item) for item in items[jax.process_index() :: count]])
    return [shares[place % count][place // count] for place in range(len(items))]


class Neighbours(NamedTuple):
    """How many processes of a run, this one included, share its machine, and how many share its cores."""

    host: int = 1
    cores: int = 1


def neighbours() -> Neighbours:
    """Counts the processes of this run on this machine; all processes must call it."""
    if jax.process_count() == 1:
        return Neighbours()
    try:
        host = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        host = socket.gethostname()  # second best: containers have names of their own, and names repeat
    # Processes that are bound to different cores of one machine have no core in common.
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    every = all_gather((host, cores))
    return Neighbours(sum(other == host for other, _ in every), every.count((host, cores)))


def local_mesh(mesh: Mesh) -> Mesh:
    """A mesh of this process's own devices, on which it evaluates its share; the run's own if it is the only one."""
    if jax.process_count() == 1:
        return mesh
    devices = np.array(jax.local_devices()).reshape(1, -1, 1)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def copy_to_local_mesh(parameters: Any, mesh: Mesh) -> Any:
    """Copies parameters that span all processes to each one's `local_mesh`.

    The copies go from device to device, one array after the other: the host's memory holds none of them, and a device
    holds one array whole at a time, beside its part of the others.
    """
    if jax.process_count() == 1:
        return parameters
    places = shardings(parameters, mesh)
    return jax.tree.map(lambda array, place: _copy_to_local_devices(array, mesh, place), parameters, places)


def _copy_to_local_devices(array: jax.Array, mesh: Mesh, place: NamedSharding) -> jax.Array:
    everywhere = array.sharding.update(spec=PartitionSpec())
    with jax.set_mesh(everywhere.mesh):
        whole = jax.jit(jnp.copy, out_shardings=everywhere)(array)
    copies = {copy.device: copy.data for copy in whole.addressable_shards}
    local = jax.make_array_from_single_device_arrays(
        array.shape, replicated(mesh), [copies[device] for device in mesh.devices.flat]
    )
    return jax.device_put(local, place)
