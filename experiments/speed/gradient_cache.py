"""The cost and the saving of gradient caching: a batch of the tiny model at once, and in parts.

    python -m experiments.speed.gradient_cache --batch=4096 --parts=32

Compares the gradients of the contrastive loss, the memory of the compiled programs, and their times. Clips are noise
with `--frames` frames.
"""

import argparse
import functools
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.pretrain import get_config
from experiments.timing import made_with, medians
from vlab_jax.config import model_fields, plain
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.runtime.disk import write_json
from vlab_jax.training.objectives import Objective
from vlab_jax.training.step import micro_batched_gradient


def program(model: VLAB, objective: Objective, parts: int) -> Any:
    """(parameters, batch) → (gradient, metrics), jitted."""
    rng = jax.random.key(0)

    def whole(parameters, batch):
        return jax.grad(lambda each: objective(model, each, batch, rng), has_aux=True)(parameters)

    def in_parts(parameters, batch):
        return micro_batched_gradient(objective, model, lambda each: each, parameters, batch, rng, parts)

    return jax.jit(in_parts if parts > 1 else whole)


def largest_difference(one: Any, other: Any) -> float:
    """The largest difference, relative to the largest entry of the first argument."""
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    scale = max(float(jnp.abs(leaf).max()) for leaf, _ in pairs)
    return max(float(jnp.abs(leaf - another).max()) for leaf, another in pairs) / scale


def main() -> None:
    """Measures and writes `gradient_cache.json` beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096, help="clips in the batch")
    parser.add_argument("--parts", type=int, default=32, help="parts of the batch")
    parser.add_argument("--frames", type=int, default=2, help="frames of a clip")
    parser.add_argument("--repeats", type=int, default=1, help="counted runs")
    given = parser.parse_args()
    config = plain(get_config("tiny").to_dict())
    model = VLAB.from_fields({**model_fields(config), "frames": given.frames})
    rng = np.random.default_rng(0)
    size, length = model.vision["image_size"], model.text["context_length"]
    batch = {
        "video": rng.integers(0, 256, (given.batch, given.frames, size, size, 3)).astype(np.uint8),
        "tokens": rng.integers(1, 500, (given.batch, length)).astype(np.int32),
        "lengths": rng.integers(6, length, given.batch).astype(np.int32),
        "clip": np.arange(given.batch, dtype=np.int32),
    }
    shapes = parameter_shapes(model, given.frames)
    parameters = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.05, leaf.shape), leaf.dtype), shapes)
    chunked = Objective({"contrastive": 1.0}, ("video",), (0,), contrastive_chunk=given.batch // given.parts)
    plainly = Objective({"contrastive": 1.0}, ("video",), (0,))
    programs = {"at once": program(model, plainly, 1), "in parts": program(model, chunked, given.parts)}
    compiled = {name: each.lower(parameters, batch).compile() for name, each in programs.items()}
    memory = {name: each.memory_analysis().temp_size_in_bytes / 2**20 for name, each in compiled.items()}
    found = {}

    def run(name: str) -> None:
        found[name] = jax.block_until_ready(compiled[name](parameters, batch))

    runs = {name: functools.partial(run, name) for name in compiled}
    seconds = medians(runs, given.repeats, log=functools.partial(print, file=sys.stderr, flush=True))
    recorded = {
        **vars(given),
        "largest relative difference of gradients": largest_difference(found["at once"][0], found["in parts"][0]),
        "losses": {name: float(metrics["loss"]) for name, (_, metrics) in found.items()},
        "MiB of temporary memory": memory,
        "seconds": seconds,
        **made_with(),
    }
    write_json(pathlib.Path(__file__).with_name("gradient_cache.json"), recorded)
    print(json.dumps(recorded, indent=2))


if __name__ == "__main__":
    main()
