"""Video–text models built on CLIP, in JAX: to train, to evaluate, and to use on your own videos.

from vlab_jax import Predictor
print(Predictor.load("my_vlab").caption("clip.mp4"))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlab_jax.inference.clips import Clip
    from vlab_jax.inference.predictor import Predictor

__all__ = ["Clip", "Predictor"]

_MODULES = {"Clip": "vlab_jax.inference.clips", "Predictor": "vlab_jax.inference.predictor"}


def __getattr__(name: str) -> Any:
    # Imported on first use: JAX takes seconds, and the command lines import this package, too.
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
