"""What indexing and searching ask of a model; `predictor.Predictor` is one."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float


class Frames(Protocol):
    """How the model looks at a clip: `num_frames` frames, squares of `size` pixels."""

    num_frames: int
    size: int


@runtime_checkable
class Embedder(Protocol):
    """Clips and texts become unit vectors of one space.

    Attributes:
      fingerprint: the same for two embedders only where they embed alike: parameters, tokenizer, frames.
      frames: what a clip is decoded to.
    """

    fingerprint: str
    frames: Frames

    def embed_videos(self, videos: Sequence[Any]) -> Float[np.ndarray, "V E"]:
        """Embeds videos: paths, or decoded clips, uint8 `[T, S, S, 3]`. Raises InputError where one cannot be read."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "C E"]:
        """Embeds texts."""
        ...
