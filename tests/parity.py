"""Compares this package's outputs with those of a reference whose saved weights it loads.

    python tests/parity.py

prints the table of `docs/pretrained.md`; without PyTorch, from the references in VLAB_REFERENCE_OUTPUTS.
"""

import argparse
import pathlib
import sys
import tempfile
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from reference_models import CASES, Reference, cached_reference
from tiny_models import largest_difference, with_block_states

from vlab_jax.models.towers import TextTower, VisionTower
from vlab_jax.models.vlab import VLAB, parameter_shapes, unit_length
from vlab_jax.pretrained.load import Pretrained, load_parameters, open_checkpoint

# The parts of a VLAB that a CLIP lacks, as small as possible.
ADAPTER = {"blocks": (), "before_mlp": False, "width": 8, "mixer": "conv", "kernel": (3, 1, 1), "heads": 2}
DECODER = {"blending": "none", "cross_attention_every": 1}


def fields_of(pretrained: Pretrained, **changes: dict[str, Any]) -> dict[str, Any]:
    """The fields of a VLAB for a checkpoint; `changes` updates `vision` and `text`."""
    architecture = pretrained.architecture
    vision = {**architecture.vision, **changes.get("vision", {})}
    text = {**architecture.text, **changes.get("text", {})}
    return {"vision": vision, "text": text, "adapter": ADAPTER, "decoder": DECODER, "frames": 1}


def loaded(path: pathlib.Path | str, **changes: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The fields of the towers of a saved reference, and its parameters as this package has them."""
    pretrained = open_checkpoint(str(path))
    fields = fields_of(pretrained, **changes)
    shapes = parameter_shapes(VLAB.from_fields(fields), 1)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    parameters, _ = load_parameters(pretrained, shapes, jax.tree.map(lambda _: place, shapes))
    return fields, parameters


def computed(fields: dict[str, Any], parameters: Any, reference: Reference) -> dict[str, np.ndarray]:
    """The outputs of the towers for a reference's inputs, with the names of its outputs."""
    with jax.default_matmul_precision("highest"):
        vision, text = VisionTower(**fields["vision"]), TextTower(**fields["text"])
        (_, seen), vision_blocks = with_block_states(vision, parameters["vision"], jnp.asarray(reference.images))
        texts = jnp.asarray(reference.tokens), jnp.asarray(reference.lengths)
        (states, read), text_blocks = with_block_states(text, parameters["text"], *texts)
        logits = jnp.exp(parameters["logit_scale"]) * unit_length(read) @ unit_length(seen).T
    outputs = {
        "vision blocks": vision_blocks,
        "text blocks": text_blocks,
        "image features": seen,
        "token states": states,
        "text features": read,
        "logits": logits,
    }
    return {name: np.asarray(value) for name, value in outputs.items()}


def differences(ours: dict[str, np.ndarray], reference: Reference) -> dict[str, float]:
    """The largest absolute difference of each output; of the blocks, that of the worst block."""
    return {name: largest_difference(ours[name], theirs) for name, theirs in reference.outputs.items()}


def main() -> None:
    """Prints a Markdown table of the differences, one line for each reference."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    names: list[str] = []
    for case, make in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            saved = cached_reference(case, make, pathlib.Path(folder))
            found = differences(computed(*loaded(saved.path), saved), saved)
        if not names:
            names = list(found)
            print("| reference | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
        print(f"| {case} | " + " | ".join(f"{found[name]:.1e}" for name in names) + " |", flush=True)


if __name__ == "__main__":
    main()
