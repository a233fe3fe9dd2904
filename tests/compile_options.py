"""XLA's options for compiling within a third of the time: tests compile much and compute little."""

import importlib.metadata

_VERSION = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])

QUICK: dict[str, bool | int] = {"xla_backend_optimization_level": 0}
if _VERSION < (0, 11):  # later versions have no such option, and stop at one that they do not know
    QUICK["xla_cpu_use_fusion_emitters"] = False

FLAGS = [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]
