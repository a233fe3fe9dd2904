"""Speed on a device: its peak rate, a trace of training steps, the compilation cache, the memory allocator."""

import contextlib
import ctypes
import hashlib
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

# Dense bfloat16 products with float32 sums, in FLOP/s for a device as JAX counts devices, by a part of the device's
# kind; the first that matches counts. Sources: the vendors' data sheets (NVIDIA's without sparsity). A device of TPU v2
# and v3 is a core, half of the chip that the data sheet describes.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("H200", 989e12),  # and GH200
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


class StepCost(NamedTuple):
    """What one step computes: clips of its batch, frames of all clips, and model FLOPs (`models.flops.step_flops`); and
    the peak of all devices together, in FLOP/s (None: unknown)."""

    clips: int
    frames: int
    flops: float
    peak: float | None


def peak_flops(devices: Sequence[Any]) -> float | None:
    """FLOP/s of all devices together; None if the table lacks their kind (as it lacks CPUs)."""
    kind = devices[0].device_kind
    peak = next((rate for name, rate in PEAK_FLOPS if name.lower() in kind.lower()), None)
    return None if peak is None else peak * len(devices)


# Options of glibc's mallopt (malloc.h), and their values.
_MALLOPT = {
    -4: 0,  # M_MMAP_MAX: no block gets a mapping of its own, which would be undone when it is freed
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: bytes at the heap's end that are kept
    -8: 1,  # M_ARENA_MAX: one heap for all threads
}


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory for training on CPU, and returns whether it could.

    On CPU, XLA allocates its temporary buffers anew at each step. By default glibc hands large blocks back to the
    kernel, which clears every page again at the next step: a tenth of the time of a training step of the demo.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return min(mallopt(option, value) for option, value in _MALLOPT.items()) == 1  # 0 is a failure


def keep_compiled_programs() -> pathlib.Path | None:
    """Turns on JAX's persistent compilation cache, in the user's cache directory, so that a run that is started again
    begins at once; returns its folder, or None if there is no cache.

    If `JAX_COMPILATION_CACHE_DIR` is set, nothing changes: JAX reads it, and an empty value turns the cache off.
    Programs for a CPU use its instruction set, so each kind of CPU has a folder of its own, for home directories that
    machines share. The least recently used programs are removed when there are more than 4 GiB of them.
    """
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if chosen is not None:
        return pathlib.Path(chosen) if chosen else None
    cpu = pathlib.Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    features = sorted({line for line in lines if line.split(":")[0].strip() in ("flags", "Features", "model name")})
    kind = hashlib.sha256("\n".join(features).encode()).hexdigest()[:8]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "vlab_jax" / f"compiled-{kind}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # a home that cannot be written to: programs are compiled anew each time
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", 4 * 2**30)
    return folder


class StepTrace(contextlib.AbstractContextManager):
    """Records a trace of some steps from `first` on (counted from 1), after those that compile.

    Args:
      folder: where the trace goes, for TensorBoard's profiler or Perfetto; None: no trace is made.
    """

    def __init__(self, folder: pathlib.Path | None, first: int = 6, steps: int = 5) -> None:
        self._folder, self._first, self._last, self._step = folder, first, first + steps, 0
        self._running = False

    def next_step(self) -> None:
        """To be called before each step."""
        self._step += 1
        if self._step == self._first and self._folder is not None:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._step == self._last:
            self.close()

    def close(self) -> None:
        """Writes the trace, if one was begun; a second call does nothing."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            logging.info("a trace of the steps is in %s", self._folder)

    def __exit__(self, *_: object) -> None:
        self.close()
