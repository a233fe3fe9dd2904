"""What the model tells the compiler of arrays on a mesh: rows stay where they are, kernels are sent around whole."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

# The axes of a mesh that split a batch, and those that split parameters (`runtime.sharding`).
BATCH_AXES = ("data", "fsdp")
GATHERED_AXIS, TENSOR_AXIS = "fsdp", "tensor"


def split_by_batch(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """The same rows, with a word to the compiler where a mesh is set: each device keeps its own.

    Without it, devices that hold a part of each kernel multiply all rows with their parts, and add up the results of
    all rows. Kernels are smaller than a batch's activations: they are what is to be sent around.
    """
    devices = batch_devices()
    if devices == 1 or x.shape[0] % devices:
        return x
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *rest))


def batch_devices() -> int:
    """How many devices share a batch: by the mesh that is set, or 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES if axis in mesh.axis_names)


def gathered(kernel: Float[Array, "..."], tensor_axis: int | None = None) -> Float[Array, "..."]:
    """A kernel that `fsdp` splits, whole on each device, where a mesh is set: to be called in the compute type.

    Without it, XLA makes a ring of small products of each product along the split dimension (on TPUs).

    Args:
      tensor_axis: the dimension that `tensor` goes on splitting; None: none.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get(GATHERED_AXIS, 1) == 1:
        return kernel
    spec = [None] * kernel.ndim
    if tensor_axis is not None and kernel.shape[tensor_axis] % mesh.shape[TENSOR_AXIS] == 0:
        spec[tensor_axis] = TENSOR_AXIS
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec(*spec))


def whole_product(tensor_axis: int | None = None) -> Callable[..., jax.Array]:
    """`lax.dot_general` with the `gathered` kernel, for Flax's Dense layers, which cast the kernel first."""

    def dot_general(x: jax.Array, kernel: jax.Array, *dimensions: Any, **options: Any) -> jax.Array:
        return jax.lax.dot_general(x, gathered(kernel, tensor_axis), *dimensions, **options)

    return dot_general
