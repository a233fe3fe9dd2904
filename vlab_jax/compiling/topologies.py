"""Machines that are not here, by name: their devices, to compile for, and their properties.

`v5e:2x4`, `v5p:2x2x2` and `v6e:2x4` are tori of TPUs, counted in chips; `h200`, `h100:8`, `h100:2x8` and `a100:8` are
NVIDIA GPUs: a number of them, or hosts by GPUs per host.

libtpu compiles for a TPU, and JAX's plugin for CUDA for a GPU, without the device. Both read the environment when JAX
starts, so the variables of `environment` must be set before JAX is imported, and this module imports JAX in functions.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any
from unittest import mock

from vlab_jax.errors import InputError

# The module of jax 0.10 and 0.11 whose functions ask a device for its properties.
CUDNN_MODULE = "jax._src.cudnn.fused_attention_stablehlo"

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The properties of a device."""

    memory: float  # bytes that a program can use at most; for a TPU, the limit of its compiler
    bandwidth: float  # bytes per second to and from the memory
    # Of a TPU: bytes per second that it sends in a ring in both directions; cycles per second, to convert the estimates
    # of its compiler; and the number of dimensions of a torus of these chips.
    ring: float = 0.0
    clock: float = 0.0
    sides: int = 0
    # Of a GPU: its compute capability, its name in JAX, and the text of the `GpuTargetConfigProto` that describes it to
    # XLA's compiler.
    capability: tuple[int, int] = (0, 0)
    name: str = ""
    target: str = ""


_HOPPER = (
    "core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800 shared_memory_per_core: 233472 "
    "shared_memory_per_block_optin: 232448"
)
_AMPERE = (
    "core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41 l2_cache_size: 41943040 shared_memory_per_core: 167936 "
    "shared_memory_per_block_optin: 166912"
)
_NVIDIA = (
    "threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 threads_per_core_limit: 2048 "
    "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 registers_per_core_limit: 65536 "
    "registers_per_block_limit: 65536"
)


def _gpu(name: str, capability: int, gibibytes: float, bandwidth: float, properties: str) -> Chip:
    """A GPU of compute capability `capability`.0, with fields of XLA's `GpuDeviceInfoProto` as text."""
    memory = int(gibibytes * GIB)
    own = f"memory_bandwidth: {int(bandwidth)} device_memory_size: {memory} "
    own += f"cuda_compute_capability {{ major: {capability} }}"
    target = (
        f'gpu_device_info {{ {_NVIDIA} {own} {properties} }} platform_name: "CUDA" '
        f'dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}"'
    )
    return Chip(float(memory), bandwidth, capability=(capability, 0), name=name, target=target)


# TPUs: memory from libtpu's message where a program does not fit; bandwidth from Google's page on each system (`ring`
# is the sum of two links: of a v5e's 4 of 1,600 Gbit/s together, of a v5p's 6 of 4,800, of a v6e's 4 of 3,584); the
# clock that gives the peak of `runtime.profiling.PEAK_FLOPS`. GPUs, all SXM: data sheets and CUDA's tuning guides;
# memory that the driver leaves to a program, of 141 GB and 80 GB.
CHIPS: dict[str, Chip] = {
    "v5e": Chip(15.75 * GIB, 819e9, 100e9, clock=1.5e9, sides=2),
    "v5p": Chip(95.74 * GIB, 2765e9, 200e9, clock=1.75e9, sides=3),
    "v6e": Chip(31.25 * GIB, 1640e9, 224e9, clock=1.75e9, sides=2),
    "h200": _gpu("NVIDIA H200", 9, 139.8, 4.8e12, _HOPPER),
    "h100": _gpu("NVIDIA H100 80GB HBM3", 9, 79.1, 3.35e12, _HOPPER),
    "a100": _gpu("NVIDIA A100-SXM4-80GB", 8, 79.1, 2.04e12, _AMPERE),
}

# The share of a GPU's memory that JAX allocates for programs; the rest is for CUDA and cuDNN themselves.
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine: `shape` has its chips along each side, or (hosts, GPUs per host)."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def platform(self) -> str:
        """The platform's name in JAX."""
        return "tpu" if self.chip.sides else "cuda"

    @property
    def count(self) -> int:
        """The number of devices."""
        return math.prod(self.shape)

    @property
    def memory(self) -> float:
        """Bytes that a program can use on a device."""
        if self.platform == "tpu":
            return self.chip.memory
        value = os.environ.get(FRACTION, "0.75")
        try:
            return self.chip.memory * float(value)
        except ValueError as error:
            raise InputError(f"{FRACTION}={value} is not a number") from error


