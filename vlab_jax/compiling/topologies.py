"""Machines that are not here, by name: their devices, to compile for, and what these have.

`v5e:2x4`, `v5p:2x2x2` and `v6e:2x4` are tori of TPUs, counted in chips; `h200`, `h100:8`, `h100:2x8` and `a100:8` are
NVIDIA GPUs: so many, or hosts by GPUs of each.

libtpu compiles for a TPU, and JAX's plugin for CUDA for a GPU, without the device. Both look at the environment when
JAX starts, so `environment` comes before JAX is imported, and this module imports it where it is used alone.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any
from unittest import mock

from vlab_jax.errors import InputError

# FOLDED vlab_jax/compiling/topologies.py: Lowering for an NVIDIA GPU that is not there.
# `jit(f).trace(...).lower(lowering_platforms=("cuda",))` runs on any machine, but cuDNN's attention
# (`jax.nn.dot_product_attention(..., implementation="cudnn")`) decides while it is traced whether it takes what it
# is given, and asks a device for that: which cuDNN is installed, and which compute capability the first GPU has.
# Without a GPU the first question raises "cuDNN is not detected", and the second one is answered as if the GPU were
# an old one. JAX has no argument to say otherwise, so the three functions that ask are replaced, in the module that
# calls them.

# Of jax 0.10 and 0.11; the functions that ask a device.
FRONT_END = "jax._src.cudnn.fused_attention_stablehlo"


@contextlib.contextmanager
def cudnn_answers(version: int = 91000, capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Within it, cuDNN's attention is traced for a GPU that is not there, and refuses what it would refuse on it.

    Nothing can be run within it; it holds for the whole process, not for one thread. What `jit` has traced before for
    the same shapes is not traced again.

    Args:
      version: of cuDNN, as it gives it itself: 91000 is 9.10.0.
      capability: of the GPU: (9, 0) are H100 and H200, (8, 0) is A100, (10, 0) is B200.

    Raises:
      AttributeError: the installed JAX asks by functions of other names.
    """

    def at_least(asked: str) -> bool:
        return capability >= _numbers(asked)

    def equal(asked: str) -> bool:
        return capability == _numbers(asked)

    with mock.patch.multiple(
        import_module(FRONT_END),
        check_cudnn_version=lambda: version,
        check_compute_capability=at_least,
        is_cuda_compute_capability_equal=equal,
    ):
        yield


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a device has.

    Attributes:
      memory: bytes of it that a program can use at most; of a TPU, what its compiler says it allots to.
      bandwidth: bytes a second that go to and from the memory.
      ring: of a TPU, bytes a second that it sends where chips in a row pass them on both ways.
      clock: cycles a second by which the TPU compiler's estimates become seconds; 0: it makes none.
      sides: how many sides a torus of them has; 0: a GPU.
      target: of a GPU, what its compiler is told.
    """

    memory: float
    bandwidth: float
    ring: float = 0.0
    clock: float = 0.0
    sides: int = 0
    target: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)


def _gpu(name: str, capability: int, gibibytes: float, bandwidth: float, **fields: Any) -> Chip:
    """A GPU of compute capability `capability`.0; its fields as XLA's `GpuDeviceInfoProto` has them."""
    memory = int(gibibytes * GIB)
    about = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "threads_per_core_limit": 2048,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "memory_bandwidth": int(bandwidth),
        "device_memory_size": memory,
        "cuda_compute_capability": {"major": capability},
        **fields,
    }
    return Chip(float(memory), bandwidth, target={"name": name, "capability": (capability, 0), "about": about})


_HOPPER = {
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "l2_cache_size": 50 * 2**20,
    "shared_memory_per_core": 228 * 1024,
    "shared_memory_per_block_optin": 227 * 1024,
}
_AMPERE = {
    "core_count": 108,
    "fpus_per_core": 64,
    "clock_rate_ghz": 1.41,
    "l2_cache_size": 40 * 2**20,
    "shared_memory_per_core": 164 * 1024,
    "shared_memory_per_block_optin": 163 * 1024,
}

# TPUs: memory as libtpu names it where a program does not fit; bandwidth by Google's pages on each system (`ring` is
# two of a v5e's 4 links of 1,600 Gbit/s together, of a v5p's 6 of 4,800, of a v6e's 4 of 3,584); the clock that gives
# the peak of `chips.PEAK_FLOPS`. GPUs, all SXM: data sheets and CUDA's tuning guides; memory as the driver gives it to
# a program, of 141 GB and 80 GB.
CHIPS: dict[str, Chip] = {
    "v5e": Chip(15.75 * GIB, 819e9, 100e9, clock=1.5e9, sides=2),
    "v5p": Chip(95.74 * GIB, 2765e9, 200e9, clock=1.75e9, sides=3),
    "v6e": Chip(31.25 * GIB, 1640e9, 224e9, clock=1.75e9, sides=2),
    "h200": _gpu("NVIDIA H200", 9, 139.8, 4.8e12, **_HOPPER),
    "h100": _gpu("NVIDIA H100 80GB HBM3", 9, 79.1, 3.35e12, **_HOPPER),
    "a100": _gpu("NVIDIA A100-SXM4-80GB", 8, 79.1, 2.04e12, **_AMPERE),
}

# JAX takes this share of a GPU's memory at once, and a program has no more; the rest is for CUDA's and cuDNN's own.
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
DEFAULT_FRACTION = 0.75

