"""The share of the model, and of Python and decoding, in the time of embedding videos.

    python -m experiments.embedding_speed.measure --videos=/a/folder/of/videos
    python -m experiments.embedding_speed.measure --videos=/a/folder/of/videos --clips=16 --repeats=1

The model has a size of `configs/sizes.py` (`--size`) and random parameters. Two kinds of runs alternate, on the same
clips: `Predictor.embed_videos` on their paths, and the model alone on frames that were decoded before. The share is the
second time over the first, by medians. Decoding alone, in one process, is also timed.
"""

import argparse
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from configs.pretrain import get_config
from configs.sizes import SIZES
from experiments.timing import made_with, medians
from vlab_jax.config import model_fields, plain
from vlab_jax.data.tokenizer import train_bpe
from vlab_jax.errors import InputError
from vlab_jax.inference.clips import Clip, load_frames, media_files
from vlab_jax.inference.engine import TrainedModel, bucket_size, one_ahead, pad_batch
from vlab_jax.inference.predictor import Predictor
from vlab_jax.models.generation import chunks
from vlab_jax.models.vlab import VLAB, parameter_shapes
from vlab_jax.runtime import sharding
from vlab_jax.runtime.disk import write_json


def random_model(size: str, dtype: str) -> TrainedModel:
    """A model of a published size with random parameters, as if a run had trained it."""
    config = {**plain(get_config(size).to_dict()), "dtype": dtype}
    model = VLAB.from_fields(model_fields(config))
    mesh = sharding.make_mesh()
    shapes = parameter_shapes(model, config["frames"])
    rng = np.random.default_rng(0)
    parameters = jax.tree.map(
        lambda leaf, place: jax.device_put(rng.normal(0, 0.02, leaf.shape).astype(leaf.dtype), place),
        shapes,
        sharding.shardings(shapes, mesh),
    )
    text = config["model"]["text"]
    tokenizer = train_bpe(["a video"], 300, text["context_length"])
    return TrainedModel(size, mesh, config, config["stages"][-1], model, parameters, tokenizer)


def model_alone(predictor: Predictor, frames: list[np.ndarray], batch: int) -> Callable[[], np.ndarray]:
    """Embeds decoded frames, in the same batches as the predictor."""
    engine = predictor.engine
    batches = [pad_batch(part, bucket_size(len(part), batch, engine.divisor)) for part in chunks(frames, batch)]
    return lambda: np.concatenate(list(one_ahead(engine.embed(video) for video in batches)))


def main() -> None:
    """Measures and writes `results.json` beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", required=True, help="a folder of videos")
    parser.add_argument("--size", default="b16", choices=sorted(SIZES), help="a size in configs/sizes.py")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--clips", type=int, default=0, help="number of videos (default: all)")
    parser.add_argument("--batch", type=int, default=8, help="clips in a batch")
    parser.add_argument("--workers", type=int, default=-1, help="decoding processes")
    parser.add_argument("--repeats", type=int, default=3, help="counted runs")
    given = parser.parse_args()
    try:
        paths = media_files(given.videos)[: given.clips or None]
    except InputError as error:
        sys.exit(f"error: {error}")
    predictor = Predictor(random_model(given.size, given.dtype), batch_size=given.batch, workers=given.workers)
    decoded: list[np.ndarray] = []

    def decode() -> None:
        decoded[:] = [load_frames(Clip(path), predictor.frames) for path in paths]

    decode()
    alone = model_alone(predictor, decoded, given.batch)
    runs: dict[str, Callable[[], Any]] = {
        "from files": lambda: predictor.embed_videos(paths),
        "the model alone": alone,
        "decoding alone": decode,
    }
    for count in {
        min(given.batch, len(paths)),
        len(paths) % given.batch or given.batch,
    }:  # compiles; not counted
        found = predictor.embed_videos(paths[:count])
        np.testing.assert_allclose(found, model_alone(predictor, decoded[:count], given.batch)()[:count], atol=1e-5)
    seconds = medians(runs, given.repeats, log=functools.partial(print, file=sys.stderr, flush=True))
    recorded = {
        **{key: value for key, value in vars(given).items() if key != "videos"},
        "clips": len(paths),
        "frames": predictor.frames.num_frames,
        "seconds": seconds,
        "share of time in the model": seconds["the model alone"] / seconds["from files"],
        "clips a second": len(paths) / seconds["from files"],
        "cpus": len(os.sched_getaffinity(0)),
        **made_with(),
    }
    write_json(pathlib.Path(__file__).with_name("results.json"), recorded)
    print(json.dumps(recorded, indent=2))


if __name__ == "__main__":
    main()