def parse(name: str) -> Topology:
    """The topology with a name such as `v5p:2x2x2`, `h200` or `h100:2x8`; raises `InputError` if there is none."""
    kind, _, sizes = name.partition(":")
    if kind not in CHIPS:
        raise InputError(f"--topology={name}: there is no {kind!r}; known chips are {', '.join(CHIPS)}")
    chip = CHIPS[kind]
    sides = chip.sides
    example = f"{kind}:{'x'.join(['2'] * sides)}" if sides else f"{kind}, {kind}:8 or {kind}:2x8 (hosts x GPUs)"
    shape = tuple(map(int, sizes.split("x"))) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) else ()
    if name == kind and not sides:
        shape = (1,)
    if not shape or (not sides and len(shape) > 2):
        raise InputError(f"--topology={name} is not a number of chips along each side, as in {example}")
    if not sides:
        return Topology(name, chip, (1, *shape)[-2:])
    if len(shape) != sides:
        raise InputError(
            f"--topology={name} has {len(shape)} sides; chips of {kind} lie along {sides}, as in {example}"
        )
    if math.prod(shape) > 1 and any(side % 2 for side in shape[:2]):
        raise InputError(
            f"--topology={name}: a host has 2x2 chips of {kind}, so the first two sides must be even; a single chip is "
            f"{kind}:{'x'.join(['1'] * sides)}"
        )
    return Topology(name, chip, shape)


def environment(topology: Topology) -> dict[str, str]:
    """The variables that JAX, libtpu and XLA read when they start; values that are set already are kept or extended.
    Raises `InputError`, with how to install it, if the compiler is not there."""
    variables = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3")}
    if topology.platform == "cuda":
        if not all(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_plugins"))):
            raise InputError(
                "compiling for an NVIDIA GPU needs JAX's plugin for CUDA 13 (and no GPU): pip install -e "
                "'.[compile-gpu]' in an environment of its own"
            )
        # Triton and the autotuner would run candidates on the device.
        flags = "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"
        return variables | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    library = pathlib.Path(os.environ.get("TPU_LIBRARY_PATH", ""))
    if not library.is_file():
        if library != pathlib.Path():
            raise InputError(f"TPU_LIBRARY_PATH={library} is not a file; it must be the path of libtpu.so")
        found = importlib.util.find_spec("libtpu")
        if found is None:
            raise InputError(
                "compiling for a TPU needs libtpu (and no TPU): pip install -e '.[compile-tpu]' in an environment of "
                "its own, or set its path, as in TPU_LIBRARY_PATH=<folder>/libtpu/libtpu.so"
            )
        library = pathlib.Path(found.submodule_search_locations[0]) / "libtpu.so"
    defaults = {
        # libtpu queries the machine's type and warns if there is no answer; any type will do.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    variables |= {name: os.environ.get(name, value) for name, value in defaults.items()}
    return variables | {"TPU_LIBRARY_PATH": str(library)}


def devices(topology: Topology) -> list[Any]:
    """The devices of a topology, which can be compiled for but not used; raises `InputError` if the compiler does not
    know it."""
    import jax
    from jax.experimental import topologies

    try:
        if topology.platform == "tpu":
            host = {"chips_per_host_bounds": (1, 1, 1)} if topology.count == 1 else {}
            description = topologies.get_topology_desc(topology.name, platform="tpu", **host)
        else:
            kind, size = topology.name.partition(":")[0], "1x{}x{}".format(*topology.shape)
            description = topologies.get_topology_desc(
                kind, platform="cuda", target_config=topology.chip.target, topology=size
            )
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--topology={topology.name}: {' '.join(str(error).split())}") from error
    if len(description.devices) != topology.count:
        raise InputError(f"--topology={topology.name} has {len(description.devices)} devices in JAX")
    return list(description.devices)


@contextlib.contextmanager
def mock_cudnn(version: int = 91000, capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Lets programs with cuDNN's attention be lowered for an NVIDIA GPU on a machine without one.

    While `jax.nn.dot_product_attention(..., implementation="cudnn")` is traced, it asks a device for the version of
    cuDNN and for its compute capability; JAX has no argument for them, so this replaces the three functions that ask.
    cuDNN's attention then refuses exactly what it would refuse on that GPU.

    It applies to the whole process, not to one thread, and not to functions that `jit` has traced before. Programs
    cannot be run within it. A version of 91000 is cuDNN 9.10.0; H100 and H200 have the capability (9, 0).
    """

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split("."))

    with mock.patch.multiple(
        import_module(CUDNN_MODULE),
        check_cudnn_version=lambda: version,
        check_compute_capability=lambda least: capability >= numbers(least),
        is_cuda_compute_capability_equal=lambda exact: capability == numbers(exact),
    ):
        yield
