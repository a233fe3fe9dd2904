"""A trace of some training steps, to see where their time goes."""

import ctypes
import hashlib
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

# FOLDED vlab_jax/runtime/profiling.py: What accelerators can do at most: the peak rates that utilisation is measured
# against.

# Dense bfloat16 products with float32 sums, in FLOP/s a device as JAX counts devices, by a part of the device's kind;
# the first that is found counts. Sources: the vendors' data sheets (NVIDIA's without sparsity). A device of TPU v2 and
# v3 is a core, half of the chip that the data sheet is of.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("V100", 125e12),  # float16; it has no bfloat16
    ("T4", 65e12),  # float16
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("TPU7x", 2307e12),
    ("TPU v6", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4 lite", 138e12),
    ("TPU v4", 275e12),
    ("TPU v3", 61.5e12),
    ("TPU v2", 22.5e12),
)


def peak_flops(devices: Sequence[Any]) -> float | None:
    """FLOP/s of all devices together; None where the table has not their kind (CPUs among them)."""
    kind = devices[0].device_kind
    peak = next((rate for name, rate in PEAK_FLOPS if name.lower() in kind.lower()), None)
    return None if peak is None else peak * len(devices)


# FOLDED vlab_jax/runtime/profiling.py: How the C library treats memory that was freed, while training on CPU.

# Options of glibc's mallopt (malloc.h), and what they are set to.
_OPTIONS = {
    -4: 0,  # M_MMAP_MAX: no block gets a mapping of its own, which would be undone when it is freed
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: bytes at the heap's end that are kept
    -8: 1,  # M_ARENA_MAX: one heap for all threads
}


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed, and returns whether it could.

    XLA allocates its temporary buffers anew at each step on CPU. By default glibc hands large blocks back to the
    kernel, which clears every page again at the next step: half of the system time of a training step of the demo,
    a tenth of its whole. Elsewhere than on glibc nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        logging.debug("the C library has no mallopt; freed memory goes back to the kernel")
        return False
    taken = [mallopt(option, value) == 1 for option, value in _OPTIONS.items()]
    return all(taken)


# FOLDED vlab_jax/runtime/profiling.py: What XLA has compiled is kept on disk, so that a run that is started
# again begins at once.

# JAX's own variable says another place.
VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_MOST_BYTES = 4 * 2**30


def keep_compiled_programs() -> pathlib.Path | None:
    """Turns JAX's persistent compilation cache on, in the user's cache directory; its place, None where there is none.

    With `JAX_COMPILATION_CACHE_DIR` set, nothing is changed: JAX reads it, and an empty value turns the cache off.
    Programs for a CPU use the instructions that it has, so each kind of CPU has a folder of its own, for home
    directories that machines share. The programs that were used least go when there are more than 4 GiB of them.
    """
    if VARIABLE in os.environ:
        return pathlib.Path(os.environ[VARIABLE]) if os.environ[VARIABLE] else None
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = pathlib.Path(cache).expanduser() / "vlab_jax" / f"compiled-{_cpu()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # a home that cannot be written to: compiled anew each time
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    return folder


def _cpu() -> str:
    """Eight digits that tell CPUs apart by what they can do, where the system says so."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = sorted({line for line in lines if line.split(":")[0].strip() in ("flags", "Features", "model name")})
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:8]


class StepTrace:
    """Records a few steps once the first ones, which compile, are over.

    Args:
      folder: where the trace goes, for TensorBoard's profiler or Perfetto; None: none is made.
      first: the step (of those seen, from 1) before which it begins.
      steps: how many steps it holds.
    """

    def __init__(self, folder: pathlib.Path | None, first: int = 6, steps: int = 5) -> None:
        self._folder, self._first, self._last, self._seen = folder, first, first + steps, 0
        self._running = False

    def next_step(self) -> None:
        """To be called before each step."""
        self._seen += 1
        if self._folder is None:
            return
        if self._seen == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._seen == self._last:
            self.close()

    def close(self) -> None:
        """Writes the trace, if one was begun; a second call does nothing."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            logging.info("a trace of the steps is in %s", self._folder)

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