TPU_EXTRA = (
    "compiling for a TPU needs libtpu (and no TPU): pip install -e '.[compile-tpu]' in an environment of its own, or "
    "say where it lies, as in TPU_LIBRARY_PATH=<folder>/libtpu/libtpu.so"
)
GPU_EXTRA = (
    "compiling for an NVIDIA GPU needs JAX's plugin for CUDA 13 (and no GPU): pip install -e '.[compile-gpu]' in an "
    "environment of its own"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine: `kind` is a key of `CHIPS`; `shape` its chips along each side, of GPUs (hosts, GPUs of each)."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """What each of its devices has."""
        return CHIPS[self.kind]

    @property
    def platform(self) -> str:
        """As JAX calls it."""
        return "tpu" if self.chip.sides else "cuda"

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability of its GPUs; zeros: they are none."""
        return self.chip.target.get("capability", (0, 0))

    @property
    def count(self) -> int:
        """Its devices."""
        return math.prod(self.shape)

    @property
    def memory(self) -> float:
        """Bytes that a program can have on a device."""
        if self.platform == "tpu":
            return self.chip.memory
        return self.chip.memory * _fraction()


def parse(name: str) -> Topology:
    """The topology of a name as `v5p:2x2x2`, `h200` or `h100:2x8`.

    Raises:
      InputError: there is no such kind, or it has no such shape.
    """
    kind, colon, sizes = name.partition(":")
    if kind not in CHIPS:
        raise InputError(f"--topology={name}: there is no {kind!r}; known are {', '.join(CHIPS)}")
    sides = CHIPS[kind].sides
    example = f"{kind}:{'x'.join(['2'] * sides)}" if sides else f"{kind}, {kind}:8 or {kind}:2x8 (hosts x GPUs)"
    wrong = InputError(f"--topology={name} is not a number of chips along each side, as in {example}")
    if not colon:
        if sides:
            raise wrong
        return Topology(name, kind, (1, 1))
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise wrong
    shape = tuple(map(int, sizes.split("x")))
    if not sides:
        if len(shape) > 2:
            raise wrong
        return Topology(name, kind, shape if len(shape) == 2 else (1, *shape))
    if len(shape) != sides:
        raise InputError(
            f"--topology={name} has {len(shape)} sides; chips of {kind} lie along {sides}, as in {example}"
        )
    if math.prod(shape) > 1 and any(side % 2 for side in shape[:2]):
        raise InputError(
            f"--topology={name}: a host has 2x2 chips of {kind}, so the first two sides must be even; a single chip is "
            f"{kind}:{'x'.join(['1'] * sides)}"
        )
    return Topology(name, kind, shape)


def environment(topology: Topology) -> dict[str, str]:
    """The variables that JAX, libtpu and XLA read when they start; what is set already is kept, and added to.

    Raises:
      InputError: what compiles for it is not installed; how to get it.
    """
    variables = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3")}
    if topology.platform == "cuda":
        if not all(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_plugins"))):
            raise InputError(GPU_EXTRA)
        # Both would try candidates on the device.
        flags = "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"
        return variables | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    library = pathlib.Path(os.environ.get("TPU_LIBRARY_PATH", ""))
    if not library.is_file():
        if library != pathlib.Path():
            raise InputError(f"TPU_LIBRARY_PATH={library} is no file; it must name libtpu.so")
        found = importlib.util.find_spec("libtpu")
        if found is None:
            raise InputError(TPU_EXTRA)
        library = pathlib.Path(found.submodule_search_locations[0]) / "libtpu.so"
    # libtpu asks which machine it is on, and says so where none answers; any name of one will do.
    alone = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    several = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    quiet = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
    given = {name: os.environ.get(name, value) for name, value in (alone | several | quiet).items()}
    return variables | given | {"TPU_LIBRARY_PATH": str(library)}


def devices(topology: Topology) -> list[Any]:
    """Its devices, which can be compiled for, and nothing else.

    Raises:
      InputError: the compiler knows no such topology.
    """
    import jax
    from jax.experimental import topologies

    try:
        if topology.platform == "tpu":
            host = {"chips_per_host_bounds": (1, 1, 1)} if topology.count == 1 else {}
            found = topologies.get_topology_desc(topology.name, platform="tpu", **host).devices
        else:
            hosts, each = topology.shape
            found = topologies.get_topology_desc(
                topology.kind, platform="cuda", target_config=target_config(topology), topology=f"1x{hosts}x{each}"
            ).devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--topology={topology.name}: {' '.join(str(error).split())}") from error
    if len(found) != topology.count:
        raise InputError(
            f"--topology={topology.name} has {len(found)} devices as JAX counts them, not {topology.count}"
        )
    return list(found)


def target_config(topology: Topology) -> str:
    """What XLA's compiler for GPUs is told of a device: the text of a `GpuTargetConfigProto`."""
    target = topology.chip.target
    cudnn = _fields({"major": 9, "minor": 10, "patch": 0})
    return "\n".join(
        [
            f"gpu_device_info {{ {_fields(target['about'])} }}",
            'platform_name: "CUDA"',
            f"dnn_version_info {{ {cudnn} }}",
            f'device_description_str: "{target["name"]}"',
        ]
    )


def _fields(values: Mapping[str, Any]) -> str:
    return " ".join(
        f"{name} {{ {_fields(value)} }}" if isinstance(value, Mapping) else f"{name}: {value}"
        for name, value in values.items()
    )


def _fraction() -> float:
    try:
        return float(os.environ.get(FRACTION, DEFAULT_FRACTION))
    except ValueError as error:
        raise InputError(f"{FRACTION}={os.environ[FRACTION]} is no number") from error
