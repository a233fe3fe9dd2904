"""The mesh of devices, and what lies where on it.

Axes: `data` (the batch is split, parameters are copied), `fsdp` (the batch and the parameters are split) and `tensor`
(the parameters are split along heads and MLP width).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
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
