"""The speed of CLIP's vision tower, compared with `transformers` in PyTorch on the same machine.

    python -m experiments.speed.vision --size=b16
    python -m experiments.speed.vision --size=l14 --dtype=bfloat16 --batch=256       on a GPU

Both get the same images, parameters of the same shapes and the same number of threads; PyTorch uses its fused attention
(SDPA) and, on a GPU, `torch.compile`. Runs alternate; the ratio of their medians counts.
"""

import argparse
import functools
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.sizes import SIZES
from experiments.timing import add_record, made_with, medians
from vlab_jax.models.flops import Workload, forward_flops
from vlab_jax.models.towers import VisionTower
from vlab_jax.models.vlab import VLAB

RESULTS = pathlib.Path(__file__).with_name("vision.json")


def ours(fields: dict[str, Any], images: np.ndarray, dtype: str) -> Callable[[], Any]:
    """A forward pass of our tower, compiled."""
    tower = VisionTower(
        **fields, unroll=fields["depth"] if jax.default_backend() == "cpu" else 1, dtype=jnp.dtype(dtype)
    )
    placed = jnp.asarray(images.transpose(0, 2, 3, 1))
    parameters = jax.jit(tower.init)(jax.random.key(0), placed[:1])
    run = jax.jit(lambda parameters, images: tower.apply(parameters, images)[1])
    return lambda: jax.block_until_ready(run(parameters, placed))


def theirs(fields: dict[str, Any], images: np.ndarray, dtype: str) -> Callable[[], Any]:
    """A forward pass of `transformers`' CLIP tower of the same size."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tests"))
    from pytorch import pytorch  # the version of the parity tests

    torch = pytorch()
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=fields["width"],
        intermediate_size=fields["mlp_width"],
        projection_dim=fields["embed_width"],
        num_hidden_layers=fields["depth"],
        num_attention_heads=fields["heads"],
        image_size=fields["image_size"],
        patch_size=fields["patch_size"],
        attn_implementation="sdpa",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = CLIPVisionModelWithProjection(config).to(device, getattr(torch, dtype)).eval()
    placed = torch.from_numpy(images).to(device, getattr(torch, dtype))
    if device == "cuda":
        model = torch.compile(model)

    def run():
        with torch.inference_mode():
            found = model(pixel_values=placed).image_embeds
            if device == "cuda":
                torch.cuda.synchronize()
        return found

    return run


def main() -> None:
    """Measures one size and adds it to `vision.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="b16", choices=sorted(SIZES), help="a size in configs/sizes.py")
    parser.add_argument("--batch", type=int, default=8, help="images in a batch")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=9, help="counted runs")
    given = parser.parse_args()
    fields = SIZES[given.size]["vision"]
    side = fields["image_size"]
    images = np.random.default_rng(0).normal(0, 1, (given.batch, 3, side, side)).astype(np.float32)
    runs = {"ours": ours(fields, images, given.dtype), "transformers": theirs(fields, images, given.dtype)}
    for run in runs.values():
        run()  # compiles; not counted
    seconds = medians(runs, given.repeats, log=functools.partial(print, file=sys.stderr, flush=True))
    one = Workload(given.batch, 1, 1, ("video",), embedded_texts=0, decoded_texts=0)
    model = VLAB(vision=fields, text={}, decoder={}, adapter={"blocks": (), "before_mlp": False})
    recorded = {
        "seconds": seconds,
        "ours over transformers, throughput": seconds["transformers"] / seconds["ours"],
        "GFLOP/s, ours": forward_flops(model, one) / seconds["ours"] / 1e9,
        "cpus": len(os.sched_getaffinity(0)),
        **made_with(),
    }
    add_record(RESULTS, f"{given.size}, {given.dtype}, {given.batch} images, {recorded['device']}", recorded)


if __name__ == "__main__":
    main()
