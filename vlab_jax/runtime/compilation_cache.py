"""What XLA has compiled is kept on disk, so that a run that is started again begins at once."""

import hashlib
import os
import pathlib

import jax

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
