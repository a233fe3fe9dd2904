"""XLA's options for the tests, which compile much and compute little, on eight fake devices of a few cores."""

import importlib.metadata

_VERSION = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])

# Compiles within a third of the time.
QUICK: dict[str, bool | int] = {"xla_backend_optimization_level": 0}
if _VERSION < (0, 11):  # later versions have no such option, and stop at one that they do not know
    QUICK["xla_cpu_use_fusion_emitters"] = False

FLAGS = [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]
if _VERSION < (0, 11):
    # The order of a program's operations that needs the least memory. By the usual one, the devices came to different
    # collective operations with `fsdp` and waited for each other without end, in five of eight processes.
    FLAGS.append("--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED")
