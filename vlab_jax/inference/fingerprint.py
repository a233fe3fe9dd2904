"""What tells models apart that embed differently: a digest of all that an embedding depends on."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict

from vlab_jax.inference.clip import FrameShape
from vlab_jax.inference.trained import Trained

# Fields of a model that say how it is computed, or are of the decoder, which embeds nothing.
_OTHERS = ("decoder", "remat", "unroll", "dtype", "platform", "attention", "parent", "name")
# Fields that came later count where they are not at their default, so that indexes of before stay what they are.
_LATER = {"frame_pooling": "mean_then_normalise"}


def fingerprint(trained: Trained, frames: FrameShape, image_frames: Sequence[int]) -> str:
    """32 hexadecimal digits, the same for a run's checkpoint and for its export."""
    digest = hashlib.blake2b(digest_size=16)
    counted = {key: value for key, value in vars(trained.model).items() if key[0] != "_" and key not in _OTHERS}
    model = {key: value for key, value in counted.items() if _LATER.get(key, ()) != value}
    fields = {key: unfreeze(value) if hasattr(value, "items") else value for key, value in model.items()}
    told = [fields, frames.num_frames, frames.size, list(image_frames), list(trained.streams)]
    digest.update(json.dumps(told, sort_keys=True, default=list).encode())
    digest.update(trained.tokenizer.backend.to_str().encode())
    parameters = {part: leaves for part, leaves in trained.parameters.items() if part != "decoder"}
    for path, leaf in sorted(flatten_dict(parameters, sep="/").items()):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()
